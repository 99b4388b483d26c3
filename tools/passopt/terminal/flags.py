"""Say in messages how an argument of Python is given on the command line.

Messages name arguments as Python knows them, in backquotes: `memory`, or `dtype=fp32` with a value. The command line
shows the same messages with its own options instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

_ARGUMENT = re.compile(r"`([a-z_][a-z0-9_]*)(?:=([^`]*))?`")


def flags_of(parser: argparse.ArgumentParser, command: str) -> dict[str, str]:
    """Return the option of the command line for every argument, such as "dump_dir": "--dump-dir".

    Args:
        parser: The parser of all commands.
        command: The command whose options count first; others are named where a message speaks of another command.
    """
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    found: dict[str, str] = {}
    for _, inner in sorted(commands.choices.items(), key=lambda item: item[0] != command):
        for action in inner._actions:
            if action.option_strings:
                found.setdefault(action.dest, _shown(action.option_strings))
    return found


def _shown(options: list[str]) -> str:
    """Return the option that help and documentation use: a single letter if there is one."""
    return min(options, key=len)


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a message with options of the command line in place of the arguments of Python that it names.

    Args:
        text: The message.
        flags: The option for every argument.
    """

    def replaced(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        return flags[name] if value in {None, "True"} else f"{flags[name]} {value}"

    return _ARGUMENT.sub(replaced, text)
