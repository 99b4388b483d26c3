"""Print the canonical text of a model, or where its nodes come from: `passopt print MODEL`."""

from __future__ import annotations

import argparse

SUMMARY = "Print the canonical text of a model; equal layers are shown once."
EXAMPLE = "passopt print model.onnx"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx or its folder")
    command.add_argument("--no-fold", action="store_true", help="print every layer, also equal ones")
    command.add_argument(
        "--canonical",
        action="store_true",
        help="name values by operator and place, so that texts of models with other names can be compared",
    )
    command.add_argument(
        "--provenance",
        action="store_true",
        help="instead of the text, print for each node the passes that made it, its original nodes, and their module "
        "and source line",
    )
    command.add_argument("--json", action="store_true", help="with --provenance: print every layer as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the text, or the provenance."""
    from passopt.api.model import load, print_text
    from passopt.ir.errors import UsageError

    model = load(options.model)
    if options.provenance:
        from passopt.api.provenance import provenance
        from passopt.terminal.console import print_json

        found = provenance(model)
        if options.json:
            print_json(found.to_json()["nodes"])
        else:
            print(found.to_text(fold=not options.no_fold))
        return 0
    if options.json:
        raise UsageError("--json is for print --provenance; the canonical text has one form")
    print(print_text(model, fold=not options.no_fold, canonical=options.canonical), end="")
    return 0
