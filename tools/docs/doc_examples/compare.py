"""Compare what an example printed with what its page shows, where `…` stands for anything."""

from __future__ import annotations

import difflib
import itertools
import re

#: As a line: any number of lines. Within a line: any text.
ANYTHING = "…"

#: The number of a line of Python code. An edit of passopt moves it, which makes no page untrue: any number is the same.
_LINE_OF_CODE = re.compile(r"(?<=\.py:)\d+(?:\\?-\d+)?")


def same(expected: str, actual: str) -> bool:
    """Return True if the output is what the page shows. Spaces at the ends of lines do not count."""
    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line.strip() == ANYTHING else _line_pattern(line) + r"\n" for line in _lines(expected)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _lines(actual))) is not None


def difference(expected: str, actual: str) -> str:
    """Return the lines that differ, expected and found, for a person to read."""
    shown = list(_lines(actual))
    wanted = [_matching(line, shown) for line in _lines(expected)]
    lines = difflib.unified_diff(wanted, shown, "the page shows", "it printed", lineterm="", n=2)
    return "\n".join(lines) or "the order of lines differs"


def updated(expected: str, actual: str) -> str:
    """Return the output as a page should show it now: lines of the page that still hold keep their `…`."""
    if same(expected, actual):
        return expected
    old, new = _lines(expected), _lines(actual)
    anchors = [(-1, -1), *_anchors(old, new), (len(old), len(new))]
    lines: list[str] = []
    for (old_from, new_from), (old_to, new_to) in itertools.pairwise(anchors):
        gap = old[old_from + 1 : old_to]
        if gap and all(line.strip() == ANYTHING for line in gap):
            lines += gap
        else:
            lines += new[new_from + 1 : new_to]
        lines += old[old_to : old_to + 1]
    return "".join(f"{line}\n" for line in lines)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _line_pattern(line: str) -> str:
    """Return a pattern for one line. Spaces around `…` may be more or fewer, so that columns can stay aligned."""
    pieces = (re.escape(piece) for piece in re.split(f" *{ANYTHING} *", line))
    return r"[^\n]*?".join(_LINE_OF_CODE.sub(lambda _: r"[\d-]+", piece) for piece in pieces)


def _holds(expected: str, line: str) -> bool:
    return re.fullmatch(_line_pattern(expected), line) is not None


def _matching(expected: str, lines: list[str]) -> str:
    """Return the first of the lines that fits, so that a difference shows only what does not."""
    return next((line for line in lines if expected.strip() != ANYTHING and _holds(expected, line)), expected)


def _anchors(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Lines of the page that still hold, with the lines that were printed, both in order."""
    found: list[tuple[int, int]] = []
    place = 0
    for index, line in enumerate(old):
        if line.strip() == ANYTHING:
            continue
        match = next((at for at in range(place, len(new)) if _holds(line, new[at])), None)
        if match is not None:
            found.append((index, match))
            place = match + 1
    return found
