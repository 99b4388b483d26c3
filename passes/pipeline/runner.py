"""Runs a pipeline: one pass after another, each verified, timed and counted; instruments only look on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import onnx_ir

from passopt.ir.errors import PassError, PassoptError, VerifyError
from passopt.ir.graph.interface import Interface
from passopt.ir.graph.run_context import RewriteLimit, RunContext
from passopt.ir.graph.verifier import verify_model
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassRecord, PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.expectations import Expectation, Watch


class Instrument:
    """Looks on before and after every pass; must not change the model, and stops the run by raising."""

    def before_pass(self, index: int, item: Pass, model: onnx_ir.Model) -> None:
        """Pass number `index` is about to run."""

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        """Pass number `index` has run, and the structure was verified."""


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
    """Run the passes on `model` in place, one after another, and return what each of them did.

    Args:
        model: The model to change.
        passes: The passes, in the order in which they run.
        verify: Check the structure of the graph before the first pass and after every pass.
        instruments: Look on before and after every pass.
        expectations: Are checked as soon as the passes they speak of have run.
        time_rules: Take the CPU time of every rule, into its statistics.
        rewrite_limit: Stop changing the model after so many rewrites; it counts them.

    Raises:
        PassError: The model or an option of a pass is wrong; the message names the passes that already ran.
        VerifyError: A pass left a broken graph.
        ExpectationError: An expectation does not hold.
    """
    records: list[PassRecord] = []
    watch = Watch(expectations, passes)
    context = RunContext.of(model)
    context.times_rules, context.rewrite_limit = time_rules, rewrite_limit
    if verify:
        verify_model(model)
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
        error.args = (f"{text} ({_before(records)})",)
        raise
    except Exception as error:
        raise PassError(f"{item.name}: failed with {type(error).__name__}: {error} ({_before(records)})") from error


def _before(records: Sequence[PassRecord]) -> str:
    return f"passes before it: {', '.join(record.name for record in records) or 'none'}"


def _verify_after(item: Pass, model: onnx_ir.Model, interface: Interface, records: Sequence[PassRecord]) -> None:
    try:
        verify_model(model)
        if not item.changes_interface:
            interface.check(model)
    except VerifyError as error:
        raise VerifyError(f"{item.name} left a broken graph ({_before(records)}): {error}") from None
