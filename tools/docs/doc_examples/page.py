"""Run the examples of one page: a folder, a virtual environment, a shell and a Python process of its own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import IO, Any

from doc_examples.blocks import Command, Example, PageError, Span, read_commands
from doc_examples.compare import ANYTHING, difference, same, updated

#: What a page may call without a path. `pip` installs into the page's own environment.
_SCRIPTS = ("passopt", "pytest", "pip", "filecheck")
_ENVIRONMENT = {
    "COLUMNS": "120",
    "HF_HUB_OFFLINE": "1",
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads the 0 as "no isolation": what builds a package is installed already
    "PIP_NO_INDEX": "1",
    "PYTHONUNBUFFERED": "1",
    "TERM": "dumb",
    "TOKENIZERS_PARALLELISM": "false",
}
# `CI` and `BUILD_NUMBER` make pytest print more than a reader sees at a terminal.
_UNSET = ("BUILD_NUMBER", "CI", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTHONPATH", "VIRTUAL_ENV")
_TIMEOUT = 600
_CHECKOUT = Path(__file__).resolve().parents[3]
_SECONDS = re.compile(r"(\d (?:passed|failed)[^\n]*) in \d+\.\d+s")
_EXIT_CODE = "echo $?"


class Mismatch(Exception):
    """An example did not do what its page says."""


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A new text for a piece of the page."""

    span: Span
    text: str


class Page:
    """What the examples of one page share.

    Args:
        source: The page.
        update: Collect new outputs instead of comparing them.
    """

    def __init__(self, source: Path, *, update: bool) -> None:
        self.source = source
        self._update = update
        self._root = Path(tempfile.mkdtemp(prefix="passopt-docs-"))
        self._folder = self._root / "work"
        self._folder.mkdir()
        self._here = self._folder
        self._bin = _make_environment(self._root / "venv")
        self._variables = {**os.environ, **_ENVIRONMENT, "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        for name in _UNSET:
            self._variables.pop(name, None)
        self._python: _Python | None = None
        self._last_code = 0
        self._replacements: list[Replacement] = []
        self._cpu = _cpu_of_children()

    def add(self, name: str, source: Path) -> None:
        """Put a copy of a folder into the page's folder."""
        shutil.copytree(source, self._folder / name)

    def run(self, example: Example) -> None:
        """Run an example.

        Raises:
            Mismatch: It failed, or printed something else than the page shows.
        """
        if example.kind == "file":
            self._write(example)
        elif example.kind == "console":
            self._run_console(example)
        elif example.kind == "python":
            self._run_python(example)

    def close(self) -> float:
        """End the processes, remove the folder, write new outputs into the page; returns its CPU seconds."""
        if self._python is not None:
            self._python.close()
        cpu = _cpu_of_children() - self._cpu
        shutil.rmtree(self._root, ignore_errors=True)
        if not self._replacements:
            return cpu
        text = self.source.read_text(encoding="utf-8")
        for item in sorted(self._replacements, key=lambda item: item.span.start, reverse=True):
            text = text[: item.span.start] + item.text + text[item.span.end :]
        self.source.write_text(text, encoding="utf-8")
        return cpu

    def _write(self, example: Example) -> None:
        path = (self._here / example.argument).resolve()
        if not path.is_relative_to(self._folder.resolve()):
            raise Mismatch(f"{example.argument}: lies outside of the page's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(example.body.text, encoding="utf-8")

    def _run_console(self, example: Example) -> None:
        try:
            commands = read_commands(example.body)
        except PageError as error:
            raise Mismatch(str(error)) from error
        problems = []
        for index, command in enumerate(commands):
            following = commands[index + 1].text if index + 1 < len(commands) else ""
            problems += self._run_command(command, may_fail=following == _EXIT_CODE)
        if problems:
            raise Mismatch("\n\n".join(problems))

    def _run_command(self, command: Command, *, may_fail: bool) -> list[str]:
        """Run one command in the shell's folder; returns what is wrong."""
        state, place = self._root / "variables", self._root / "place"
        restore = f"source {state}; " if state.exists() else ""
        script = (
            f"{restore}(exit {self._last_code})\n{command.text}\n"
            f"__code=$?; pwd > {place}; export -p > {state}; exit $__code"
        )
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._here,
            env=self._variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT,
            check=False,
        )
        self._last_code = done.returncode
        if place.exists():
            self._here = Path(place.read_text().rstrip("\n"))
        output = done.stdout.decode("utf-8", "replace")
        problems = []
        if done.returncode and not may_fail:
            problems.append(
                f"$ {command.text}\nended with exit code {done.returncode}. If it should, let `$ {_EXIT_CODE}` follow. "
                f"It printed:\n{output}"
            )
        elif complaint := self._compare(command.output, output):
            problems.append(f"$ {command.text}\n{complaint}")
        return problems

    def _run_python(self, example: Example) -> None:
        if self._python is None:
            self._python = _Python(self._bin / "python", self._here, self._variables)
        answer = self._python.run(example.body.text, self.source.name, self._here)
        if answer["error"]:
            printed = answer["outputs"][0][2]
            raise Mismatch(answer["error"] + (f"\nIt printed:\n{printed}" if printed else ""))
        if example.body.text.lstrip().startswith(">>>"):
            spans = [
                (Span(example.body.text[start:end], example.body.start + start), output)
                for start, end, output in answer["outputs"]
            ]
        else:
            spans = [(example.output, answer["outputs"][0][2])] if example.output is not None else []
        problems = [complaint for span, output in spans if (complaint := self._compare(span, output))]
        if problems:
            raise Mismatch("\n\n".join(problems))

    def _compare(self, shown: Span, output: str) -> str:
        """Return what differs, or nothing; with --update-docs, remember the new output instead."""
        if same(shown.text, output):
            return ""
        if not self._update:
            return difference(shown.text, output)
        self._replacements.append(Replacement(shown, updated(shown.text, self._without_places(output))))
        return ""

    def _without_places(self, output: str) -> str:
        """Return the output without what differs between runs: temporary folders, the checkout, seconds of pytest."""
        for folder in (self._folder, *self._bin.parent.glob("lib/python*/site-packages"), self._root, _CHECKOUT):
            output = output.replace(str(folder), ANYTHING)
        return _SECONDS.sub(rf"\1 in {ANYTHING}s", output)


class _Python:
    """A Python process that runs blocks in one namespace."""

    def __init__(self, executable: Path, folder: Path, variables: dict[str, str]) -> None:
        request_end, requests = os.pipe()
        answers, answer_end = os.pipe()
        command = [str(executable), str(Path(__file__).with_name("worker.py")), str(request_end), str(answer_end)]
        self._process = subprocess.Popen(
            command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, pass_fds=(request_end, answer_end)
        )
        os.close(request_end)
        os.close(answer_end)
        self._requests: IO[str] = os.fdopen(requests, "w")
        self._answers: IO[str] = os.fdopen(answers)

    def run(self, source: str, name: str, folder: Path) -> dict[str, Any]:
        self._requests.write(json.dumps({"source": source, "name": name, "folder": str(folder)}) + "\n")
        self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            raise Mismatch(f"Python ended with exit code {self._process.wait()} inside of the block")
        return dict(json.loads(answer))

    def close(self) -> None:
        self._requests.close()
        self._answers.close()
        self._process.wait(timeout=30)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _make_environment(folder: Path) -> Path:
    """Make a virtual environment that sees all packages of this one; return its folder of programs.

    What a page installs stays in it.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    programs = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    outer = sysconfig.get_path("purelib")
    (packages / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    known = {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}
    for name in _SCRIPTS:
        if name in known:
            module, _, attribute = known[name].value.partition(":")
            script = programs / name
            script.write_text(
                f"#!{programs / 'python'}\nimport sys\nfrom {module} import {attribute}\n"
                f"if __name__ == '__main__':\n    sys.argv[0] = {name!r}\n    sys.exit({attribute}())\n"
            )
            script.chmod(0o755)
    assert (programs / "passopt").exists(), f"passopt is not installed for {sys.executable}"
    return programs
