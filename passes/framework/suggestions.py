"""Suggest the names that a user may have meant where one is unknown."""

from __future__ import annotations

import difflib


def unknown_name(what: str, name: str, known: list[str], shown_by: str = "passopt list") -> str:
    """A message that offers what the user may have meant."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(other) for other in close)}?" if close else f"{shown_by} shows all."
    return f"unknown {what} {name!r}; {hint}"
