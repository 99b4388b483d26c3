"""Check every rewrite of a run numerically, for `--verify-each=numeric`.

Each rewrite is cut out of its graph and run in onnxruntime before and after, on seeded inputs of true shapes. Rewrites
of equal structure are run once. This samples: it proves nothing beyond what it ran.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir

from passopt.ir.errors import CheckError
from passopt.ir.graph.provenance import MODULE, SOURCE
from passopt.ir.graph.run_context import Replacement, listening
from passopt.ir.graph.shapes import dimensions
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassRecord
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.runner import Instrument
from passopt.verification.rewrites.compare_sides import Comparison, Outcome, prepare
from passopt.verification.rewrites.redefined_values import rewired
from passopt.verification.rewrites.regions import Cut, Request, Side, Unchecked, cut, names_of
from passopt.verification.rewrites.structure_key import structure_key
from passopt.verification.rewrites.symbol_lengths import DRAWS, Lengths
from passopt.verification.rewrites.value_kinds import Kinds

#: Weights of a reproducer are shortened to at most this many elements, if the violation still shows.
_SMALL_WEIGHT = 1 << 18
_COLLECTIVES = frozenset({"AllReduce", "AllGather"})


class Violation(CheckError):
    """Raised for a rewrite that changes numbers by more than its pass declares.

    `comparison` reproduces the violation and `outcome` measures it; `real` is true if it used the weights of the files.
    """

    def __init__(self, message: str, comparison: Comparison, outcome: Outcome, real: bool) -> None:
        super().__init__(message)
        self.comparison = comparison
        self.outcome = outcome
        self.real = real


@dataclasses.dataclass
class PassCheck:
    """The results of checking one pass.

    `sites` counts the checked rewrites and `distinct` those of different structure. `worst` is the largest error among
    them. `unchecked` counts the rewrites that could not be checked, by reason. `shortened` maps lengths of axes that
    were too long to run to the length that was kept.
    """

    accuracy: str
    sites: int = 0
    distinct: int = 0
    worst: float = 0.0
    budget: float = 0.0
    unchecked: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    shortened: dict[int, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Return the results as a JSON object."""
        return {
            "summary": str(self),
            "accuracy": self.accuracy,
            "sampled_sites": self.sites,
            "distinct_sites": self.distinct,
            "worst_error": self.worst,
            "budget": self.budget,
            "unchecked": dict(self.unchecked),
            "shortened_axes": {str(length): kept for length, kept in self.shortened.items()},
            "cpu_seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        """Return a line such as `sampled: 40 sites, 1 distinct, worst error 2.1e-07 of 1e-05 (reassociated)`."""
        parts = []
        if self.sites:
            parts.append(
                f"sampled: {self.sites} sites, {self.distinct} distinct, "
                f"worst error {self.worst:.1e} of {self.budget:.0e} ({self.accuracy})"
            )
        parts += [f"axes of {length:,} shortened to {kept}" for length, kept in self.shortened.items()]
        parts += [f"{count} not checked: {reason}" for reason, count in self.unchecked.most_common()]
        return "; ".join(parts) or "nothing to check"


class NumericCheck(Instrument):
    """An instrument that checks the rewrites of a run; `summaries` has an entry for each finished pass, in order."""

    def __init__(self) -> None:
        self.summaries: list[PassCheck] = []
        self._current: _Checker | None = None
        self._stack = contextlib.ExitStack()
        self._before: onnx_ir.Model | None = None

    def before_pass(self, index: int, item: Pass, model: onnx_ir.Model) -> None:
        self._stack.close()
        self._before = None
        self._current = _Checker(item, model)
        if not item.changes_interface:
            self._stack.enter_context(listening(model, self._current))
        if not isinstance(item, RewritePass):
            self._before = model.clone()

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        checker = self._current
        assert checker is not None
        self._stack.close()
        record.seconds = max(0.0, record.seconds - checker.summary.seconds)
        if self._before is not None and record.result.modified:
            if _same_shapes(self._before, model):
                checker.check_rewired(self._before, model)
            else:
                checker.summary.unchecked["it gives inputs or outputs other shapes; compare with passopt verify"] += 1
        self.summaries.append(checker.summary)
        record.numeric = checker.summary.to_json()


class _Checker:
    """Check the rewrites of one pass on one model."""

    def __init__(self, item: Pass, model: onnx_ir.Model) -> None:
        self.item = item
        self.summary = PassCheck(str(item.accuracy))
        self._model = model
        self._kinds = Kinds()
        self._lengths = [Lengths(model, draw) for draw in DRAWS]
        self._seen: set[tuple[Any, ...]] = set()

    def on_replace(self, event: Replacement) -> None:
        start = time.process_time()
        side = Side.of(self._model, self._kinds)
        replaced = [old for old in event.replaced if old.uses() or old.is_graph_output()]
        old, new = tuple(replaced), tuple(event.replaced[value] for value in replaced)
        roots = [node for value in old if (node := value.producer()) is not None]
        inside = names_of([*event.matched, *roots])
        request = Request(old, new, side, side, inside, inside | names_of(event.built.nodes))
        if old:
            self._check(event.rule, request, _Positions(self._model))
        self.summary.seconds += time.process_time() - start

    def check_rewired(self, before: onnx_ir.Model, after: onnx_ir.Model) -> None:
        """Check the changes of a pass that does not replace values one by one."""
        start = time.process_time()
        position = _Positions(before, after)
        for request in rewired(before, after):
            self._check(self.item.name, request, position)
        self.summary.seconds += time.process_time() - start

    def _check(self, rule: str, request: Request, position: Callable[[onnx_ir.Value], int]) -> None:
        try:
            found = cut(request, lambda leaf: self._lengths[0].shape_of(leaf) is not None, position)
            _refuse_collectives(found)
            key = structure_key(found)
            if key not in self._seen:
                self._compare(rule, found)
                self._seen.add(key)
            self.summary.sites += 1
        except Unchecked as reason:
            self.summary.unchecked[str(reason)] += 1

    def _compare(self, rule: str, found: Cut) -> None:
        comparison = prepare(found, self._lengths, self.item.accuracy)
        real = self.item.accuracy.budget is not None
        outcome = comparison.run(real=real)
        if not outcome.ok and not real and not comparison.has_blank_weight():
            # The rule may depend on the values of the weights, so the rewrite counts as right if it holds on the real
            # ones. Real weights that are all zero would hide an error; then the random ones decide.
            real, outcome = True, comparison.run(real=True)
        if not outcome.ok:
            message = self._message(rule, found, outcome)
            raise Violation(message, *self._smallest(found, comparison, outcome, real), real)
        self.summary.distinct += 1
        self.summary.shortened.update(comparison.shortened)
        if outcome.error >= self.summary.worst:
            self.summary.worst, self.summary.budget = outcome.error, outcome.budget

    def _smallest(self, found: Cut, comparison: Comparison, outcome: Outcome, real: bool) -> tuple[Comparison, Outcome]:
        """Return the same violation with shortened weights, if it still shows, because a reproducer should be small."""
        with contextlib.suppress(Unchecked):
            small = prepare(found, self._lengths, self.item.accuracy, _SMALL_WEIGHT)
            again = small.run(real=real)
            if not again.ok and not again.problem:
                return small, again
        return comparison, outcome

    def _message(self, rule: str, found: Cut, outcome: Outcome) -> str:
        root = next(root for root in found.before.roots if root.name == outcome.root)
        node = root.producer()
        places = [
            node.metadata_props[key] for key in (MODULE, SOURCE) if node is not None and key in node.metadata_props
        ]
        where = f"{outcome.root} ({', '.join(places)})" if places else outcome.root
        return f"{rule}: changed the numbers of {where}: {outcome}; the pass declares {self.item.accuracy}"


class _Positions:
    """The positions of values in the graph, counted when first asked for.

    A value is found by its name, so it has the same position in both graphs.
    """

    def __init__(self, *models: onnx_ir.Model) -> None:
        self._models = models
        self._known: Mapping[str, int] | None = None

    def __call__(self, value: onnx_ir.Value) -> int:
        if self._known is None:
            self._known = {
                output.name or "": index
                for model in self._models
                for index, node in enumerate(model.graph)
                for output in node.outputs
            }
        return self._known.get(value.name or "", -1)


def _same_shapes(before: onnx_ir.Model, after: onnx_ir.Model) -> bool:
    """Return whether both models have the same names and shapes of inputs and outputs; dtypes may differ."""
    pairs = [(before.graph.inputs, after.graph.inputs), (before.graph.outputs, after.graph.outputs)]
    return all(
        [(value.name, dimensions(value)) for value in one] == [(value.name, dimensions(value)) for value in other]
        for one, other in pairs
    )


def _refuse_collectives(found: Cut) -> None:
    for node in (*found.before.nodes, *found.after.nodes):
        if node.op_type in _COLLECTIVES and node.domain:
            raise Unchecked(f"{node.op_type} joins ranks; compare with passopt verify")
