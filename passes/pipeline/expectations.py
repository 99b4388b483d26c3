"""What must hold after a pipeline (`PASS==N`), and the explanation where it does not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir

from passopt.ir.errors import ExpectationError, UsageError
from passopt.ir.graph.decoder import POSITION_IDS, layer_count
from passopt.passes.explain.report import explain_rest
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.framework.suggestions import unknown_name

if TYPE_CHECKING:
    from passopt.passes.framework.records import PassRecord

_TERM = r"(?:(?:\d+\s*\*\s*)?(?:num_layers|rotary_layers)|\d+)"
_EXPECTATION = re.compile(rf"\s*([a-z0-9-]+)\s*(==|>=|<=)\s*({_TERM}(?:\s*[+-]\s*{_TERM})*)\s*\Z")
_SIGNED_TERM = re.compile(r"([+-]?)(?:(\d+)\*)?(num_layers|rotary_layers|\d+)")
#: Groups of misses in the message of an unmet expectation.
_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Expectation:
    """`PASS==N`: how often a pass must have matched, N such as `2*num_layers+1`.

    Of a pass that says what it `makes`, the nodes of these operators in the final graph are counted instead: a model
    that was fused before holds what it should. If a later pass decomposes them on purpose, they are counted before it.
    """

    name: str
    relation: str
    count: str

    def holds(self, found: int, model: onnx_ir.Model) -> bool:
        wanted = self.wanted(model)
        return {"==": found == wanted, ">=": found >= wanted, "<=": found <= wanted}[self.relation]

    def wanted(self, model: onnx_ir.Model) -> int:
        """The number on the right. Raises UsageError if it asks for the layers of a graph that is no decoder."""
        total = 0
        for sign, factor, base in _SIGNED_TERM.findall(self.count):
            number = int(base) if base.isdigit() else self._layers(model, base)
            total += (-1 if sign == "-" else 1) * int(factor or 1) * number
        return total

    def _layers(self, model: onnx_ir.Model, base: str) -> int:
        """rotary_layers are those of a model that takes the positions of its tokens, and 0 for any other."""
        layers = layer_count(model)
        if layers is None:
            raise UsageError(
                f"{self} is expected, by --expect or by the pipeline, but {base} is unknown: the model has no inputs "
                f"past.N.key and no weights named layers.N. If it is no decoder, name its passes, not the pipeline"
            )
        takes_positions = any(value.name == POSITION_IDS for value in model.graph.inputs)
        return layers if base == "num_layers" or takes_positions else 0

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.count}"


def parse_expectation(text: str, known: Sequence[str]) -> Expectation:
    """`fuse-attention==num_layers`. Raises UsageError for bad text or a pass that is not in `known`."""
    found = _EXPECTATION.match(text)
    if found is None:
        raise UsageError(
            f"--expect {text!r}: write PASS==N, PASS>=N or PASS<=N, N a number or num_layers or 2*num_layers+1"
        )
    if found[1] not in known:
        raise UsageError(f"--expect {text}: " + unknown_name("pass of this pipeline", found[1], list(known)))
    return Expectation(found[1], found[2], re.sub(r"\s", "", found[3]))


class Watch:
    """Watches the expectations of one run: an unmet one is explained in the graph as its pass left it."""

    def __init__(self, expectations: Sequence[Expectation], passes: Sequence[Pass]) -> None:
        self._passes = {item.name: item for item in passes}
        self._last = {item.name: index for index, item in enumerate(passes)}
        for expectation in expectations:
            if expectation.name not in self._last:
                raise UsageError(f"--expect {expectation}: {expectation.name} is not in the pipeline")
        self._expectations = expectations
        self._order = passes
        self._reports: dict[Expectation, str] = {}
        self._early: dict[Expectation, int] = {}

    def after_pass(self, index: int, model: onnx_ir.Model, records: Sequence[PassRecord]) -> None:
        """Explain what is missing after the last run of a pass; whether it counts is known at the end."""
        for expectation in self._expectations:
            if self._last[expectation.name] != index:
                continue
            found, result = self._found(expectation, model, records), _total(expectation.name, records)
            if self._is_decomposed_after(index):
                self._early[expectation] = found
            if not expectation.holds(found, model) and found < expectation.wanted(model):
                report = explain_rest(self._passes[expectation.name], model, result)
                self._reports[expectation] = "\n".join(report.body(_GROUPS))

    def finish(self, model: onnx_ir.Model, records: Sequence[PassRecord]) -> None:
        """Raise ExpectationError for the first expectation that does not hold."""
        for expectation in self._expectations:
            found = self._early.get(expectation)
            if found is None:
                found = self._found(expectation, model, records)
            if expectation.holds(found, model):
                continue
            raise ExpectationError(self._message(expectation, found, model, records))

    def _is_decomposed_after(self, index: int) -> bool:
        """Whether a later pass takes apart what this one makes."""
        made = set(self._order[index].makes)
        return any(made.intersection(item.decomposes) for item in self._order[index + 1 :])

    def _message(
        self, expectation: Expectation, found: int, model: onnx_ir.Model, records: Sequence[PassRecord]
    ) -> str:
        result, makes = _total(expectation.name, records), self._passes[expectation.name].makes
        wanted = expectation.wanted(model)
        meant = "" if str(wanted) == expectation.count else f" (that is {wanted})"
        counted = f"matched {result.matches} times, tried {result.tries} nodes"
        if makes:
            counted = f"the graph has {found} nodes {' or '.join(makes)}; {counted}"
        report = self._reports.get(expectation)
        if report is None and makes and found < wanted:
            report = f"it held when {expectation.name} had run: a later pass took some away"
        return f"expected {expectation}{meant}: {counted}" + (f"\n{report}" if report else "")

    def _found(self, expectation: Expectation, model: onnx_ir.Model, records: Sequence[PassRecord]) -> int:
        makes = self._passes[expectation.name].makes
        if not makes:
            return _total(expectation.name, records).matches
        kinds = {_identifier(text) for text in makes}
        return sum((node.domain, node.op_type) in kinds for node in model.graph.all_nodes())


def unwatched_misses(
    passes: Sequence[Pass], watched: Sequence[Expectation], records: Sequence[PassRecord], model: onnx_ir.Model
) -> list[str]:
    """Passes that tried, matched nothing and left nothing of what they make, while no expectation watches them."""
    names = {item.name for item in watched}
    found = {(node.domain, node.op_type) for node in model.graph.all_nodes()}
    silent = []
    for item in {item.name: item for item in passes if item.makes and item.name not in names}.values():
        result = _total(item.name, records)
        is_undone = any(set(item.makes) & set(other.decomposes) for other in passes)
        if result.tries and not (result.matches or is_undone or found.intersection(map(_identifier, item.makes))):
            silent.append(item.name)
    return silent


def _identifier(text: str) -> tuple[str, str]:
    """`passopt::AlibiAttention` → (domain, op type)."""
    domain, _, op_type = text.rpartition("::")
    return domain, op_type


def _total(name: str, records: Sequence[PassRecord]) -> PassResult:
    """What all runs of a pass did together."""
    total = PassResult()
    for record in records:
        if record.name == name:
            total.matches += record.result.matches
            total.tries += record.result.tries
            total.declines.update(record.result.declines)
            total.modified = total.modified or record.result.modified
            total.rules = record.result.rules
    return total
