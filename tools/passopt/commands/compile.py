"""Compile a model to native code: `passopt compile MODEL -o DIR`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, named_or_all, streaming

SUMMARY = "Compile a fused model, or the models of all ranks, to native code, weights laid out for its kernels."
EXAMPLE = "passopt compile model.onnx --passes baichuan2,slice-last-token,int8 -o compiled"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx, its folder, or a folder of ranks")
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="new folder for code and weights")
    command.add_argument("--passes", metavar="PIPELINE", help="run these passes first, in memory")
    command.add_argument("--target", choices=["llvm", "cuda"], default="llvm", help="default: %(default)s")
    command.add_argument("--arch", default="sm_80", help="architecture of the GPU, for cuda (default: %(default)s)")
    command.add_argument("--mcpu", default="native", help="LLVM's name of the CPU (default: this machine's)")
    command.add_argument(
        "--allow-fallback", action="store_true", help="use TVM's own code where there is no native kernel"
    )
    command.add_argument(
        "--print-after",
        metavar="STEP",
        nargs="?",
        const="",
        action="append",
        help="print the Relax module after STEP, or after every step",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_streaming(command)


def main(options: argparse.Namespace) -> int:
    """Compile, and print the kernels."""
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
