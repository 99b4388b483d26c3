"""Compare two models: `passopt verify A B`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import positive, tolerance

SUMMARY = "Compare two models on the same inputs: decoders in prefill and decoding, other graphs on sampled inputs."
EXAMPLE = "passopt verify model.onnx model.tp2.int8 --text corpus.txt"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("reference", metavar="A", help="original model: model.onnx or a folder")
    command.add_argument(
        "candidate", metavar="B", help="model to check: model.onnx, a folder, a folder of ranks, or a compiled folder"
    )
    command.add_argument("--text", metavar="FILE", help="compare the perplexity on this UTF-8 text too")
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer for the text: a folder, tokenizer.json or tokenizer.model (default: beside A)",
    )
    command.add_argument(
        "--max-tokens",
        type=positive,
        default=2048,
        help="use at most this many tokens from the beginning of the text (default: %(default)s)",
    )
    command.add_argument(
        "--tolerance",
        type=tolerance,
        help="largest relative error of outputs that is allowed (default: by number type)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: %(default)s)")
    command.add_argument(
        "--max-positions",
        type=positive,
        help="length of the longest sequence to run, in tokens (default: what the models' tables of positions hold)",
    )
    command.add_argument(
        "--layerwise",
        action="store_true",
        help="run one decoder layer at a time, so that only one layer's weights are in memory",
    )
    command.add_argument(
        "--input",
        dest="inputs",
        metavar="FILE",
        help="run both models on the arrays of this .npz file, one for each input by name (default: sampled inputs)",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the report; raise CheckError, which exits with 1, if anything is beyond its tolerance."""
    from passopt.api.verify import verify
    from passopt.ir.errors import CheckError
    from passopt.terminal.console import Console, print_json

    report = verify(
        options.reference,
        options.candidate,
        text=options.text or None,
        tokenizer=options.tokenizer,
        max_tokens=options.max_tokens,
        tolerance=options.tolerance,
        seed=options.seed,
        max_positions=options.max_positions,
        layerwise=options.layerwise,
        inputs=options.inputs,
        reporter=Console(options.command),
    )
    if options.json:
        print_json(report.to_json())
    else:
        print(report)
    if not report.ok:
        if report.lossy:
            raise CheckError(
                f"{options.candidate} differs from {options.reference} by more than is declared: see above"
            )
        raise CheckError(f"{options.candidate} is not equivalent to {options.reference} within the tolerances above")
    return 0
