"""`passopt run`: a pipeline over a model, written out when whole."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import onnx_ir

from passopt import __version__
from passopt.commands.writing import write_with_progress
from passopt.ir.errors import ExpectationError, ModelError, PassoptError, UsageError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.serialization.model_files import load_model, model_path
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.sources import identify
from passopt.ir.weights.streaming.write_weights import StreamReport
from passopt.passes.framework.records import PassRecord
from passopt.passes.framework.rewrite_limit import RewriteLimit, set_rewrite_limit
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.pipeline.expectations import parse_expectation, unwatched_misses
from passopt.passes.pipeline.instruments import Dump, PrintAfter, rule_table, summary_table
from passopt.passes.pipeline.runner import Instrument, run_passes
from passopt.passes.pipeline.text import Resolved, Step, resolve
from passopt.targets.folders.manifest import read_manifest
from passopt.targets.folders.output import OutputFacts, OutputPlan, plan_output, write_reference_output
from passopt.verification.reproducer import Position, free_name, write_reproducer

#: What --stop-after adds to the name of the output.
_UNTIL = "until-"


def run(options: argparse.Namespace) -> int:
    """Load, transform, write."""
    pipeline = stopped_after(resolve(options.passes), options.stop_after)
    limit = RewriteLimit(options.rewrite_limit) if options.rewrite_limit is not None else None
    if limit is not None:  # what a pipeline expects of a whole run does not hold of its beginning
        pipeline = dataclasses.replace(pipeline, expectations=())
    names = [item.name for item in pipeline.passes]
    expectations = [parse_expectation(text, names) for text in (*pipeline.expectations, *options.expect)]
    path = model_path(Path(options.model))
    output = Path(options.output) if options.output else path.parent / output_name(path, pipeline, limit)
    _check_options(options, output)
    model = load_model(path)
    if limit is not None:
        set_rewrite_limit(model, limit)
    position = Position()
    try:
        records = run_passes(
            model,
            pipeline.passes,
            verify=options.verify_each != "off",
            instruments=[position, *_instruments(options, names)],
            expectations=expectations,
            time_rules=options.stats is not None,
        )
    except (UsageError, ExpectationError):
        raise
    except PassoptError as error:
        if position.index is not None:
            _reproduce(options, path, output, pipeline, position.index, error)
        raise
    if limit is not None:
        _to_stderr(f"passopt run: {limit}\n")
    for name in [] if limit is not None else unwatched_misses(pipeline.passes, expectations, records, model):
        command = f"passopt why {name} {path} --in {shlex.quote(options.passes)}"
        _to_stderr(f"passopt run: {name} matched nothing; what came near: {command}\n")
    if options.emit == "text":
        print(print_model(model), end="")
        _to_stderr(summary_table(records, times=options.time_passes) + "\n")
        return 0
    source = {"model": path.name, **_identity(path)}
    facts: OutputFacts = {
        "version": __version__,
        "pipeline": pipeline.expanded + (f" # rewrite-limit={limit.limit}" if limit is not None else ""),
        "source": source,
        "companions": path.parent,
    }
    plan = plan_output(model, **facts)
    if options.dry_run:
        return _report(options, records, plan, None, model)
    written = None
    if options.weights == "reference":
        write_reference_output(model, output, **facts)
    else:
        written = write_with_progress(model, output, plan, facts, options)
    return _report(options, records, plan, output, model, written)


def _check_options(options: argparse.Namespace, output: Path) -> None:
    if options.emit == "text" and (options.output or options.json or options.stats):
        raise UsageError("--emit=text prints the model on stdout and nothing else; drop -o, --json and --stats")
    if output.exists() and not options.dry_run and options.emit == "files":
        raise UsageError(f"{output}: output exists. Name another with -o, or remove it first; nothing was written.")
    if options.reproducer and Path(options.reproducer).exists():
        raise UsageError(f"{options.reproducer}: exists. Name a new folder for --reproducer")


def _reproduce(
    options: argparse.Namespace, path: Path, output: Path, pipeline: Resolved, index: int, error: PassoptError
) -> None:
    """Write a reproducer and say so in the error: the passes before the failing one run again, on the model as read."""
    if options.reproducer:
        folder = Path(options.reproducer)
    elif options.dry_run or options.emit == "text":
        return  # runs that write nothing leave nothing behind
    else:
        folder = free_name(output.with_name(f"{output.name}.reproducer"))
    try:
        model = load_model(path)
        limit = RewriteLimit(options.rewrite_limit) if options.rewrite_limit is not None else None
        if limit is not None:
            set_rewrite_limit(model, limit)
        run_passes(model, pipeline.passes[:index], verify=False)
        rest = None if limit is None else limit.limit - limit.used
        write_reproducer(folder, model, pipeline.passes[index:], error, options.verify_each, rest)
    except PassoptError as other:
        note = f"no reproducer was written: {other}"
    else:
        note = f"run it again with: passopt replay {folder}"
    error.args = (f"{error}\n{note}",)


def _identity(path: Path) -> dict[str, object]:
    """Size and digest of the model file, and the root digest of its weights where a manifest of ours names it."""
    file = identify(path)
    weights: str | None = None
    with contextlib.suppress(ModelError):  # a manifest.json of another tool is none of our business
        weights = read_manifest(path.parent).root
    return {"size": file.size, "header_digest": file.header_digest, "weights": weights}


def stopped_after(pipeline: Resolved, name: str | None) -> Resolved:
    """The pipeline up to the first `name`, with the expectations of what runs whole. Raises UsageError without it."""
    if name is None:
        return pipeline
    names = [item.name for item in pipeline.passes]
    if name not in names:
        raise UsageError("--stop-after: " + unknown_name("pass of this pipeline", name, names))
    count = names.index(name) + 1
    whole = set(names[:count]) - set(names[count:])
    kept = tuple(text for text in pipeline.expectations if parse_expectation(text, names).name in whole)
    step = Step(f"{_UNTIL}{name}")
    return dataclasses.replace(
        pipeline, steps=(*pipeline.steps, step), passes=pipeline.passes[:count], expectations=kept
    )


def output_name(path: Path, pipeline: Resolved, limit: RewriteLimit | None = None) -> str:
    """model.onnx and `tp{degree=4},int8` → model.tp4.int8."""
    parts = []
    for step in pipeline.steps:
        known = [] if step.name.startswith(_UNTIL) else resolve(str(step)).passes
        parts.append(step.name + "".join(str(item.degree) for item in known if hasattr(item, "degree")))
    return ".".join([path.stem, *parts, *([f"limit-{limit.limit}"] if limit is not None else [])])


def _instruments(options: argparse.Namespace, known: list[str]) -> list[Instrument]:
    found: list[Instrument] = []
    if options.print_after is not None:
        names = tuple(name for name in options.print_after if name)
        for name in names:
            if name not in known:
                raise UsageError("--print-after: " + unknown_name("pass of this pipeline", name, known))
        found.append(PrintAfter(_to_stderr, names if len(names) == len(options.print_after) else ()))
    if options.print_after_change:
        found.append(PrintAfter(_to_stderr, only_changes=True))
    if options.verify_each == "numeric":
        from passopt.verification.rewrites.check import NumericCheck

        found.append(NumericCheck())
    if options.dump_dir:
        directory = Path(options.dump_dir)
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f"{directory}: is not empty; name a new folder for --dump-dir")
        found.append(Dump(directory))
    return found


def _to_stderr(text: str) -> None:
    print(text, end="", file=sys.stderr)


def _report(
    options: argparse.Namespace,
    records: list[PassRecord],
    plan: OutputPlan,
    output: Path | None,
    model: onnx_ir.Model,
    written: StreamReport | None = None,
) -> int:
    if options.json or options.stats == "json":
        body = {
            "passes": [record.as_json() for record in records],
            "output": str(output) if output else None,
            "degree": degree_of(model),
            **plan.to_json(),
            "stream": written.to_json() if written is not None else None,
        }
        print(json.dumps(body, indent=2))
        return 0
    print(summary_table(records, times=options.time_passes))
    if options.stats:
        print(f"\n{rule_table(records)}")
    for record in records:
        for note in record.result.notes:
            print(f"{record.name}: {note}")
        if record.numeric is not None:
            print(f"{record.name}: {record.numeric['summary']}")
    if output is None or options.weights == "copy":
        print(plan.to_text())
    print(f"→ {output}" if output else "dry run: nothing was written")
    return 0
