"""Compare two models: `passopt verify A B`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import positive, tolerance

SUMMARY = "Compare two models in onnxruntime: prefill, left padding, decode with cache, chunked prefill."
EXAMPLE = "passopt verify model.onnx model.tp2.int8 --text corpus.txt"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("reference", metavar="A", help="the original: model.onnx or a folder")
    command.add_argument(
        "candidate", metavar="B", help="the result: model.onnx, a folder, a folder of ranks, or a compiled folder"
    )
    command.add_argument("--text", metavar="FILE", help="also compare perplexity on this text")
    command.add_argument(
        "--tokenizer", metavar="PATH", help="a folder, tokenizer.json or tokenizer.model (default: beside A)"
    )
    command.add_argument(
        "--max-tokens", type=positive, default=2048, help="tokens of the text that are used (default: %(default)s)"
    )
    command.add_argument("--tolerance", type=tolerance, help="largest relative error (default: by number type)")
    command.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: %(default)s)")
    command.add_argument(
        "--max-positions",
        type=positive,
        help="longest sequence to run (default: the length of the tables of positions)",
    )
    command.add_argument("--layerwise", action="store_true", help="run one decoder layer at a time, in little memory")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the report; exit 1 if anything is beyond its tolerance."""
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
        reporter=Console(options.command),
    )
    if options.json:
        print_json(report.to_json())
    else:
        print(report)
    if not report.ok:
        raise CheckError(f"{options.candidate} is not equivalent to {options.reference} within the tolerances above")
    return 0
