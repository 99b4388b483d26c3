"""Run a pipeline over a model and write the result: `passopt run MODEL --passes P`."""

from __future__ import annotations

import argparse

from passopt.terminal.arguments import add_streaming, count, named_or_all, streaming

SUMMARY = "Run a pipeline of passes over a model and write the result, one folder per rank if it is sharded."
EXAMPLE = "passopt run model.onnx --passes 'tp{degree=4},int8' --time-passes"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("model", metavar="MODEL", help="model.onnx, its folder, or graph.onnxtxt")
    command.add_argument(
        "--passes",
        metavar="PIPELINE",
        required=True,
        help="passes and pipelines to run, such as 'tp{degree=4},int8'; passopt list shows all",
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="new folder to write the result to (default: beside the model, named by the pipeline)",
    )
    command.add_argument(
        "--emit",
        choices=["files", "text"],
        default="files",
        help="write files, or only print the canonical text of the result on stdout (default: %(default)s)",
    )
    command.add_argument(
        "--weights",
        choices=["copy", "reference"],
        default="copy",
        help="copy weights into the output, or only refer to the files that hold them (default: %(default)s)",
    )
    command.add_argument(
        "--verify-each",
        choices=["off", "structure", "numeric"],
        default="structure",
        help="check the structure of the graph after every pass; numeric also runs each rewrite on sampled inputs, "
        "before and after (default: %(default)s)",
    )
    command.add_argument(
        "--print-after",
        metavar="PASS",
        nargs="?",
        const="",
        action="append",
        help="print the graph to stderr after PASS, or after every pass if none is named",
    )
    command.add_argument(
        "--print-after-change",
        action="store_true",
        help="print the graph to stderr after every pass that changed its text",
    )
    command.add_argument(
        "--dump-dir", metavar="DIR", help="save the model after every pass in this new folder, without its weights"
    )
    command.add_argument("--time-passes", action="store_true", help="print the CPU time of every pass")
    command.add_argument(
        "--stats",
        choices=["table", "json"],
        nargs="?",
        const="table",
        help="print how often every rule was tried, matched and declined, and its CPU time",
    )
    command.add_argument(
        "--stop-after",
        metavar="PASS",
        help="end the pipeline after the first run of PASS, and write the model as it is then",
    )
    command.add_argument(
        "--rewrite-limit",
        type=count,
        metavar="N",
        help="apply only the first N rewrites; a whole-graph pass counts as one",
    )
    command.add_argument(
        "--expect",
        metavar="PASS==N",
        action="append",
        default=[],
        help="exit with 4 unless PASS matches N times; may be repeated",
    )
    command.add_argument(
        "--reproducer",
        metavar="DIR",
        help="new folder for a reproducer, which is written if a pass fails (default: beside the output)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="write nothing, but print the exact bytes that the output would have"
    )
    add_streaming(command)
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def main(options: argparse.Namespace) -> int:
    """Run the passes, write the result, and print what the passes did."""
    from passopt.api.model import print_text
    from passopt.api.run import default_output, run
    from passopt.ir.errors import UsageError
    from passopt.terminal.console import Console, print_json

    as_text = options.emit == "text"
    if as_text and (options.output or options.json or options.stats):
        raise UsageError("--emit=text prints the model on stdout and nothing else; drop -o, --json and --stats")
    console = Console(options.command)
    output = options.output or default_output(
        options.model, options.passes, stop_after=options.stop_after, rewrite_limit=options.rewrite_limit
    )
    result = run(
        options.model,
        options.passes,
        None if as_text else output,
        weights=options.weights,
        dry_run=options.dry_run,
        expect=options.expect,
        stop_after=options.stop_after,
        rewrite_limit=options.rewrite_limit,
        verify_each=options.verify_each,
        print_after=named_or_all(options.print_after),
        print_after_change=options.print_after_change,
        dump_dir=options.dump_dir,
        time_rules=options.stats is not None,
        reproducer=options.reproducer,
        reporter=console,
        **streaming(options),
    )
    if as_text:
        from passopt.passes.pipeline.instruments import summary_table

        print(print_text(result.model), end="")
        console.show(summary_table(result.records, times=options.time_passes) + "\n")
        return 0
    console.say_stream(result.stream)
    if options.json or options.stats == "json":
        print_json(result.to_json())
    else:
        print(result.to_text(times=options.time_passes, rules=options.stats is not None))
    return 0
