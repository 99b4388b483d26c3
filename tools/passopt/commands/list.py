"""List passes and pipelines: `passopt list`."""

from __future__ import annotations

import argparse

SUMMARY = "List all passes and named pipelines with their options."
EXAMPLE = "passopt list --json"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the list, which is read from the sources of the passes without importing them."""
    from passopt.api.catalogue import list_passes

    found = list_passes()
    if options.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
    else:
        print(found)
    return 0
