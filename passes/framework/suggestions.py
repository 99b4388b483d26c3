"""Suggest similar names when a user gives an unknown one."""

from __future__ import annotations

import difflib


def unknown_name(what: str, name: str, known: list[str], shown_by: str = "") -> str:
    """Return an error message for an unknown name, with up to two similar names that the user may have meant.

    Args:
        what: The kind of thing that was named, such as "pass" or "option".
        name: The unknown name.
        known: All names that would be right.
        shown_by: The command that lists all names; it is mentioned if no known name is similar. Without a command,
            the message lists the names itself.

    Returns:
        A message such as ``unknown pass 'fuse-rotry'; did you mean 'fuse-rotary'?``
    """
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=2, cutoff=0.5)
    names = ", ".join(dict.fromkeys(known)) or "none"
    all_of_them = f"{shown_by} shows all." if shown_by else f"there are: {names}"
    hint = f"did you mean {' or '.join(repr(other) for other in close)}?" if close else all_of_them
    return f"unknown {what} {name!r}; {hint}"
