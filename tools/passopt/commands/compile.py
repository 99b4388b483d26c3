"""Compile a model to native code: `passopt compile MODEL -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, named_or_all, streaming

SUMMARY = "Compile a fused model, or the models of all ranks, to native code with weights laid out for its kernels."
EXAMPLE = "passopt compile model.onnx --passes baichuan2,slice-last-token,int8 -o compiled"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx, its folder, or a folder of ranks")
    command.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="new folder to write the code and the weights to"
    )
    command.add_argument(
        "--passes", metavar="PIPELINE", help="run these passes on the model first; their result is not written"
    )
    command.add_argument(
        "--target",
        choices=["llvm", "cuda"],
        default="llvm",
        help="compile for CPUs (llvm) or for NVIDIA GPUs (cuda), which cannot be run yet (default: %(default)s)",
    )
    command.add_argument(
        "--arch", default="sm_80", help="with --target=cuda: architecture of the GPU (default: %(default)s)"
    )
    command.add_argument(
        "--mcpu", default="native", help="compile for this CPU, by LLVM's name of it (default: the CPU of this machine)"
    )
    command.add_argument(
        "--allow-fallback",
        action="store_true",
        help="where there is no native kernel, use TVM's own slower code instead of stopping; such nodes are listed",
    )
    command.add_argument(
        "--print-after",
        metavar="STEP",
        nargs="?",
        const="",
        action="append",
        help="print TVM's Relax module to stderr after STEP of the compiler, or after every step if none is named",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Compile the model, and print the kernels that were compiled."""
    from passopt.api.compile import compile
    from passopt.terminal.console import Console, print_json

    console = Console(options.command)
    result = compile(
        options.model,
        options.output,
        passes=options.passes,
        target=options.target,
        arch=options.arch,
        mcpu=options.mcpu,
        allow_fallback=options.allow_fallback,
        print_after=named_or_all(options.print_after),
        reporter=console,
        **streaming(options),
    )
    console.say_stream(result.stream)
    if options.json:
        print_json(result.to_json())
    else:
        print(result)
    return 0
