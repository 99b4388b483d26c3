"""Explain why a pass did not match: `passopt why PASS MODEL`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import count

SUMMARY = "Explain why a pass did not match: where its rules came near, and what kept them from matching."
EXAMPLE = "passopt why fuse-attention model.onnx --in baichuan2"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument(
        "name", metavar="PASS", help="pass to explain, with its options, such as quantize-weights{head=true}"
    )
    command.add_argument("model", metavar="MODEL", help="model.onnx or its folder; it is not changed")
    command.add_argument(
        "--node", metavar="NAME", help="explain all rules at the node of this name, or at the node of this value"
    )
    command.add_argument("--after", metavar="PIPELINE", help="run these passes on the model first")
    command.add_argument(
        "--in", dest="within", metavar="PIPELINE", help="run the passes of this pipeline that stand before PASS first"
    )
    command.add_argument(
        "--limit",
        type=count,
        default=4,
        metavar="K",
        help="show at most K kinds of near misses, 0 for all (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print the whole report as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the near misses, nearest first; the model is not written."""
    from passopt.api.why import why
    from passopt.terminal.console import print_json
    from passopt.terminal.flags import with_flags

    found = why(options.name, options.model, node=options.node, after=options.after, within=options.within)
    if options.json:
        print_json(found.to_json())
    else:
        print(with_flags(found.to_text(options.limit), options.flags))
    return 0
