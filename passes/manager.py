"""Runs a pipeline: one pass after another, each verified, timed and counted; instruments only look on."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import onnx_ir

from passopt.ir.contract import find_decoder
from passopt.ir.errors import ExpectationError, PassError, PassoptError, UsageError, VerifyError
from passopt.ir.verifier import verify_model
from passopt.passes.base import Pass, PassResult
from passopt.passes.catalog import unknown_name

_EXPECTATION = re.compile(r"\s*([a-z0-9-]+)\s*(==|>=|<=)\s*(\d+|num_layers)\s*\Z")


@dataclasses.dataclass
class PassRecord:
    """One pass of a run: what it did, in CPU seconds and nodes."""

    name: str
    result: PassResult
    seconds: float
    nodes_before: int
    nodes_after: int

    def as_json(self) -> dict[str, object]:
        return {
            "pass": self.name,
            "modified": self.result.modified,
            "matches": self.result.matches,
            "tries": self.result.tries,
            "declines": dict(self.result.declines),
            "notes": self.result.notes,
            "cpu_seconds": round(self.seconds, 6),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }


class Instrument(Protocol):
    """Looks on after every pass; must not change the model."""

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None: ...


@dataclasses.dataclass(frozen=True)
class Expectation:
    """`PASS==N`: how often a pass must have matched; N may be `num_layers`."""

    name: str
    relation: str
    count: str

    def check(self, model: onnx_ir.Model, records: Iterable[PassRecord]) -> None:
        """Raise ExpectationError with the counted declines if it does not hold."""
        mine = [record for record in records if record.name == self.name]
        if not mine:
            raise UsageError(f"--expect {self}: {self.name} is not in the pipeline")
        found = sum(record.result.matches for record in mine)
        wanted = self._wanted(model)
        holds = {"==": found == wanted, ">=": found >= wanted, "<=": found <= wanted}[self.relation]
        if holds:
            return
        tries = sum(record.result.tries for record in mine)
        declines = [f"  {count} × {why}" for record in mine for why, count in record.result.declines.most_common(5)]
        reasons = "\n" + "\n".join(declines) if declines else ""
        raise ExpectationError(f"expected {self}: matched {found} times, tried {tries} nodes{reasons}")

    def _wanted(self, model: onnx_ir.Model) -> int:
        if self.count != "num_layers":
            return int(self.count)
        decoder = find_decoder(model)
        if decoder is None:
            raise UsageError(f"--expect {self}: num_layers is unknown, the model has no past.N.key inputs")
        return decoder.layers

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.count}"


def parse_expectation(text: str, known: Sequence[str]) -> Expectation:
    """`fuse-attention==num_layers`. Raises UsageError for bad text or a pass that is not in `known`."""
    found = _EXPECTATION.match(text)
    if found is None:
        raise UsageError(f"--expect {text!r}: write PASS==N, PASS>=N or PASS<=N, N a number or num_layers")
    if found[1] not in known:
        raise UsageError(f"--expect {text}: " + unknown_name("pass of this pipeline", found[1], list(known)))
    return Expectation(found[1], found[2], found[3])


def run_passes(
    model: onnx_ir.Model,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    instruments: Sequence[Instrument] = (),
    expectations: Sequence[Expectation] = (),
) -> list[PassRecord]:
    """Run the passes on `model` in place. Errors name the passes that already ran.

    Raises PassError, VerifyError (a pass broke the graph) or ExpectationError.
    """
    records: list[PassRecord] = []
    if verify:
        verify_model(model)
    for index, item in enumerate(passes):
        before, start = len(model.graph), time.process_time()
        result = _run_one(item, model, records)
        record = PassRecord(item.name, result, time.process_time() - start, before, len(model.graph))
        if verify:
            _verify_after(item, model, records)
        records.append(record)
        for instrument in instruments:
            instrument.after_pass(index, record, model)
    for expectation in expectations:
        expectation.check(model, records)
    return records


def _run_one(item: Pass, model: onnx_ir.Model, records: Sequence[PassRecord]) -> PassResult:
    try:
        return item.run(model)
    except PassoptError as error:
        text = str(error) if str(error).startswith(item.name) else f"{item.name}: {error}"
        error.args = (f"{text} ({_before(records)})",)
        raise
    except Exception as error:
        raise PassError(f"{item.name}: failed with {type(error).__name__}: {error} ({_before(records)})") from error


def _before(records: Sequence[PassRecord]) -> str:
    return f"passes before it: {', '.join(record.name for record in records) or 'none'}"


def _verify_after(item: Pass, model: onnx_ir.Model, records: Sequence[PassRecord]) -> None:
    try:
        verify_model(model)
    except VerifyError as error:
        raise VerifyError(f"{item.name} left a broken graph ({_before(records)}): {error}") from None
