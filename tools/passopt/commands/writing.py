"""Weights to disk from the command line: options of memory and workers, a bar, and what it took."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx_ir

from passopt.commands.progress import Progress
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.write_weights import StreamReport
from passopt.targets.folders.output import OutputFacts, OutputPlan, write_output

#: Shorter writes need no account on stderr.
_REPORTED_FROM = 64 << 20


def stream_options(options: argparse.Namespace) -> StreamOptions:
    """What --memory and --workers say."""
    return StreamOptions(options.memory, options.workers)


def write_with_progress(
    model: onnx_ir.Model, output: Path, plan: OutputPlan, facts: OutputFacts, options: argparse.Namespace
) -> StreamReport:
    """`write_output` with a bar, and afterwards time, memory, and every tensor that overflowed fp16, on stderr."""
    progress = Progress(f"writing {output.name}", plan.nbytes)
    try:
        report = write_output(model, output, progress=progress, stream=stream_options(options), **facts).stream
    finally:
        progress.close()
    for name, count in report.overflows.items():
        print(f"warning: {name}: {count} values overflow fp16 and became infinite", file=sys.stderr)
    say_report(report, options.command)
    return report


def say_report(report: StreamReport, command: str) -> None:
    """One line on stderr for writes that took their time."""
    if report.written + report.resumed >= _REPORTED_FROM:
        print(f"passopt {command}: {report.to_text()}", file=sys.stderr)
