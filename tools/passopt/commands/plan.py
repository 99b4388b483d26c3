"""Show the legal degrees of tensor parallelism: `passopt plan MODEL`."""

from __future__ import annotations

import argparse

SUMMARY = "Show the legal degrees of tensor parallelism of a model, and what blocks the others."
EXAMPLE = "passopt plan model.onnx"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx or its folder; it is not changed")
    command.add_argument("--json", action="store_true", help="print the degrees and what blocks them as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the degrees; the model is not changed."""
    from passopt.api.plan import plan
    from passopt.terminal.console import print_json

    found = plan(options.model)
    if options.json:
        print_json(found.to_json())
    else:
        print(found)
    return 0
