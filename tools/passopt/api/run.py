"""Run a pipeline of passes over a model, and write the result: `passopt.run`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from passopt.api import checked
from passopt.api.model import Model, ModelLike, changeable, refuse_existing, write
from passopt.ir.errors import CalibrationError, ExpectationError, ModelError, PassoptError, UsageError
from passopt.ir.graph.run_context import RewriteLimit
from passopt.ir.serialization.model_files import model_path
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.write_weights import StreamReport
from passopt.passes.framework.records import PassRecord
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.pipeline.as_pipeline import PassesLike, as_pipeline
from passopt.passes.pipeline.attention_sites import unfused_attentions
from passopt.passes.pipeline.expectations import parse_expectation, unwatched_misses
from passopt.passes.pipeline.instruments import Dump, PrintAfter, rule_table, summary_table
from passopt.passes.pipeline.runner import Instrument, run_passes
from passopt.passes.pipeline.text import Resolved, Step, resolve
from passopt.reporting.reporter import SILENT, Reporter
from passopt.reporting.result import Result, html_table
from passopt.targets.folders.output import Output, OutputSizes
from passopt.verification.reproducer import Position, free_name, write_reproducer

VerifyEach = Literal["off", "structure", "numeric"]
#: The prefix of the step that `stop_after` adds to a pipeline, and so to the name of the output.
_UNTIL = "until-"
#: The pass after which it is said which attentions are left.
FUSE_ATTENTION = "fuse-attention"


@dataclasses.dataclass(frozen=True, repr=False)
class RunResult(Result):
    """The result of a pipeline.

    Attributes:
        model: The model after the passes.
        records: One record per pass, in their order: counts, CPU seconds, nodes before and after, notes.
        output: The folder that was written; None if nothing was.
        stream: How the weights were written; None if they were not copied.
        planned: The output as it was written or would be written.
        dry_run: True if nothing was to be written.
    """

    model: Model
    records: tuple[PassRecord, ...]
    output: Path | None
    stream: StreamReport | None
    planned: Output = dataclasses.field(repr=False)
    dry_run: bool = False

    @property
    def sizes(self) -> OutputSizes:
        """Return the exact bytes of the output, also if it was not written; no weight is read for that."""
        return self.planned.sizes

    def to_text(self, *, times: bool = False, rules: bool = False) -> str:
        """Return a table of the passes, their notes, and the files that were written.

        Args:
            times: Add the CPU time of every pass.
            rules: Add a table of the rules: tries, hits, declines and CPU time.
        """
        lines = [summary_table(self.records, times=times)]
        if rules:
            lines.append(f"\n{rule_table(self.records)}")
        for record in self.records:
            lines += [f"{record.name}: {note}" for note in record.result.notes]
            if record.numeric is not None:
                lines.append(f"{record.name}: {record.numeric['summary']}")
        if self.output is None or self.stream is not None:
            lines.append(self.sizes.to_text())
        nothing = "dry run: nothing was written" if self.dry_run else "nothing was written: no output was named"
        lines.append(f"→ {self.output}" if self.output else nothing)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "passes": [record.to_json() for record in self.records],
            "output": str(self.output) if self.output else None,
            "degree": self.model.degree,
            **self.sizes.to_json(),
            "stream": self.stream.to_json() if self.stream is not None else None,
        }

    def _repr_html_(self) -> str:
        """Return a table of the passes for notebooks."""
        rows = [
            (
                record.name,
                record.result.matches,
                sum(record.result.declines.values()),
                record.nodes_before,
                record.nodes_after,
            )
            for record in self.records
        ]
        return html_table(("pass", "matched", "declined", "nodes before", "nodes after"), rows)


def run(
    model: ModelLike,
    passes: PassesLike,
    output: Path | str | None = None,
    *,
    weights: Literal["copy", "reference"] = "copy",
    dry_run: bool = False,
    expect: str | Sequence[str] = (),
    stop_after: str | None = None,
    rewrite_limit: int | None = None,
    verify_each: VerifyEach = "structure",
    print_after: str | Sequence[str] | None = None,
    print_after_change: bool = False,
    dump_dir: Path | str | None = None,
    time_rules: bool = False,
    reproducer: Path | str | None = None,
    memory: int | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> RunResult:
    """Run passes over a model, and write the result if an output is named; the given model stays as it is.

    Args:
        model: A model, or its path.
        passes: The pipeline, such as `"tp{degree=4},int8"`; `passopt list` shows all passes and pipelines.
        output: The new folder; None writes nothing.
        weights: "copy" copies weights into the output; "reference" only refers to the files that hold them.
        dry_run: Write nothing, and leave no reproducer beside the output.
        expect: Expectations such as `"fuse-attention==40"`, besides those of the pipeline.
        stop_after: The name of the pass after whose first run the pipeline ends.
        rewrite_limit: The number of rewrites to apply, from the first on; a whole-graph pass counts as one. None for
            all.
        verify_each: "structure" checks the structure of the graph after every pass, "numeric" also checks each rewrite
            on sampled inputs, "off" checks nothing.
        print_after: The passes after which the model is shown to the reporter; an empty list means all.
        print_after_change: Show the model after every pass that changed its text.
        dump_dir: The new folder in which the model is saved after every pass, without its weights.
        time_rules: Measure the CPU time of every rule.
        reproducer: The folder for a reproducer if a pass fails; None for one beside the output, if there is an output.
        memory: The bytes of memory that the process may take while it writes weights; None for 1 GiB.
        workers: The number of threads that write weights; None for two per core, at most 8.
        reporter: Is told about progress, warnings and texts.

    Returns:
        The model after the passes, a record of each pass, and the output.

    Raises:
        UsageError: A pass or an option is unknown, the output exists, or memory or disk is too small.
        ModelError: The model or a weight cannot be read.
        PassError: A pass cannot work on this model; the message says where its reproducer lies.
        VerifyError: A pass left a broken graph.
        CheckError: `verify_each="numeric"` found a rewrite that changes numbers by more than its pass declares.
        ExpectationError: An expectation does not hold; the message shows what came near.

    Example:
        >>> result = passopt.run("model.onnx", "baichuan2,tp{degree=2},int8", "model.tp2.int8")
        >>> print(result)
    """
    checked.one_of("weights", weights, ("copy", "reference"))
    checked.one_of("verify_each", verify_each, ("off", "structure", "numeric"))
    checked.whole("rewrite_limit", rewrite_limit, 0)
    checked.streaming(memory, workers)
    pipeline = stopped_after(as_pipeline(passes), stop_after)
    limit = RewriteLimit(rewrite_limit) if rewrite_limit is not None else None
    if limit is not None:  # a pipeline's expectations are about a whole run, and this one stops early
        pipeline = dataclasses.replace(pipeline, expectations=())
    names = [item.name for item in pipeline.passes]
    expectations = [
        parse_expectation(text, names) for text in (*pipeline.expectations, *checked.texts("expect", expect))
    ]
    output = checked.path("output", output) if output is not None else None
    if output is not None and not dry_run:
        refuse_existing(output)
    if reproducer and Path(reproducer).exists():
        raise UsageError(f"{reproducer}: exists. Name a new folder for `reproducer`")
    shown = None if print_after is None else checked.texts("print_after", print_after)
    instruments = _instruments(names, shown, print_after_change, dump_dir, verify_each, reporter)
    found = changeable(model)
    position = Position()
    try:
        records = run_passes(
            found.ir,
            pipeline.passes,
            verify=verify_each != "off",
            instruments=[position, *instruments],
            expectations=expectations,
            time_rules=time_rules,
            rewrite_limit=limit,
        )
    except (UsageError, ModelError, CalibrationError, ExpectationError):
        raise  # what the user gave is wrong, and no pass is to blame
    except PassoptError as error:
        folder = _reproducer_folder(reproducer, None if dry_run else output)
        if position.index is not None and folder is not None:
            _reproduce(folder, model, pipeline, position.index, error, verify_each, rewrite_limit)
        raise
    if limit is not None:
        reporter.say(str(limit))
    for name in [] if limit is not None else unwatched_misses(pipeline.passes, expectations, records, found.ir):
        command = f"passopt why {name} {found.path or 'MODEL'} --in {shlex.quote(pipeline.text)}"
        reporter.say(f"{name} matched nothing; what came near: {command}")
    if limit is None and any(item.name == FUSE_ATTENTION for item in pipeline.passes):
        _report_unfused(found, pipeline, reporter)
    found = found.after(pipeline.expanded + (f" # rewrite-limit={limit.limit}" if limit is not None else ""))
    planned = Output(found.ir, found.origin())
    stream = None
    if output is None or dry_run:
        output = None
    elif weights == "reference":
        planned.write_reference(output)
    else:
        stream = write(planned, output, StreamOptions(memory, workers), reporter)
    return RunResult(found, tuple(records), output, stream, planned, dry_run)


def _report_unfused(found: Model, pipeline: Resolved, reporter: Reporter) -> None:
    """Name the softmaxes that look like an attention and were not fused; nothing is said where none is left."""
    left = unfused_attentions(found.ir)
    if not left or any("Attention" in item.decomposes for item in pipeline.passes):
        return
    command = f"passopt why {FUSE_ATTENTION} {found.path or 'MODEL'} --in {shlex.quote(pipeline.text)}"
    names = ", ".join(str(node.outputs[0].name) for node in left[:3]) + (", …" if len(left) > 3 else "")
    count, looks, stays = (1, "softmax looks", "stays") if len(left) == 1 else (len(left), "softmaxes look", "stay")
    reporter.say(f"{count} {looks} like attention and {stays} unfused ({names}); why: {command}")


def default_output(
    model: Path | str, passes: str, *, stop_after: str | None = None, rewrite_limit: int | None = None
) -> Path:
    """Return the folder that the command writes if no output is named.

    It lies beside the model: model.onnx and `tp{degree=4},int8` give model.tp4.int8.

    Args:
        model: The path of the model.
        passes: The pipeline.
        stop_after: As for `run`.
        rewrite_limit: As for `run`.

    Returns:
        The path of the folder.

    Raises:
        UsageError: The pipeline is wrong.
        ModelError: There is no such model.
    """
    parts = []
    for step in stopped_after(resolve(passes), stop_after).steps:
        known = [] if step.name.startswith(_UNTIL) else resolve(str(step)).passes
        parts.append(step.name + "".join(str(item.degree) for item in known if hasattr(item, "degree")))
    limit = [f"limit-{rewrite_limit}"] if rewrite_limit is not None else []
    path = model_path(Path(model))
    return path.parent / ".".join([path.stem, *parts, *limit])


def stopped_after(pipeline: Resolved, name: str | None) -> Resolved:
    """Return the pipeline up to the first pass `name`, with the expectations of the passes that still run in full.

    Args:
        pipeline: The whole pipeline.
        name: The name of the last pass to run; None returns the pipeline as it is.

    Returns:
        The shorter pipeline, with a last step that names where it was stopped.

    Raises:
        UsageError: The pipeline has no such pass.
    """
    if name is None:
        return pipeline
    names = [item.name for item in pipeline.passes]
    if name not in names:
        raise UsageError("`stop_after`: " + unknown_name("pass of this pipeline", name, names))
    count = names.index(name) + 1
    whole = set(names[:count]) - set(names[count:])
    kept = tuple(text for text in pipeline.expectations if parse_expectation(text, names).name in whole)
    step = Step(f"{_UNTIL}{name}")
    return dataclasses.replace(
        pipeline, steps=(*pipeline.steps, step), passes=pipeline.passes[:count], expectations=kept
    )


def _instruments(
    known: Sequence[str],
    print_after: Sequence[str] | None,
    print_after_change: bool,
    dump_dir: Path | str | None,
    verify_each: VerifyEach,
    reporter: Reporter,
) -> list[Instrument]:
    found: list[Instrument] = []
    for name in print_after or ():
        if name not in known:
            raise UsageError("`print_after`: " + unknown_name("pass of this pipeline", name, list(known)))
    if print_after is not None:
        found.append(PrintAfter(reporter.show, tuple(print_after)))
    if print_after_change:
        found.append(PrintAfter(reporter.show, only_changes=True))
    if verify_each == "numeric":
        from passopt.verification.rewrites.check import NumericCheck

        found.append(NumericCheck())
    if dump_dir:
        directory = Path(dump_dir)
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f"{directory}: is not empty; name a new folder for `dump_dir`")
        found.append(Dump(directory))
    return found


def _reproducer_folder(named: Path | str | None, output: Path | None) -> Path | None:
    """Return the folder for a reproducer: the one named, or one beside the output, or None if nothing is written."""
    if named:
        return Path(named)
    return free_name(output.with_name(f"{output.name}.reproducer")) if output is not None else None


def _reproduce(
    folder: Path,
    given: ModelLike,
    pipeline: Resolved,
    index: int,
    error: PassoptError,
    verify_each: VerifyEach,
    rewrite_limit: int | None,
) -> None:
    """Write a reproducer of the failing pass and add to the error how to run it.

    The passes before the failing one run again on the model as it was given, which makes the input of the failing pass.
    """
    limit = RewriteLimit(rewrite_limit) if rewrite_limit is not None else None
    try:
        model = changeable(given).ir
        run_passes(model, pipeline.passes[:index], verify=False, rewrite_limit=limit)
        rest = None if limit is None else limit.limit - limit.used
        write_reproducer(folder, model, pipeline.passes[index:], error, verify_each, rest)
    except PassoptError as other:
        note = f"no reproducer was written: {other}"
    else:
        note = f"run it again with: passopt replay {folder}"
    error.args = (f"{error}\n{note}",)
