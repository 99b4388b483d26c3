"""Write a new pass and its tests: `passopt new-pass NAME`."""

from __future__ import annotations

import argparse

SUMMARY = "Write a new pass and its tests, which run at once: in a checkout of passopt, or as a package of its own."
EXAMPLE = "passopt new-pass fuse-silu"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("name", metavar="NAME", help="verb-object, such as fuse-silu")
    command.add_argument("--directory", metavar="DIR", help="default: this checkout, or a new folder called NAME")
    command.add_argument(
        "--room", metavar="ROOM", help="folder of passes/ in a checkout (default: by the verb of NAME)"
    )


def main(options: argparse.Namespace) -> int:
    """Write the files, and print how to go on."""
    from passopt.api.new_pass import new_pass

    print(new_pass(options.name, options.directory, room=options.room))
    return 0
