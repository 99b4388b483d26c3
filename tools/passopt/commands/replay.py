"""Run a reproducer again: `passopt replay DIR`."""

from __future__ import annotations

import argparse

SUMMARY = "Run the failing pass of a reproducer again, and exit with 1 if it still fails, with 0 if it does not."
EXAMPLE = "passopt replay model.int8.reproducer"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("directory", metavar="DIR", help="reproducer folder that passopt run left when a pass failed")


def main(options: argparse.Namespace) -> int:
    """Print what has changed since; raise CheckError, which exits with 1, if the pass still fails in any way."""
    from passopt.api.replay import replay
    from passopt.ir.errors import CheckError

    result = replay(options.directory)
    if text := result.to_text():
        print(text)
    if not result.ok:
        raise CheckError(result.verdict)
    return 0
