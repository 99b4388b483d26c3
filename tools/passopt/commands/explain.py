"""Explain a pass or a pipeline: `passopt explain PASS`."""

from __future__ import annotations

import argparse

SUMMARY = "Show what a pass or a pipeline is for: its options, what it looks for and makes, and where it declines."
EXAMPLE = "passopt explain fuse-rms-norm"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("name", metavar="PASS", help="name of a pass or a pipeline, as passopt list shows it")
    command.add_argument("--json", action="store_true", help="print the explanation as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the explanation."""
    from passopt.api.explain import explain
    from passopt.terminal.console import print_json

    found = explain(options.name)
    if options.json:
        print_json(found.to_json())
    else:
        print(found)
    return 0
