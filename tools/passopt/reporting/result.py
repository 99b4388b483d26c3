"""Define the base of all results of the Python API: a verdict, text, plain JSON, and a view for notebooks."""

from __future__ import annotations

import abc
import html
from collections.abc import Sequence
from typing import Any

#: Characters of the first line of a result's text that its repr shows.
_SHOWN = 80


class Result(abc.ABC):
    """The outcome of an operation; `str` gives the text that the command of the same name prints."""

    @property
    def ok(self) -> bool:
        """Return whether every check passed; an operation that cannot do its work raises an error instead."""
        return True

    @abc.abstractmethod
    def to_text(self) -> str:
        """Return the text that the command prints on stdout, without the last line break."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the object that the command prints with --json, as dictionaries, lists, strings and numbers."""

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        """Return one short line, so that a result may be looked at in an interpreter; `print` shows all of it."""
        first = next((line for line in self.to_text().splitlines() if line.strip()), "")
        return f"<passopt.{type(self).__name__} {'ok' if self.ok else 'not ok'}: {first[:_SHOWN].strip()}>"

    def _repr_html_(self) -> str:
        """Return a view for notebooks: the text with its alignment kept."""
        return f"<pre>{html.escape(self.to_text())}</pre>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a small HTML table with escaped cells; whole numbers are aligned to the right."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(_cell(item) for item in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(item: object) -> str:
    if isinstance(item, int) and not isinstance(item, bool):
        return f'<td style="text-align:right">{item:,}</td>'
    return f"<td>{html.escape(str(item))}</td>"
