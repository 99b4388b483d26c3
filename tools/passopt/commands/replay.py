"""Run a reproducer again: `passopt replay DIR`."""

from __future__ import annotations

import argparse

SUMMARY = "Run the failing pass of a reproducer again: exit 1 if it still fails, 0 if it does not."
EXAMPLE = "passopt replay model.int8.reproducer"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("directory", metavar="DIR", help="what passopt run left where a pass failed")


def main(options: argparse.Namespace) -> int:
    """Print what changed since, and exit 1 if it still fails, in this way or another."""
    from passopt.api.replay import replay
    from passopt.ir.errors import CheckError

    result = replay(options.directory)
    if text := result.to_text():
        print(text)
    if not result.ok:
        raise CheckError(result.verdict)
    return 0
