"""Run the passes of a pipeline in order, and verify the model, count and time after each of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import onnx_ir

from passopt.ir.errors import PassError, PassoptError, VerifyError
from passopt.ir.graph.interface import Interface
from passopt.ir.graph.run_context import RewriteLimit, RunContext
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.domains import normalize_domains
from passopt.passes.framework.base import Pass
from passopt.passes.framework.defects import NEXT_STEP, describe_site, failure, node_at_work
from passopt.passes.framework.records import PassRecord, PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.expectations import Expectation, Watch


class Instrument:
    """The base class of observers that are called before and after every pass.

    An instrument must not change the model. It may stop the run by raising an exception.
    """

    def before_pass(self, index: int, item: Pass, model: onnx_ir.Model) -> None:
        """Observe the model before a pass runs.

        Args:
            index: The number of the pass, counted from 0.
            item: The pass.
            model: The model, which must not be changed.
        """

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        """Observe the model after a pass has run and the model was verified.

        Args:
            index: The number of the pass, counted from 0.
            record: What the pass did.
            model: The model, which must not be changed.
        """


def run_passes(
    model: onnx_ir.Model,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    instruments: Sequence[Instrument] = (),
    expectations: Sequence[Expectation] = (),
    time_rules: bool = False,
    rewrite_limit: RewriteLimit | None = None,
) -> list[PassRecord]:
    """Run the passes on `model` in place, in the given order.

    Args:
        model: The model to change.
        passes: The passes, such as `resolve("fuse,int8").passes`.
        verify: Check the structure of the model before the first and after every pass, and that a pass kept the names,
            dtypes and shapes of the model's inputs and outputs unless it declares `changes_interface`.
        instruments: Observers, called before and after every pass.
        expectations: How often passes must have matched; they are checked after the last pass.
        time_rules: Measure the CPU time of every rule, which slows rules a little.
        rewrite_limit: Stop changing the model after so many rewrites; it counts them.

    Returns:
        One record per pass, in order.

    Raises:
        PassError: If a pass cannot work on this model, or fails with an unexpected exception. Like VerifyError, it
            names the pass and those that ran before it.
        VerifyError: If the model is broken before the first pass, or a pass left it broken.
        ExpectationError: If an expectation does not hold at the end.
        UsageError: If an expectation names a pass that is not among `passes`.

    Example:
        ::

            model = passopt.ir.load_model("model.onnx")
            records = run_passes(model, resolve("fuse,int8").passes)
            print([(record.name, record.result.matches) for record in records])
    """
    records: list[PassRecord] = []
    normalize_domains(model)  # A model that was made in memory may still name the alias of the default domain.
    watch = Watch(expectations, passes)
    context = RunContext.of(model)
    context.times_rules, context.rewrite_limit = time_rules, rewrite_limit
    if verify:
        verify_model(model)
    for item in passes:
        item.foresee(model, passes)
    for index, item in enumerate(passes):
        for instrument in instruments:
            instrument.before_pass(index, item, model)
        interface = Interface.of(model)
        before, start = len(model.graph), time.process_time()
        result = _run_one(item, model, records)
        record = PassRecord(item.name, result, time.process_time() - start, before, len(model.graph))
        if verify:
            _verify_after(item, model, interface, records)
        records.append(record)
        for instrument in instruments:
            instrument.after_pass(index, record, model)
        watch.after_pass(index, model, records)
    watch.finish(model, records)
    return records


def _run_one(item: Pass, model: onnx_ir.Model, records: Sequence[PassRecord]) -> PassResult:
    """Run one pass within the rewrite limit; its errors name the pass and those that ran before it."""
    limit = RunContext.of(model).rewrite_limit
    whole = limit is not None and not isinstance(item, RewritePass)
    if whole and limit is not None and limit.reached:
        return PassResult(notes=["not run: the rewrite limit is reached"])
    try:
        result = item.run(model)
        if whole and limit is not None and result.modified:
            limit.take(item.name)
        return result
    except PassoptError as error:
        text = str(error) if str(error).startswith(item.name) else f"{item.name}: {error}"
        error.args = (_with_those_before(text, records),)
        raise
    except Exception as error:
        raise PassError(_with_those_before(_defect_of_pass(item, error), records)) from error


def _defect_of_pass(item: Pass, error: Exception) -> str:
    """Return what to say of an exception that a pass did not mean to raise."""
    node = node_at_work(error)
    site = f"\nsite: {describe_site(node)}" if node is not None else ""
    return f"{item.name}: {failure(error, type(item).run)}{site}\n{NEXT_STEP}"


def _with_those_before(text: str, records: Sequence[PassRecord]) -> str:
    """Add the passes that ran before to the first line of an error message."""
    first, newline, rest = text.partition("\n")
    return f"{first} ({_before(records)}){newline}{rest}"


def _before(records: Sequence[PassRecord]) -> str:
    return f"passes before it: {', '.join(record.name for record in records) or 'none'}"


def _verify_after(item: Pass, model: onnx_ir.Model, interface: Interface, records: Sequence[PassRecord]) -> None:
    """Raise VerifyError if a pass left a broken graph, or changed the interface without declaring it."""
    try:
        verify_model(model)
        if not item.changes_interface:
            interface.check(model)
    except VerifyError as error:
        raise VerifyError(f"{item.name} left a broken graph ({_before(records)}): {error}") from None
