"""Set up the development environment: make .venv, install the pinned packages into it, and show the progress.

    python tools/dev/install.py .venv '.[export,gguf,run,guests,fast,dev]'

This runs on the bare Python of the machine, before anything is installed. If it was interrupted or failed, the next
call continues: an environment that does not work is made anew, and pip installs what is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
#: Without a terminal, print a line of progress after so many seconds only.
_QUIET_SECONDS = 15.0
_STEP = re.compile(
    r"^(Collecting|Downloading|Processing|Using cached|Installing collected packages:|Preparing)\s*(\S*)"
)


def main() -> int:
    """Install, and return pip's exit code; pip's whole output is kept in install.log in the environment."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    python = _environment(folder)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--editable", what]
    environment = {**os.environ, "PIP_CONSTRAINT": str(CONSTRAINTS)}
    log, progress = folder / "install.log", Progress(_expected())
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            progress.line(line)
    code = process.wait()
    progress.end(code)
    if code:
        print(log.read_text(encoding="utf-8"))
        print(f"installation failed; the log is {log}. Run the same command again to continue.", file=sys.stderr)
    return code


def _environment(folder: Path) -> Path:
    """Return the Python of a working environment; make it if there is none or if an interruption left it broken."""
    python = folder / "bin" / "python"
    works = python.exists() and subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
    if not works:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    return python


def _expected() -> int:
    """Return about how many packages will be installed: the number of lines of constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return sum(bool(line.strip()) and not line.startswith("#") for line in lines)


class Progress:
    """Show what pip does in one line, which is rewritten on a terminal and repeated now and then elsewhere."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._start = self._said = time.monotonic()
        self._seen: set[str] = set()
        self._doing = "starting"
        self._terminal = sys.stderr.isatty()
        self._say()

    def line(self, text: str) -> None:
        """Take one line of pip's output, and update the progress if it says something about it."""
        found = _STEP.match(text.strip())
        if found is None:
            return
        if found[1] == "Collecting":
            self._seen.add(re.split(r"[<>=!\[;]", found[2])[0].lower())
        installing = found[1].startswith("Installing")
        self._doing = "installing all of them" if installing else f"{found[1].lower()} {Path(found[2]).name}"
        if self._terminal or installing or time.monotonic() - self._said > _QUIET_SECONDS:
            self._say()

    def end(self, code: int) -> None:
        """Show the last line: done, or failed if pip's exit code is not 0."""
        self._doing = "done" if code == 0 else "failed"
        self._say(last=True)

    def _say(self, *, last: bool = False) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._start
        text = f"installing: {len(self._seen)} of about {self._expected} packages, {seconds:.0f} s, {self._doing}"
        if self._terminal:
            print(f"\r{text[:100]}\033[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
