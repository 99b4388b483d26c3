"""Evaluate models side by side: `passopt eval MODEL… --text FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from passopt.ir.errors import UsageError
from passopt.terminal.arguments import count, positive

SUMMARY = "Measure models on texts and questions: perplexity, KL divergence from a reference, accuracy."
EXAMPLE = """passopt eval fp32 fp32/model.int8 compiled --text wiki.txt --plot quality.svg
  passopt eval int8 --reference fp32 --c4 c4-validation.00000-of-00008.json.gz --cache kept
  passopt eval fp32 int8 --ceval ceval-exam.zip --limit 20
  passopt eval compiled --choices arc_easy.jsonl --json"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="model to measure: model.onnx, a folder, a folder of ranks, or a compiled folder; the first one is the "
        "reference",
    )
    command.add_argument("--reference", metavar="MODEL", help="compare the models with this one")
    for name, holder, meaning in (
        ("--text", "FILE", "measure on this UTF-8 text"),
        ("--c4", "FILE", "measure on a file of C4 (.json.gz)"),
        ("--data", "[FORMAT:]FILE", "measure on a set in another format that calibration reads, such as alpaca:FILE"),
        ("--choices", "FILE", "ask the multiple-choice questions of JSON lines"),
    ):
        command.add_argument(name, metavar=holder, action="append", default=[], help=f"{meaning}; may be repeated")
    command.add_argument("--ceval", metavar="ZIP", help="ask the questions of C-Eval in ceval-exam.zip")
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer: a folder, tokenizer.json or tokenizer.model (default: beside the reference)",
    )
    command.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help="let models read N tokens of a text at once (default: 2048, or all positions where there are fewer)",
    )
    command.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="begin a window every N tokens, and count only tokens that no window before has counted (default: "
        "disjoint windows)",
    )
    command.add_argument(
        "--bos", action="store_true", help="begin every window with the ids that begin a text, such as that of <s>"
    )
    command.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        default=32768,
        help="use at most N tokens from the beginning of each text (default: %(default)s)",
    )
    command.add_argument(
        "--split", choices=("dev", "val", "test"), default="val", help="split of C-Eval to ask (default: %(default)s)"
    )
    command.add_argument(
        "--shots", type=count, metavar="N", default=5, help="examples before a question of C-Eval (default: 5)"
    )
    command.add_argument(
        "--limit", type=positive, metavar="N", help="ask at most N questions of each subject or file (default: all)"
    )
    command.add_argument(
        "--cache",
        metavar="DIR",
        help="keep the reference's predictions in DIR for the next evaluation; an interrupted one goes on from there",
    )
    command.add_argument(
        "--cache-dtype",
        choices=("fp16", "fp32"),
        default="fp16",
        help="number type in which the reference's predictions are kept (default: %(default)s)",
    )
    command.add_argument("--threads", type=positive, metavar="N", help="use N threads (default: one per core)")
    command.add_argument(
        "--plot", metavar="FILE.svg", help="draw KL divergence against the bytes of the weights into this file"
    )
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the figures; the plot is written last, and only as a whole."""
    from passopt.api.evaluate import evaluate
    from passopt.ir.atomic_folders import write_whole
    from passopt.terminal.console import Console, print_json

    if options.plot is not None:
        _check_plot(options)
    report = evaluate(
        options.models,
        reference=options.reference,
        text=options.text,
        c4=options.c4,
        data=options.data,
        ceval=options.ceval,
        choices=options.choices,
        tokenizer=options.tokenizer,
        window=options.window,
        stride=options.stride,
        bos=options.bos,
        max_tokens=options.max_tokens,
        split=options.split,
        shots=options.shots,
        limit=options.limit,
        cache=options.cache,
        cache_dtype=options.cache_dtype,
        threads=options.threads,
        reporter=Console(options.command),
    )
    if options.json:
        print_json(report.to_json(), ensure_ascii=False)
    else:
        print(report)
    if options.plot is not None:
        write_whole(Path(options.plot), report.to_svg())
    return 0


def _check_plot(options: argparse.Namespace) -> None:
    """Refuse a plot that could not be drawn or written, before anything runs."""
    from passopt.evaluation.report import check_plot

    models = len(options.models) + (options.reference is not None)
    check_plot(models, len([*options.text, *options.c4, *options.data]))
    if not Path(options.plot).absolute().parent.is_dir():
        raise UsageError(f"{options.plot}: there is no such folder for `plot`; make it first")
