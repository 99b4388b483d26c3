"""Export a checkpoint: `passopt export CHECKPOINT -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, streaming

SUMMARY = "Export a stock Hugging Face checkpoint, its code unmodified, to model.onnx."
EXAMPLE = "passopt export Baichuan2-7B-Base -o baichuan2 --dtype fp16 --trust-remote-code"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder with config.json, the model's code and its weights, also quantised ones; or FILE.gguf of a "
        "decoder like Llama",
    )
    command.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="new folder to write model.onnx and the weights to"
    )
    command.add_argument(
        "--dtype",
        choices=["fp16", "fp32", "bf16"],
        default="fp16",
        help="number type of the weights in the graph (default: %(default)s)",
    )
    command.add_argument(
        "--alibi",
        choices=["formula", "baked"],
        default="formula",
        help="write the ALiBi biases as a formula of slopes, or as a large constant mask (default: %(default)s)",
    )
    command.add_argument(
        "--opset",
        type=int,
        choices=range(18, 24),
        metavar="N",
        help="opset of the graph, 18 to 23 (default: 21, or 20 with torchscript, which writes no newer one); int8 of "
        "16-bit weights needs at least 19",
    )
    command.add_argument(
        "--exporter",
        choices=["dynamo", "torchscript"],
        default="dynamo",
        help="exporter of torch to use; torchscript runs the model once, with all weights in memory "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--attention",
        choices=["eager", "sdpa"],
        help="attention of transformers to trace (default: eager); not for models whose code is in the checkpoint",
    )
    command.add_argument(
        "--phase",
        choices=["merged", "prefill", "decode"],
        default="merged",
        help="write one graph for everything, one for a prefill without past, or one for decoding single tokens "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--weights",
        choices=["copy", "reference"],
        default="copy",
        help="copy weights into the output, or only refer to the checkpoint's files (default: %(default)s)",
    )
    command.add_argument(
        "--dequantize",
        action="store_true",
        help="write the weights of a checkpoint that was quantised elsewhere as floats, instead of keeping its codes",
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own Python files; read them first"
    )
    command.add_argument(
        "--no-self-check",
        action="store_true",
        help="skip the self-check, which exports a small model of the same class and compares it with eager torch",
    )
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Export the checkpoint, and print the size of the graph and the result of the self-check."""
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
        dequantize=options.dequantize,
        trust_remote_code=options.trust_remote_code,
        self_check=not options.no_self_check,
        reporter=Console(options.command),
        **streaming(options),
    )
    print(result)
    return 0
