"""Define the pass `shard`, which makes a model tensor-parallel, as one SPMD graph for all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import onnx_ir

from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.editor import Editor
from passopt.ir.weights.lazy_weight import is_checkpoint_weight
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Pass, Refusal
from passopt.passes.framework.records import PassResult
from passopt.passes.sharding.legal_degrees import ShardPlan, plan_of
from passopt.passes.sharding.padding import check_padding
from passopt.passes.sharding.rules import propagate
from passopt.passes.sharding.spmd_graph import Materializer


@dataclasses.dataclass(frozen=True)
class Shard(Pass):
    """Rewrite the graph once into what every rank runs: weights become shards, and collectives add up partial sums.

    Before: ``y = MatMul(Relu(MatMul(x, w1)), w2)``
    After:  ``y = AllReduce(MatMul(Relu(MatMul(x, shard(w1, axis=1))), shard(w2, axis=0)))``
    A linear whose input is replicated is column-parallel; everything else is inferred from that. On each rank the KV
    cache holds the heads of that rank, and is not gathered as other outputs, such as the logits, are. `pad=true` fills
    up heads, channels and vocabulary with zeros to a multiple of the degree.
    """

    name = "shard"
    after = ("fold-norm-head", "inject-norm-head-bias", "split-packed-qkv", "dematerialize-alibi")
    accuracy = REASSOCIATED
    changes_interface = True  # The cache inputs and outputs hold the heads of one rank only.

    degree: int = 2
    pad: bool = False

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Shard the model in place; raise PassError if it cannot be sharded, UsageError for a wrong degree."""
        present = degree_of(model)
        if present == self.degree:
            return PassResult()
        if present != 1:
            raise UsageError(f"{self.name}: the model is sharded already, degree {present}, asked for {self.degree}")
        if self.degree < 1:
            raise UsageError(f"{self.name}: degree {self.degree} is not a positive number")
        complete_types(model)
        state = propagate(model)
        plan = plan_of(state)
        self._check(plan)
        if plan.blockers(self.degree):
            check_padding(state, self.degree)
        done = Materializer(state, self.degree, Editor(model, self.name)).run()
        note = f"{len(done.sharded)} tensors sharded, {done.all_reduces} AllReduce, {done.all_gathers} AllGather"
        return PassResult(modified=True, matches=len(done.sharded), tries=len(model.graph), notes=[note])

    def _check(self, plan: ShardPlan) -> None:
        if not plan.sharded:
            raise PassError(f"{self.name}: found no linear to shard: no MatMul has a constant weight of two axes")
        blockers = plan.blockers(self.degree)
        if not blockers or self.pad:
            return
        reasons = "; ".join(f"{group.units} units of {group.example}" for group in blockers)
        legal = ", ".join(map(str, plan.legal_degrees)) or "none"
        raise UsageError(
            f"{self.name}: degree {self.degree} does not divide {reasons}. Legal degrees: {legal}; "
            f"or pad with zeros: tp{{degree={self.degree},pad=true}}"
        )

    def explain(self, model: onnx_ir.Model) -> Iterable[Refusal]:
        """Yield the matrices that every rank holds whole, since no operator that reads them is split."""
        if degree_of(model) != 1:
            return
        copy = model.clone()
        complete_types(copy)
        try:
            plan = plan_of(propagate(copy))
        except PassError:
            return  # `run` raises the same error, which says what is in the way.
        for name in plan.replicated:
            value = copy.graph.initializers[name]
            if is_checkpoint_weight(value) and value.shape is not None and len(value.shape) > 1:
                reason = f"{name} {list(value.shape.numpy())} stays whole on every rank: what reads it is not split"
                yield Refusal(next(iter(value.consumers()), None), reason)
