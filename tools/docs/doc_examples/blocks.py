"""Read the code blocks of a Markdown page, and what the page says about how they run.

A comment line before a block may say `<!-- file: PATH -->` (the block is the content of this file) or
`<!-- not run: REASON -->` (the block is only shown).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Kind = Literal["console", "python", "file", "not run"]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)`*~* *$",
    re.DOTALL | re.MULTILINE,
)
_NOTE = re.compile(r"<!-- *(?P<key>file|not run): *(?P<value>.*?) *-->\s*\Z")
_ANY_NOTE = re.compile(r"^<!-- *(file|not run)\b(?P<rest>.*?)-->", re.MULTILINE)
_OPTION = re.compile(r":(?P<key>[\w-]+):(?P<value>[^\n]*)\n")
_FRONT_MATTER = re.compile(r"\A---\n(?P<text>.*?)^---\n", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"^needs: *(?P<names>[^\n]*)$", re.MULTILINE)
_NEEDS_COMMENT = re.compile(r"^<!-- *needs: *(?P<names>[^\n]*?) *-->$", re.MULTILINE)

#: Directives whose body is a program or its output. Every other directive is text for Sphinx and does not run.
_CODE_DIRECTIVES = ("code-block", "code", "sourcecode")


class PageError(Exception):
    """A page says something about its examples that cannot be carried out."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of a page, with the position of its first character."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a console block, and the output that the page shows below it."""

    text: str
    output: Span


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a page.

    Attributes:
        kind: How it is run.
        start: The position of its first character in the page.
        end: The position after its last character.
        body: Its content without the fences.
        output: What the page shows as the output of a Python block; None if it shows nothing.
        argument: The path of a file, or the reason why a block is not run.
    """

    kind: Kind
    start: int
    end: int
    body: Span
    output: Span | None = None
    argument: str = ""


@dataclasses.dataclass(frozen=True)
class _Fence:
    start: int
    end: int
    language: str
    body: Span
    caption: str
    note: tuple[str, str] | None


def read_examples(page: str) -> list[Example]:
    """Return the examples of a page in order.

    Raises:
        PageError: A block says neither how it runs nor why it does not.
    """
    for note in _ANY_NOTE.finditer(page):
        if not note["rest"].lstrip(":").strip():
            line = page.count("\n", 0, note.start()) + 1
            raise PageError(f"line {line}: a block that is not run needs a reason: <!-- not run: REASON -->")
    fences = [fence for match in _FENCE.finditer(page) if (fence := _read_fence(page, match)) is not None]
    found: list[Example] = []
    for index, fence in enumerate(fences):
        before = fences[index - 1] if index else None
        if _is_output(page, before, fence):
            found[-1] = dataclasses.replace(found[-1], end=fence.end, output=fence.body)
        else:
            found.append(_example(page, fence))
    return found


def read_needs(page: str) -> tuple[str, ...]:
    """Return what a page needs in its folder before its first example, as its front matter or a comment says."""
    front = _FRONT_MATTER.match(page)
    match = (_NEEDS.search(front["text"]) if front else None) or _NEEDS_COMMENT.search(page)
    return tuple(re.split(r"[,\s]+", match["names"].strip(" []"))) if match else ()


def read_commands(body: Span) -> list[Command]:
    """Return the commands of a console block. Lines that begin with `> ` right after a command continue it.

    Raises:
        PageError: The block does not begin with a command.
    """
    commands: list[Command] = []
    words: list[str] = []
    place = start = body.start
    in_command = False

    def finish() -> None:
        if words:
            commands.append(Command("\n".join(words), Span(body.text[start - body.start : place - body.start], start)))

    for line in body.text.splitlines(keepends=True):
        text = line.rstrip("\n")
        if text.startswith("$ "):
            finish()
            words, in_command = [text[2:]], True
        elif in_command and text.startswith("> "):
            words.append(text[2:])
        elif not words:
            raise PageError(f"a console block begins with a command, `$ …`, not with {text!r}")
        else:
            in_command = False
        place += len(line)
        if in_command:
            start = place
    finish()
    return commands


def _read_fence(page: str, match: re.Match[str]) -> _Fence | None:
    """Return a block of code; None for a directive that is text."""
    if match["indent"]:
        raise PageError(f"line {page.count(chr(10), 0, match.start()) + 1}: a block begins at the first column")
    info, body, start = match["info"].strip(), match["body"], match.start("body")
    directive = re.match(r"\{(?P<name>[\w:-]+)\} *(?P<argument>.*)", info)
    caption = ""
    if directive:
        if directive["name"] not in _CODE_DIRECTIVES:
            return None
        info = directive["argument"]
        while option := _OPTION.match(body):
            caption = option["value"].strip() if option["key"] == "caption" else caption
            body, start = body[option.end() :], start + option.end()
        stripped = body.lstrip("\n")
        body, start = stripped, start + len(body) - len(stripped)
    note = _NOTE.search(page[: match.start()])
    language = info.split()[0] if info else ""
    found = (note["key"], note["value"]) if note else None
    return _Fence(match.start(), match.end(), language, Span(body, start), caption, found)


def _is_output(page: str, before: _Fence | None, fence: _Fence) -> bool:
    """Whether a block is the output of the Python block right before it."""
    if before is None or before.language != "python" or before.caption or before.note or fence.note or fence.caption:
        return False
    return fence.language in ("text", "output") and not page[before.end : fence.start].strip()


def _example(page: str, fence: _Fence) -> Example:
    path = fence.caption or (fence.note[1] if fence.note and fence.note[0] == "file" else "")
    if fence.note and fence.note[0] == "not run":
        return Example("not run", fence.start, fence.end, fence.body, argument=fence.note[1])
    if path:
        return Example("file", fence.start, fence.end, fence.body, argument=path)
    if fence.language == "console":
        return Example("console", fence.start, fence.end, fence.body)
    if fence.language in ("python", "pycon"):
        return Example("python", fence.start, fence.end, fence.body)
    line = page.count("\n", 0, fence.start) + 1
    raise PageError(
        f"line {line}: a block of {fence.language or 'no language'} runs nowhere. Give it a :caption: with the path of "
        "a file, make it console or python, or say why it does not run: <!-- not run: REASON -->"
    )
