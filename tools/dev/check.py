"""Run every gate but the tests: ruff format and lint, links for type checkers, mypy strict, import rules, rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The import rules are read off the links as well, where the folders form one package.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "build" / "typepath")}
GATES = (
    ("format", ("ruff", "format", "--check", ".")),
    ("lint", ("ruff", "check", ".")),
    ("typepath", ("tools/dev/typepath.py",)),
    ("types", ("mypy",)),
    ("imports", ("importlinter",)),
    ("rooms", ("tools/dev/rooms.py",)),
)


def main() -> int:
    failed = []
    for name, command in GATES:
        done = subprocess.run(_command(command), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        print(f"{name:9} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout + done.stderr, flush=True)
    if failed:
        print(f"check: {', '.join(failed)} failed; `ruff format .` and `ruff check --fix .` mend what can be mended")
    return 1 if failed else 0


def _command(command: tuple[str, ...]) -> list[str]:
    if command[0] == "importlinter":
        return [str(Path(sys.executable).parent / "lint-imports")]
    if command[0].endswith(".py"):
        return [sys.executable, *command]
    return [sys.executable, "-m", *command]


if __name__ == "__main__":
    sys.exit(main())
