"""Export a checkpoint: `passopt export CHECKPOINT -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, streaming

SUMMARY = "Export a stock Hugging Face checkpoint, its code unmodified, to model.onnx."
EXAMPLE = "passopt export Baichuan2-7B-Base -o baichuan2 --dtype fp16 --trust-remote-code"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, code and weights")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder for model.onnx and weights")
    command.add_argument(
        "--dtype",
        choices=["fp16", "fp32", "bf16"],
        default="fp16",
        help="number type of the weights (default: %(default)s)",
    )
    command.add_argument(
        "--alibi",
        choices=["formula", "baked"],
        default="formula",
        help="write ALiBi as slopes, or as a constant mask (default: %(default)s)",
    )
    command.add_argument(
        "--opset",
        type=int,
        choices=range(18, 24),
        metavar="N",
        help="18 to 23 (default: 21, or 20 by torchscript, which writes no newer one); int8 of 16-bit weights needs 19",
    )
    command.add_argument(
        "--exporter",
        choices=["dynamo", "torchscript"],
        default="dynamo",
        help="torch's exporter (default: %(default)s); torchscript runs the model once, with all weights in memory",
    )
    command.add_argument(
        "--attention",
        choices=["eager", "sdpa"],
        help="which implementation of transformers is traced (default: eager); not for code of the checkpoint",
    )
    command.add_argument(
        "--phase",
        choices=["merged", "prefill", "decode"],
        default="merged",
        help="one graph for everything, for a prefill without past, or for single tokens (default: %(default)s)",
    )
    command.add_argument(
        "--weights",
        choices=["copy", "reference"],
        default="copy",
        help="copy weights into the output, or only refer to where they lie (default: %(default)s)",
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own Python files")
    command.add_argument("--no-self-check", action="store_true", help="skip the comparison with eager torch")
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Export, and print the graph's size and the self-check."""
    from passopt.api.export import export
    from passopt.terminal.console import Console

    result = export(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        alibi=options.alibi,
        opset=options.opset,
        exporter=options.exporter,
        attention=options.attention,
        phase=options.phase,
        weights=options.weights,
        trust_remote_code=options.trust_remote_code,
        self_check=not options.no_self_check,
        reporter=Console(options.command),
        **streaming(options),
    )
    print(result)
    return 0
