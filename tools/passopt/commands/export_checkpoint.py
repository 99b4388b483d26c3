"""Write a quantised checkpoint for other tools: `passopt export-checkpoint CHECKPOINT --codes DIR -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, streaming

SUMMARY = "Write codes as a quantised checkpoint, compressed-tensors or GPTQ, that other tools load."
EXAMPLE = "passopt export-checkpoint Baichuan2-7B-Base --codes calib --format gptq -o Baichuan2-7B-Base-GPTQ"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of the float checkpoint from which the codes were made, or of a quantised one to change its "
        "format",
    )
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder to write the checkpoint to")
    command.add_argument(
        "--codes",
        metavar="DIR",
        help="calibration folder, or folder of a model that int8 or int4 quantised (default: the codes of CHECKPOINT)",
    )
    command.add_argument(
        "--format",
        choices=["int-quantized", "pack-quantized", "gptq"],
        default="int-quantized",
        help="write compressed-tensors with a code per byte or four in a word, or GPTQ (default: %(default)s)",
    )
    command.add_argument(
        "--activations",
        choices=["none", "dynamic"],
        default="none",
        help="dynamic asks loaders to quantise activations per token, too; for int-quantized (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=["fp16", "fp32", "bf16"],
        help="number type of scales and other tensors (default: that of the scales; fp16 for gptq)",
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Write the checkpoint, and print what is in it."""
    from passopt.api.export_checkpoint import export_checkpoint
    from passopt.terminal.console import Console, print_json

    result = export_checkpoint(
        options.checkpoint,
        options.output,
        codes=options.codes,
        format=options.format,
        activations=options.activations,
        dtype=options.dtype,
        reporter=Console(options.command),
        **streaming(options),
    )
    if options.json:
        print_json(result.to_json())
    else:
        print(result)
    return 0
