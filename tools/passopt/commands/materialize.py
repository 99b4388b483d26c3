"""Write a model that only refers to its weights, together with its weights: `passopt materialize DIR -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, streaming

SUMMARY = "Write a model that only refers to its weights (--weights=reference, --dump-dir) together with its weights."
EXAMPLE = "passopt materialize dump/03-shard -o model.sharded"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="DIR", help="folder with model.onnx and weights.plan.json")
    command.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="new folder to write the model and all its weights to"
    )
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Write the model, and print the bytes of its files."""
    from passopt.api.model import save
    from passopt.terminal.console import Console

    console = Console(options.command)
    result = save(options.model, options.output, reporter=console, **streaming(options))
    console.say_stream(result.stream)
    print(result)
    return 0
