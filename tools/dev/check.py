"""Run every check but the tests: format, lint, types, imports, docstrings, spelling, links, and the documentation.

    python tools/dev/check.py [GATE ...]

Without names, all gates run; `examples` runs every code block of README, CONTRIBUTING and docs, which takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: import-linter needs the links of typepath.py too, through which the folders form one package.
LINKED = {**os.environ, "PYTHONPATH": str(ROOT / "build" / "typepath")}
GATES = (
    ("format", ("ruff", "format", "--check", ".")),
    ("lint", ("ruff", "check", ".")),
    ("typepath", ("tools/dev/typepath.py",)),
    ("types", ("mypy",)),
    ("imports", ("importlinter",)),
    ("rooms", ("tools/dev/rooms.py",)),
    ("docstrings", ("tools/dev/docstrings.py",)),
    ("spelling", ("codespell_lib",)),
    ("links", ("tools/docs/links.py",)),
    ("pages", ("sphinx", "-q", "-W", "--keep-going", "-b", "dirhtml", "docs", "build/docs")),
    ("examples", ("pytest", "-q", "README.md", "CONTRIBUTING.md", "docs")),
)


def main(chosen: Sequence[str]) -> int:
    """Run the checks, print which failed with their output, and return 1 if any did."""
    unknown = set(chosen) - {name for name, _ in GATES}
    if unknown:
        print(f"check: there is no gate {', '.join(sorted(unknown))}; there are {', '.join(name for name, _ in GATES)}")
        return 2
    failed = []
    for name, command in GATES:
        if chosen and name not in chosen:
            continue
        environment = LINKED if name == "imports" else None
        done = subprocess.run(_command(command), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(f"{name:10} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout + done.stderr, flush=True)
    if failed:
        repair = "; `ruff format .` and `ruff check --fix .` repair what can be repaired"
        print(f"check: {', '.join(failed)} failed{repair if {'format', 'lint'} & set(failed) else ''}")
    return 1 if failed else 0


def _command(command: tuple[str, ...]) -> list[str]:
    if command[0] == "importlinter":
        return [str(Path(sys.executable).parent / "lint-imports")]
    if command[0].endswith(".py"):
        return [sys.executable, *command]
    return [sys.executable, "-m", *command]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
