"""Check every rewrite of a run numerically, for `--verify-each=numeric`.

The graph runs on samples of its inputs, which shows the true shapes and numbers of its values. Each rewrite is cut out
and run in onnxruntime before and after, on those numbers and on random ones of the same shapes; rewrites of equal
structure are run once. Then the whole graph runs again. This samples: it proves nothing beyond what it ran.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import CheckError
from passopt.ir.graph.decoder import degree_of, find_decoder
from passopt.ir.graph.operators import RANDOM, random_operators
from passopt.ir.graph.provenance import MODULE, SOURCE
from passopt.ir.graph.run_context import Replacement, listening
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassRecord
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.runner import Instrument
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.verification.rewrites.compare_sides import Comparison, Outcome, prepare
from passopt.verification.rewrites.redefined_values import rewired
from passopt.verification.rewrites.regions import Cut, Request, Side, Unchecked, cut, names_of
from passopt.verification.rewrites.structure_key import structure_key
from passopt.verification.rewrites.value_kinds import Kinds
from passopt.verification.rewrites.whole_graph import Difference, compare_whole, stated_wrongly
from passopt.verification.sampling.samples import ORDINARY, Fed, Sample, hides_a_row, made
from passopt.verification.sampling.trace import Trace, trace

#: Weights of a reproducer are shortened to at most this many elements, if the violation still shows.
_SMALL_WEIGHT = 1 << 18
_COLLECTIVES = frozenset({"AllReduce", "AllGather"})


class Violation(CheckError):
    """Raised for a rewrite that changes numbers by more than its pass declares.

    `comparison` reproduces the violation and `outcome` measures it; `real` is true if it used the weights of the files.
    A violation that only the whole graph shows has neither, but the inputs that show it.
    """

    def __init__(
        self,
        message: str,
        comparison: Comparison | None = None,
        outcome: Outcome | None = None,
        real: bool = True,
        feeds: Mapping[str, Fed] | None = None,
    ) -> None:
        super().__init__(message)
        self.comparison = comparison
        self.outcome = outcome
        self.real = real
        self.feeds = feeds or {}

    def inputs(self) -> dict[str, Any]:
        """Return the inputs that show the violation by name; weights are among those of a cut."""
        if self.comparison is None or self.outcome is None:
            return {name: value for name, value in self.feeds.items() if not isinstance(value, list)}
        return self.comparison.inputs(self.outcome.draw, real=self.real)


@dataclasses.dataclass
class PassCheck:
    """The results of checking one pass.

    `sites` counts the checked rewrites and `distinct` those of different structure. `worst` is the largest error among
    them. `whole` counts the samples on which the whole graph was compared, and `whole_worst` is the largest error of an
    output there; `whole_ties` counts elements that were not compared, since they hang on the last bits of numbers;
    `not_whole` says why the graph was not compared. `unchecked` counts the rewrites that were not checked, by
    reason. `shortened` maps lengths of axes that were too long to run to the length that was kept.
    """

    accuracy: str
    sites: int = 0
    distinct: int = 0
    worst: float = 0.0
    budget: float = 0.0
    unchecked: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    shortened: dict[int, int] = dataclasses.field(default_factory=dict)
    whole: int = 0
    whole_worst: float = 0.0
    whole_ties: int = 0
    not_whole: str = ""
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
            "whole_graph": {"samples": self.whole, "worst_error": self.whole_worst, "not_compared": self.not_whole},
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
        if self.whole:
            parts.append(f"whole graph: {self.whole} samples, worst error {self.whole_worst:.1e}")
            if self.whole_ties:
                parts.append(f"{self.whole_ties} elements not compared, since the last bits of numbers decide them")
        elif self.not_whole and (self.sites or self.unchecked):
            parts.append(f"whole graph not compared, because {self.not_whole}")
        parts += [f"not checked: {count} sites, because {reason}" for reason, count in self.unchecked.most_common()]
        return "; ".join(parts) or "nothing to check"


class NumericCheck(Instrument):
    """An instrument that checks the rewrites of a run; `summaries` has an entry for each finished pass, in order."""

    def __init__(self) -> None:
        self.summaries: list[PassCheck] = []
        self._current: _Checker | None = None
        self._stack = contextlib.ExitStack()
        self._before: onnx_ir.Model | None = None
        self._trace: Trace | None = None
        #: The values of which the graph states something wrong, which is no fault of the passes that come later.
        self._wrong: frozenset[str] = frozenset()

    def before_pass(self, index: int, item: Pass, model: onnx_ir.Model) -> None:
        self._stack.close()
        self._before = None
        if self._trace is None:
            self._trace = trace(model)
            self._wrong = frozenset(stated_wrongly(model, self._trace))
        self._current = _Checker(item, model, self._trace)
        if not item.changes_interface:
            self._stack.enter_context(listening(model, self._current))
        if not isinstance(item, RewritePass):
            self._before = model.clone()

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        checker, earlier = self._current, self._trace
        assert checker is not None
        assert earlier is not None
        self._stack.close()
        record.seconds = max(0.0, record.seconds - checker.summary.seconds)
        if record.result.modified and self._was_split(model):
            self._after_split(model, checker, earlier)
        elif record.result.modified:
            keeps = self._before is None or _same_shapes(self._before, model)
            if self._before is not None and keeps:
                checker.check_rewired(self._before, model)
            if keeps:
                pairs = _pairs(model, earlier)
                self._trace = trace(model, list(pairs.values()))
                checker.check_whole(model, self._trace, pairs, self._wrong)
            else:
                self._trace = trace(model)
                checker.summary.unchecked["it gives inputs or outputs other shapes; compare with passopt verify"] += 1
                checker.check_runs(self._trace)
            self._wrong = frozenset(stated_wrongly(model, self._trace))
        self.summaries.append(checker.summary)
        record.numeric = checker.summary.to_json()

    def _was_split(self, model: onnx_ir.Model) -> bool:
        return self._before is not None and degree_of(self._before) == 1 and degree_of(model) > 1

    def _after_split(self, model: onnx_ir.Model, checker: _Checker, earlier: Trace) -> None:
        """Compare all ranks, joined in one graph, with the graph before; values of one rank are shares of what was."""
        if earlier.real:
            decoder = None if self._before is None else find_decoder(self._before)
            joined = join_ranks(rank_models(model), heads=None if decoder is None else decoder.kv_heads)
            pairs = _pairs(joined, earlier)
            checker.check_whole(joined, trace(joined, list(pairs.values())), pairs, self._wrong)
        else:
            checker.summary.unchecked["its weights are too large to run all ranks; compare with passopt verify"] += 1
        self._trace = trace(model)
        checker.check_runs(self._trace)
        self._wrong = frozenset(stated_wrongly(model, self._trace))


class _Checker:
    """Check the rewrites of one pass on one model, of which `found` holds the true shapes."""

    def __init__(self, item: Pass, model: onnx_ir.Model, found: Trace) -> None:
        self.item = item
        self.summary = PassCheck(str(item.accuracy))
        self._model = model
        self._kinds = Kinds()
        #: A lossy pass narrows the range of numbers, too, so it is judged on numbers of common size only.
        self._trace = found if item.accuracy.budget is None else _of_common_size(found)
        self._seen: set[tuple[Any, ...]] = set()
        #: The names by which the trace knows values that replaced others during this pass.
        self._aliases: dict[onnx_ir.Value, str] = {}

    def _name(self, value: onnx_ir.Value) -> str:
        return self._aliases.get(value, value.name or "")

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
        for value, other in event.replaced.items():
            name = self._name(value)
            self._aliases[value] = self._aliases[other] = name
        self.summary.seconds += time.process_time() - start

    def check_rewired(self, before: onnx_ir.Model, after: onnx_ir.Model) -> None:
        """Check the changes of a pass that does not replace values one by one."""
        start = time.process_time()
        position = _Positions(before, after)
        for request in rewired(before, after):
            self._check(self.item.name, request, position)
        self.summary.seconds += time.process_time() - start

    def check_runs(self, after: Trace) -> None:
        """Check that a graph that ran before the pass still runs."""
        if self._trace.runs and not after.runs:
            raise Violation(f"{self.item.name}: left a graph that no longer runs: {after.problem}")

    def check_whole(
        self, model: onnx_ir.Model, after: Trace, pairs: Mapping[int, Sample], known_wrong: Collection[str]
    ) -> None:
        """Compare the whole graph before and after the pass, and check what it states of its values."""
        start = time.process_time()
        self.check_runs(after)
        self.summary.not_whole = self._reason_against_whole(model)
        wrong = {name: item for name, item in stated_wrongly(model, after).items() if name not in known_wrong}
        difference = next(iter(wrong.values()), None)
        if not self.summary.not_whole:
            result = compare_whole(self._trace, after, pairs, model, self.item.accuracy)
            self.summary.whole, self.summary.whole_worst = result.samples, result.error
            self.summary.whole_ties = result.ties
            difference = result.difference or difference
            for place in after.unrun:
                self.summary.unchecked[f"the {place} ran in no sample"] += 1
        if difference is not None:
            raise Violation(self._whole_message(difference), feeds=difference.sample.feeds)
        self.summary.seconds += time.process_time() - start

    def _reason_against_whole(self, model: onnx_ir.Model) -> str:
        if not self._trace.runs:
            return self._trace.problem
        if self._trace.unknown:
            return f"onnxruntime does not know {', '.join(self._trace.unknown)}"
        if random := random_operators(model):
            return f"it draws random numbers ({', '.join(random)})"
        if degree_of(model) > 1:
            return "it is a graph of ranks; compare with passopt verify"
        return "" if self._trace.real else "its weights are too large to run it; compare with passopt verify"

    def _whole_message(self, difference: Difference) -> str:
        return (
            f"{self.item.name}: left a wrong graph, which shows at {difference.value}: {difference.finding} "
            f"(sampled: {difference.sample}); the pass declares {self.item.accuracy}"
        )

    def _check(self, rule: str, request: Request, position: Callable[[onnx_ir.Value], int]) -> None:
        try:
            if not self._trace.runs:
                raise Unchecked(self._trace.problem)
            self._check_cut(rule, request, position)
            self.summary.sites += 1
        except Unchecked as reason:
            self.summary.unchecked[str(reason)] += 1

    def _check_cut(self, rule: str, request: Request, position: Callable[[onnx_ir.Value], int]) -> None:
        """Check a rewrite over the smallest cut, or over wider ones if the replacement leaves values unread there.

        Such values may be equal to others that it does read, which shows only where both are computed.
        """
        violation: Violation | None = None
        while True:
            try:
                found = cut(request, lambda leaf: self._trace.has(self._name(leaf)), position)
                _refuse_collectives(found)
                _refuse_random(found)
                key = structure_key(found, self._leaf_key)
                if key not in self._seen:
                    self._compare(rule, found)
                    self._seen.add(key)
                return
            except Unchecked:
                if violation is not None:
                    raise violation from None
                raise
            except Violation as caught:
                violation = violation or caught
                unread = found.unread()
                if not unread or unread <= request.widened:
                    raise violation from None
                request = dataclasses.replace(request, widened=request.widened | unread)

    def _leaf_key(self, leaf: onnx_ir.Value) -> object:
        """Return the shapes of a leaf in all runs, and a digest of its numbers if they are integers."""
        name = self._name(leaf)
        shapes = tuple(run.shapes[name] for run in self._trace.runs)
        if leaf.dtype in FLOATS:
            return shapes
        digest = hashlib.blake2b(digest_size=8)
        for run in self._trace.runs:
            array = run.arrays.get(name)
            digest.update(b"" if array is None else repr(array.tolist()).encode())
        return shapes, digest.digest()

    def _compare(self, rule: str, found: Cut) -> None:
        comparison = prepare(found, self._trace.runs, self._name, self.item.accuracy)
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
            small = prepare(found, self._trace.runs, self._name, self.item.accuracy, _SMALL_WEIGHT)
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


def _of_common_size(found: Trace) -> Trace:
    runs = tuple(run for run in found.runs if run.sample.style.floats in ORDINARY)
    shown = tuple(run for run in runs if not hides_a_row(run.sample.feeds))
    return dataclasses.replace(found, runs=shown or runs or found.runs)


def _pairs(model: onnx_ir.Model, earlier: Trace) -> dict[int, Sample]:
    """Return the samples for the graph after a pass, by the identity of the sample for the graph before it.

    If the pass changed the dtypes of inputs, the same numbers are drawn again in the new dtypes.
    """
    dtypes = {value.name: value.dtype for value in model.graph.inputs}
    pairs = {}
    for run in earlier.runs:
        fed = run.sample.feeds
        same = all(isinstance(fed[name], list) or _has_dtype(fed[name], dtypes.get(name)) for name in fed)
        pairs[id(run.sample)] = run.sample if same else made(model, run.sample.lengths, run.sample.style)
    return pairs


def _has_dtype(array: Any, dtype: onnx_ir.DataType | None) -> bool:
    return dtype is None or dtype == onnx_ir.DataType.STRING or bool(dtype.numpy() == array.dtype)


def _refuse_random(found: Cut) -> None:
    for node in (*found.before.nodes, *found.after.nodes):
        if node.op_type in RANDOM and not node.domain:
            raise Unchecked(f"{node.op_type} draws random numbers")


def _refuse_collectives(found: Cut) -> None:
    for node in (*found.before.nodes, *found.after.nodes):
        if node.op_type in _COLLECTIVES and node.domain:
            raise Unchecked(f"{node.op_type} joins ranks; compare with passopt verify")
