"""Run tests that are a single ONNX text file: a `# RUN:` line holds the command, `# CHECK:` lines its expected output.

A RUN line is `passopt … %s … | filecheck %s`, where %s is the file. It is parsed here and run in this process, never by
a shell. The check language is that of LLVM's FileCheck, as the package `filecheck` implements it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

_RUN = re.compile(r"^\s*#\s*RUN:\s*(.*?)\s*$", re.MULTILINE)
_CHECK = re.compile(r"^\s*#\s*CHECK[A-Z0-9-]*:", re.MULTILINE)


class FilecheckFile(pytest.File):
    """A file with one test per RUN line."""

    def collect(self) -> Iterator[pytest.Item]:
        text = self.path.read_text(encoding="utf-8")
        runs = _RUN.findall(text)
        if not runs and _CHECK.search(text):
            raise self.CollectError(f"{self.path}: has CHECK lines and no RUN line, so nothing would be checked")
        for index, line in enumerate(runs):
            name = "RUN" if len(runs) == 1 else f"RUN-{index + 1}"
            yield FilecheckItem.from_parent(self, name=name, line=line)


class FilecheckItem(pytest.Item):
    """The test of a RUN line: it runs `passopt` in this process and hands the output to `filecheck`."""

    def __init__(self, *, line: str, **keywords: object) -> None:
        super().__init__(**keywords)  # type: ignore[arg-type]
        self.line = line

    def runtest(self) -> None:
        producer, checker = self._pipeline(str(self.path))
        code, output, log = _run_passopt(producer[1:])
        if code:
            raise FilecheckError(f"passopt exited with {code}\n{log}")
        code, complaint = _run_filecheck(checker, output)
        if code:
            raise FilecheckError(f"{complaint}\n--- output of passopt ---\n{output}")

    def _pipeline(self, path: str) -> tuple[list[str], list[str]]:
        """Return the words of the two commands, with %s replaced by the path.

        Raises:
            FilecheckError: If the line is not `passopt … | filecheck …`.
        """
        try:
            words = shlex.split(self.line)
        except ValueError as error:
            raise FilecheckError(f"RUN: {self.line}\nis not a command line: {error}") from None
        words = [word.replace("%s", path) for word in words]
        if words.count("|") == 1:
            bar = words.index("|")
            producer, checker = words[:bar], words[bar + 1 :]
            if producer[:1] == ["passopt"] and checker[:1] == ["filecheck"]:
                return producer, checker
        raise FilecheckError(f"RUN: {self.line}\nexpected: passopt … %s … | filecheck %s")

    def command(self) -> str:
        """Return the command to paste into a shell to see the same, from the folder in which pytest was started."""
        path = self.path
        with contextlib.suppress(ValueError):
            path = path.relative_to(self.config.invocation_params.dir)
        return " | ".join(shlex.join(words) for words in self._pipeline(str(path)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        if not isinstance(excinfo.value, FilecheckError):
            return str(super().repr_failure(excinfo))
        with contextlib.suppress(FilecheckError):
            return f"{excinfo.value}\n--- the same by hand ---\n  {self.command()}"
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}: {self.line}"


class FilecheckError(Exception):
    """Raised if a RUN line is wrong, or if the output does not fulfil the CHECK lines."""


def _run_passopt(arguments: list[str]) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of one command."""
    from passopt.cli import main

    output, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(log):
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse exits if it does not understand the arguments
            code = error.code if isinstance(error.code, int) else 2
        except Exception:
            traceback.print_exc(file=log)
            code = 1
    return code, output.getvalue(), log.getvalue()


def _run_filecheck(words: list[str], text: str) -> tuple[int, str]:
    """Return the exit code of `filecheck` on `text`, and its complaint."""
    try:
        from filecheck.finput import FInput
        from filecheck.matcher import Matcher
        from filecheck.options import parse_argv_options
        from filecheck.parser import Parser
    except ModuleNotFoundError:
        return 2, "needs the package filecheck: pip install filecheck"

    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        try:
            options = parse_argv_options(words)
            matcher = Matcher(options, FInput(options.input_file, text), Parser.from_opts(options))
        except (RuntimeError, OSError) as error:
            return 2, f"filecheck: {error}"
        code = matcher.run()
    return code, log.getvalue()
