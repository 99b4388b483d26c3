"""Calibrate a model: `passopt calibrate MODEL --data FILE -o CALIB`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import positive, tolerance

SUMMARY = "Run a decoder on calibration data layer by layer, and write codes and statistics for int8{from=CALIB}."
EXAMPLE = """passopt calibrate baichuan2 --data 'c4:c4-train.00000-of-01024.json.gz*2' --data ceval-exam.zip -o calib
  passopt run baichuan2 --passes 'baichuan2,int8{from=calib}'"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx or its folder")
    command.add_argument("-o", "--output", metavar="CALIB", required=True, help="new folder to write to")
    command.add_argument(
        "--data",
        metavar="FORMAT:FILE*WEIGHT",
        action="append",
        default=[],
        help="calibration set from a local file; may be repeated. FORMAT is c4, ceval, alpaca, text or messages "
        "(default: found from the file), WEIGHT its share of the windows (default: 1)",
    )
    command.add_argument(
        "--passes", metavar="PIPELINE", help="passes to run before: those that stand before int8 later"
    )
    command.add_argument(
        "--collect",
        metavar="WHAT",
        default="inputs,cache,codes",
        help="collect these, separated by commas: inputs of linears, cache (keys and values), codes (default: all)",
    )
    command.add_argument(
        "--method",
        choices=["gptq", "rtn", "mse"],
        default="gptq",
        help="make codes by GPTQ, by rounding to the nearest, or with scales of least squared error; the last two "
        "need no data (default: %(default)s)",
    )
    command.add_argument(
        "--bits",
        type=int,
        choices=[8, 4],
        default=8,
        help="bits of a code: 8 for int8{from=CALIB}, 4 for int4{from=CALIB} (default: %(default)s)",
    )
    command.add_argument(
        "--group",
        type=int,
        choices=[128, 64, 32],
        default=0,
        help="inputs that share a scale, for 4 bits",
    )
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer: a folder, tokenizer.json or tokenizer.model (default: beside MODEL)",
    )
    command.add_argument(
        "--nsamples", type=positive, default=32, help="number of windows of tokens (default: %(default)s)"
    )
    command.add_argument(
        "--seqlen", type=positive, help="tokens of a window (default: 512, or what the model takes if that is less)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the choice of windows (default: %(default)s)")
    command.add_argument(
        "--damp",
        type=tolerance,
        default=0.1,
        help="damping of GPTQ, as a part of the mean of the Hessian's diagonal (default: %(default)s)",
    )
    command.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="round the columns of a weight by falling activity",
    )
    command.add_argument(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let every linear see what the codes of those before it make, and not the original weights",
    )
    command.add_argument("--embedding", action="store_true", help="make codes of the embedding, too")
    command.add_argument("--head", action="store_true", help="make codes of the head, too")
    command.add_argument("--threads", type=positive, metavar="N", help="use N threads (default: one per core)")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def main(options: argparse.Namespace) -> int:
    """Calibrate, and print what was measured and made."""
    from passopt.api.calibrate import calibrate
    from passopt.terminal.console import Console, print_json

    result = calibrate(
        options.model,
        options.output,
        data=options.data,
        passes=options.passes,
        collect=options.collect,
        method=options.method,
        bits=options.bits,
        group=options.group,
        tokenizer=options.tokenizer,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        seed=options.seed,
        damp=options.damp,
        act_order=options.act_order,
        true_sequential=options.true_sequential,
        embedding=options.embedding,
        head=options.head,
        threads=options.threads,
        reporter=Console(options.command),
    )
    if options.json:
        print_json(result.to_json())
    else:
        print(result)
    return 0
