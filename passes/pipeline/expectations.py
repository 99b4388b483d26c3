"""Check how often passes matched against expectations such as `PASS==N`, and explain those that are not met."""

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
from passopt.passes.pipeline.attention_sites import attentions, has_attention, unfused_attentions

if TYPE_CHECKING:
    from passopt.passes.framework.records import PassRecord

#: What a count may be a multiple of; `Expectation` says what each of them is.
_BASES = ("num_layers", "rotary_layers", "decoder_attentions", "attentions")
_TERM = rf"(?:(?:\d+\s*\*\s*)?(?:{'|'.join(_BASES)})|\d+)"
_EXPECTATION = re.compile(rf"\s*([a-z0-9-]+)\s*(==|>=|<=)\s*({_TERM}(?:\s*[+-]\s*{_TERM})*)\s*\Z")
_SIGNED_TERM = re.compile(rf"([+-]?)(?:(\d+)\*)?({'|'.join(_BASES)}|\d+)")
#: How many groups of similar misses the message of an unmet expectation shows.
_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Expectation:
    """A statement of how often a pass must have matched: `PASS==N`, where N is a number or such as `2*num_layers+1`.

    If the pass says what it `makes`, the nodes of these operators in the final graph are counted instead of its
    matches, so that a model which was fused before also meets the expectation. If a later pass decomposes these
    operators on purpose, they are counted right after the last run of this pass.

    Attributes:
        name: The name of the pass.
        relation: "==", ">=" or "<=".
        count: The text of N, without spaces: a sum of numbers and multiples of `num_layers` (of a decoder),
            `rotary_layers` (the same, or 0 without positions), `attentions` (those in one operator, and every softmax
            that looks like one and is not) or `decoder_attentions` (the same for a decoder that passopt exported or
            that has a cache, at least 1; 0 for any other graph).
    """

    name: str
    relation: str
    count: str

    def holds(self, found: int, model: onnx_ir.Model) -> bool:
        """Return True if a count meets the expectation.

        Args:
            found: How often the pass matched, or how many nodes of what it makes there are.
            model: The model, which knows its number of layers.
        """
        wanted = self.wanted(model)
        return {"==": found == wanted, ">=": found >= wanted, "<=": found <= wanted}[self.relation]

    def wanted(self, model: onnx_ir.Model) -> int:
        """Return the number that N stands for in a model.

        Args:
            model: The model, which knows its number of layers.

        Raises:
            UsageError: The number of layers is unknown.
        """
        total = 0
        for sign, factor, base in _SIGNED_TERM.findall(self.count):
            number = int(base) if base.isdigit() else self._counted(model, base)
            total += (-1 if sign == "-" else 1) * int(factor or 1) * number
        return total

    @property
    def counts_attentions(self) -> bool:
        """Return True if N depends on the attentions of the graph, so that those left over explain a miss."""
        return "attentions" in self.count

    def _counted(self, model: onnx_ir.Model, base: str) -> int:
        if base == "decoder_attentions":
            return max(1, attentions(model)) if has_attention(model) else 0
        return attentions(model) if base == "attentions" else self._layers(model, base)

    def _layers(self, model: onnx_ir.Model, base: str) -> int:
        """Return the value of `num_layers` or `rotary_layers`.

        A model that takes the positions of its tokens as an input has rotary embedding in every layer; any other model
        has 0 rotary layers.
        """
        layers = layer_count(model)
        if layers is None:
            raise UsageError(
                f"{self} is expected, by `expect` or by the pipeline, but {base} is unknown: the model has no inputs "
                f"past.N.key and no weights named layers.N. If it is no decoder, name its passes, not the pipeline"
            )
        takes_positions = any(value.name == POSITION_IDS for value in model.graph.inputs)
        return layers if base == "num_layers" or takes_positions else 0

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.count}"


def parse_expectation(text: str, known: Sequence[str]) -> Expectation:
    """Parse an expectation such as `fuse-attention==num_layers`.

    Args:
        text: The text of the expectation.
        known: The names of the passes in the pipeline.

    Returns:
        The expectation.

    Raises:
        UsageError: If the text has another form, or names a pass that is not in `known`.
    """
    found = _EXPECTATION.match(text)
    if found is None:
        raise UsageError(
            f"`expect`: {text!r} is no expectation; write PASS==N, PASS>=N or PASS<=N, N a number, 2*num_layers+1 or "
            f"attentions"
        )
    if found[1] not in known:
        raise UsageError(f"`expect={text}`: " + unknown_name("pass of this pipeline", found[1], list(known)))
    return Expectation(found[1], found[2], re.sub(r"\s", "", found[3]))


class Watch:
    """Check the expectations of one run, and explain unmet ones by the graph as it was right after their passes.

    Args:
        expectations: What must hold at the end of the run.
        passes: The passes of the run, in order.

    Raises:
        UsageError: If an expectation names a pass that is not in the run.
    """

    def __init__(self, expectations: Sequence[Expectation], passes: Sequence[Pass]) -> None:
        self._passes = {item.name: item for item in passes}
        self._last = {item.name: index for index, item in enumerate(passes)}
        for expectation in expectations:
            if expectation.name not in self._last:
                raise UsageError(f"`expect={expectation}`: {expectation.name} is not in the pipeline")
        self._expectations = expectations
        self._order = passes
        self._reports: dict[Expectation, str] = {}
        self._early: dict[Expectation, int] = {}

    def after_pass(self, index: int, model: onnx_ir.Model, records: Sequence[PassRecord]) -> None:
        """Count and explain what is missing if pass number `index` was the last run of an expected pass.

        The report is kept until `finish`, since later passes may still change what is counted.
        """
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
        """Raise ExpectationError, with the report of what is missing, for the first expectation that does not hold."""
        for expectation in self._expectations:
            found = self._early.get(expectation)
            if found is None:
                found = self._found(expectation, model, records)
            if expectation.holds(found, model):
                continue
            raise ExpectationError(self._message(expectation, found, model, records))

    def _is_decomposed_after(self, index: int) -> bool:
        """Return True if a pass after number `index` decomposes what that one makes."""
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
        left = unfused_attentions(model) if expectation.counts_attentions else []
        if left:
            names = ", ".join(str(node.outputs[0].name) for node in left[:_GROUPS])
            more = f" and {len(left) - _GROUPS} more" if len(left) > _GROUPS else ""
            counted += f"; softmaxes between two products are left: {names}{more}"
        return f"expected {expectation}{meant}: {counted}" + (f"\n{report}" if report else "")

    def _found(self, expectation: Expectation, model: onnx_ir.Model, records: Sequence[PassRecord]) -> int:
        """Count the nodes that the expected pass makes, or its matches if it does not say what it makes."""
        makes = self._passes[expectation.name].makes
        if not makes:
            return _total(expectation.name, records).matches
        kinds = {_identifier(text) for text in makes}
        return sum((node.domain, node.op_type) in kinds for node in model.graph.all_nodes())


def unwatched_misses(
    passes: Sequence[Pass], watched: Sequence[Expectation], records: Sequence[PassRecord], model: onnx_ir.Model
) -> list[str]:
    """List the passes that had no effect although nothing says that they may, so that the user can be warned.

    Args:
        passes: The passes of the run.
        watched: The expectations of the run; their passes are not listed.
        records: The records of the run.
        model: The model after the run.

    Returns:
        The names of the passes that say what they make, were tried at some node, matched nothing, and whose operators
        are not in the model; but not if a pass of the run decomposes these operators.
    """
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
    """Split the name of an operator, such as `passopt::AlibiAttention`, into (domain, op type)."""
    domain, _, op_type = text.rpartition("::")
    return domain, op_type


def _total(name: str, records: Sequence[PassRecord]) -> PassResult:
    """Add up the results of all runs of a pass; the statistics of rules are those of its last run."""
    total = PassResult()
    for record in records:
        if record.name == name:
            total.matches += record.result.matches
            total.tries += record.result.tries
            total.declines.update(record.result.declines)
            total.modified = total.modified or record.result.modified
            total.rules = record.result.rules
    return total
