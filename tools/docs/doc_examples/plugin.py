"""Make the examples of Markdown pages tests of pytest: `pytest README.md CONTRIBUTING.md docs`.

`--update-docs` writes what examples print into their pages, instead of comparing it: read the difference afterwards.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sybil
from sybil.example import SybilFailure

from doc_examples.blocks import Example, PageError, read_examples, read_needs
from doc_examples.page import Mismatch, Page

#: Pages that programs write from what they measured. Their commands are not examples of a page.
MEASURED = ("docs/measured/*.md", "CHANGELOG.md")

_NOT_RUN: list[str] = []
_CPU: dict[str, float] = {}
_SETTINGS = {"update": False}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --update-docs."""
    group = parser.getgroup("passopt")
    group.addoption("--update-docs", action="store_true", help="write the output of examples into their pages")


def pytest_configure(config: pytest.Config) -> None:
    """Remember whether pages are updated."""
    _SETTINGS["update"] = bool(config.getoption("--update-docs"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what was not run, and the CPU seconds of each page."""
    if _NOT_RUN:
        terminalreporter.section("examples that are only shown", sep="-")
        for line in _NOT_RUN:
            terminalreporter.line(line)
    if _CPU:
        terminalreporter.section("CPU seconds of the pages", sep="-")
        for name, seconds in _CPU.items():
            terminalreporter.line(f"{seconds:6.1f}  {name}")
        terminalreporter.line(f"{sum(_CPU.values()):6.1f}  all")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Any:
    """Collect a Markdown page of the project; a page that a program writes from measurements is none."""
    return _collector(str(parent.config.rootpath))(file_path, parent)


@functools.cache
def _collector(root: str) -> Any:
    return sybil.Sybil(parsers=[parse_page], path=root, pattern="*.md", excludes=MEASURED, teardown=_close).pytest()


def parse_page(document: sybil.Document) -> Iterable[sybil.Region]:
    """Yield the examples of a page, for sybil. What is wrong with the page itself is a failing example."""
    try:
        examples = read_examples(document.text)
    except PageError as error:
        yield sybil.Region(0, min(1, len(document.text)), str(error), _fail)
        return
    for example in examples:
        yield sybil.Region(example.start, example.end, example, _evaluate)


def _fail(example: sybil.Example) -> None:
    raise SybilFailure(example, example.parsed)


def _evaluate(example: sybil.Example) -> None:
    found: Example = example.parsed
    if found.kind == "not run":
        _NOT_RUN.append(f"{Path(example.path).name}:{example.line}: {found.argument}")
        pytest.skip(found.argument)
    try:
        _page_of(example).run(found)
    except Mismatch as error:
        raise SybilFailure(example, str(error)) from None


def _page_of(example: sybil.Example) -> Page:
    """Return the page of an example, with what it needs in its folder."""
    if "page" not in example.namespace:
        page = example.namespace["page"] = Page(Path(example.path), update=_SETTINGS["update"])
        for name in read_needs(example.document.text):
            page.add(name, _made(name))
    found: Page = example.namespace["page"]
    return found


def _close(namespace: dict[str, Any]) -> None:
    page = namespace.pop("page", None)
    if page is not None:
        _CPU[page.source.name] = page.close()


@functools.cache
def _made(name: str) -> Path:
    """Return a folder that is made once per run of pytest: `checkpoint-alibi`, or its export `alibi`; or of rotary."""
    from passopt.testing import ALIBI, ROTARY, make_checkpoint

    specs = {"alibi": ALIBI, "rotary": ROTARY}
    family = name.removeprefix("checkpoint-")
    if family not in specs:
        raise Mismatch(f"needs: {name}: expected checkpoint-alibi, checkpoint-rotary, alibi or rotary")
    target = _shared() / name
    if name.startswith("checkpoint-"):
        return make_checkpoint(target, specs[family])
    command = ["export", str(_made(f"checkpoint-{family}")), "-o", str(target), "--dtype", "fp32"]
    subprocess.run(
        [sys.executable, "-m", "passopt", *command, "--trust-remote-code", "--no-self-check"],
        check=True,
        capture_output=True,
    )
    return target


@functools.cache
def _shared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="passopt-docs-shared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
