"""Write a new pass and its tests: `passopt new-pass NAME`."""

from __future__ import annotations

import argparse

SUMMARY = "Write a working example of a new pass with its tests: in a checkout of passopt, or as a package of its own."
EXAMPLE = "passopt new-pass fuse-silu"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("name", metavar="NAME", help="name of the pass, a verb and an object such as fuse-silu")
    command.add_argument(
        "--directory",
        metavar="DIR",
        help="checkout of passopt, or folder of a package, to write to (default: the current folder if it is a "
        "checkout, otherwise a new folder called NAME)",
    )
    command.add_argument(
        "--room",
        metavar="ROOM",
        help="in a checkout: folder of passes/ to write the pass to (default: the one that fits the verb of NAME)",
    )


def main(options: argparse.Namespace) -> int:
    """Write the files, and print what to do next."""
    from passopt.api.new_pass import new_pass

    print(new_pass(options.name, options.directory, room=options.room))
    return 0
