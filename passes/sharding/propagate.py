"""Infer how every value lies on the ranks, starting from column-parallel linears and the KV cache.

Forward rules give the specs of an operator's outputs from those of its inputs. If an input must then be sharded as
well, such as a bias or the ALiBi slopes behind a mask, `demand` goes backward until it reaches constants. The graph is
not changed here; the result is a `Propagation`.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.graph.decoder import find_decoder
from passopt.ir.graph.provenance import MODULE, called
from passopt.ir.weights.lazy_weight import constant_tensor
from passopt.passes.sharding.axes import ndim_of, products
from passopt.passes.sharding.placement import (
    ONE,
    REPLICATED,
    LocalDims,
    Product,
    Replicated,
    Seed,
    Sharded,
    Spec,
    VocabMasked,
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a value: input number `index` of a node."""

    node: onnx_ir.Node
    index: int


#: A forward rule gives the specs of a node's outputs; a backward rule demands of its inputs what a sharded output needs
#: (see `rules`).
Forward: TypeAlias = "Callable[[Propagation, onnx_ir.Node], list[Spec]]"
Backward: TypeAlias = "Callable[[Propagation, onnx_ir.Node, Sharded], None]"


class Conflict(Exception):
    """Say that a rule cannot shard a node, and why; it becomes a PassError that names the node."""


class Propagation:
    """The specs of all values of a model, and everything that has to be changed to shard it.

    Seeds divide their channels into the finest units that the graph shows. If these meet coarser units, as query heads
    meet the key-value head of their group, `coarser` records it. If `coarser` is not empty at the end, the specs are
    not final: another propagation must start with these `units` (see `rules.propagate`).

    Attributes:
        specs: How each computed value and graph input lies on the ranks.
        constant_uses: The uses of constants that read a shard, and which one.
        partial: The values that are partial sums, which an AllReduce must follow.
        masked: The values whose rows of other ranks must be masked before an AllReduce.
        targets: Target shapes and Split sizes in which a position (-1: all of them) must become a length on one rank.
        attributes: The attributes of nodes that are numbers of heads and must become those of one rank.
        seeds: The linears at which a sharding starts.
        tables: The look-ups in tables that are sharded by rows.
        coarser: The seeds that must start again, with their numbers of units.
    """

    def __init__(self, model: onnx_ir.Model, forward: Forward, backward: Backward, units: Mapping[Seed, int]) -> None:
        self.model = model
        self.units = units
        self.coarser: dict[Seed, int] = {}
        self.decoder = find_decoder(model)
        self._forward = forward
        self._backward = backward
        self.specs: dict[onnx_ir.Value, Spec] = {}
        self.constant_uses: dict[Use, Sharded] = {}
        self.partial: dict[onnx_ir.Value, None] = {}
        self.masked: dict[onnx_ir.Value, VocabMasked] = {}
        self.targets: dict[Use, tuple[int, Sharded]] = {}
        self.attributes: dict[tuple[onnx_ir.Node, str], Sharded] = {}
        self.seeds: dict[onnx_ir.Node, Sharded] = {}
        self.tables: dict[onnx_ir.Node, VocabMasked] = {}
        self._order = {node: index for index, node in enumerate(model.graph)}
        self._queue: list[int] = []
        self._queued: set[int] = set()
        self._nodes = list(model.graph)

    def run(self) -> Propagation:
        """Propagate to the fixed point; raise PassError that names the node if one has no consistent spec."""
        self._seed_inputs()
        for index in range(len(self._nodes)):
            self._enqueue(index)
        self._settle()
        if not self.coarser:
            self._complete_outputs()
            self._settle()
        return self

    # Methods for the rules.

    def spec(self, node: onnx_ir.Node, index: int) -> Spec:
        """Return how input `index` of a node lies on the ranks; an absent input counts as replicated."""
        value = node.inputs[index]
        if value is None:
            return REPLICATED
        if is_constant(value):
            return self.constant_uses.get(Use(node, index), REPLICATED)
        return self.specs.get(value, REPLICATED)

    def demand(self, node: onnx_ir.Node, index: int, wanted: Sharded) -> None:
        """Require that input `index` of a node is sharded as `wanted`, going backward until constants are reached.

        Raises:
            Conflict: If the input is sharded differently, or cannot be sharded so.
        """
        value = node.inputs[index]
        if value is None:
            return
        if is_constant(value):
            self._demand_constant(node, index, value, wanted)
            return
        known = self.specs.get(value, REPLICATED)
        if self.agree(known, wanted):
            return
        producer = value.producer()
        if not isinstance(known, Replicated) or producer is None:
            raise Conflict(f"{value.name} is {known}, but must be {wanted}")
        self._backward(self, producer, wanted)
        self._set(value, wanted)
        self._enqueue(self._order[producer])

    def demand_broadcast(self, node: onnx_ir.Node, index: int, wanted: Sharded) -> None:
        """Require that input `index` is sharded as the output, `wanted`, or whole if it broadcasts along that axis."""
        value = node.inputs[index]
        if value is None:
            return
        axis = wanted.axis - ndim_of(node.outputs[0]) + ndim_of(value)
        if axis >= 0 and products(value)[axis] != ONE:
            self.demand(node, index, wanted.at(axis))
        else:
            self.demand_whole(node, index, wanted.at(axis))

    def demand_whole(self, node: onnx_ir.Node, index: int, alike: Sharded) -> None:
        """Raise Conflict unless input `index` is replicated, or sharded exactly as `alike`."""
        found = self.spec(node, index)
        if not isinstance(found, Replicated) and found != alike:
            value = node.inputs[index]
            name = value.name if value is not None else "an absent input"
            raise Conflict(f"{name} is combined with what is {alike}, so it must be replicated, but it is {found}")

    def shrink_target(self, node: onnx_ir.Node, position: int, spec: Sharded, index: int = 1) -> None:
        """Record that element `position` of the target shape, input `index`, must become the length on one rank.

        Raises:
            Conflict: If the same target must be shrunk for another axis or sharding.
        """
        known = self.targets.setdefault(Use(node, index), (position, spec))
        if known[0] != position or not self.agree(known[1], spec):
            raise Conflict(f"its target is shrunk for {known[1]} already, but must be for {spec}")

    def shrink_attribute(self, node: onnx_ir.Node, name: str, spec: Sharded) -> None:
        """Record that an attribute is a number of heads and must become that of one rank."""
        self.attributes[(node, name)] = spec

    def agree(self, first: Spec, second: Spec) -> bool:
        """Return True if both specs are equal, or will be once their seeds have started again with coarser units."""
        if not isinstance(first, Sharded) or not isinstance(second, Sharded) or first == second:
            return first == second
        units = math.gcd(first.units, second.units)
        finer = [spec.seed for spec in (first, second) if spec.units != units]
        if units == 1 or None in finer or first != dataclasses.replace(second, units=first.units):
            return False
        for seed in finer:
            self._coarsen(seed, units)
        return True

    def _coarsen(self, seed: Seed | None, units: int) -> None:
        assert seed is not None
        self.coarser[seed] = math.gcd(units, self.coarser.get(seed, 0))

    def one_sharded(self, specs: Sequence[Spec]) -> Sharded | None:
        """Return the spec on which all sharded ones agree; None if none is sharded.

        Raises:
            Conflict: If they differ, or if one is a shape with lengths on one rank.
        """
        sharded = [spec for spec in specs if isinstance(spec, Sharded)]
        if any(isinstance(spec, LocalDims) for spec in specs):
            raise Conflict("computes with the length of a sharded axis")
        if not all(self.agree(sharded[0], spec) for spec in sharded):
            raise Conflict(f"its inputs are sharded differently: {', '.join(map(str, sharded))}")
        return sharded[0] if sharded else None

    def divide_into(self, spec: Sharded, count: int, what: str) -> None:
        """Make every unit one of `count` things, such as heads, or a group of them; finer units become coarser.

        Raises:
            Conflict: If the units cannot be made so.
        """
        units = math.gcd(count, spec.units)
        if units == spec.units:
            return
        if spec.seed is None or (units == 1 and count != 1):
            raise Conflict(f"has {count} {what}, which are not divided by what is {spec}")
        self._coarsen(spec.seed, units)

    def is_cache_output(self, value: onnx_ir.Value) -> bool:
        """Return True for a graph output that the caller feeds back as `past.*`, so that it stays on its rank."""
        return (value.name or "").startswith("present.")

    def reduce(self, value: onnx_ir.Value) -> None:
        """Record that the value is a partial sum on every rank; an AllReduce follows, so users see it replicated."""
        self.partial[value] = None

    def resolve_mask(self, value: onnx_ir.Value) -> None:
        """Record that rows of a sharded table are needed by all ranks: those of other ranks are masked, then summed."""
        spec = self.specs[value]
        assert isinstance(spec, VocabMasked)
        self.masked[value] = spec
        self._set(value, REPLICATED)

    # The fixed point.

    def _settle(self) -> None:
        while self._queue:
            index = heapq.heappop(self._queue)
            self._queued.discard(index)
            self._visit(self._nodes[index])

    def _complete_outputs(self) -> None:
        """Make sure that graph outputs are what the caller expects: whole, or for the cache as its past is."""
        for value in self.model.graph.outputs:
            spec = self.specs.get(value, REPLICATED)
            if isinstance(spec, VocabMasked):
                self.resolve_mask(value)
            if isinstance(spec, LocalDims):
                raise PassError(f"graph output {value.name!r} is {spec}")
            if self.is_cache_output(value):
                self._check_cache_output(value, spec)

    def _check_cache_output(self, value: onnx_ir.Value, spec: Spec) -> None:
        """Raise PassError unless a cache output is placed as its past is, since it is not gathered.

        In a graph without a past it may also be sharded by heads.
        """
        if self.decoder is None and isinstance(spec, Sharded) and (spec.axis, spec.segments) == (1, ONE):
            return
        expected = self._cache()
        if spec != expected:
            raise PassError(f"graph output {value.name!r}: expected it to be {expected}, as its past is, found {spec}")

    def _seed_inputs(self) -> None:
        """Set the specs of graph inputs: the cache is sharded by key-value heads, all others are replicated."""
        for value in self.model.graph.inputs:
            self.specs[value] = self._cache() if (value.name or "").startswith("past.") else REPLICATED

    def _cache(self) -> Spec:
        """Return the spec of the cache; a single key-value head, which all query heads share, is on every rank."""
        if self.decoder is None or self.decoder.kv_heads == 1:
            return REPLICATED
        # All caches share one seed, since some models keep a copy of a key for every query head of its group.
        first = next(value for value in self.model.graph.inputs if (value.name or "").startswith("past."))
        return Sharded(1, ONE, math.gcd(self.decoder.kv_heads, self.units.get(first, 0)), first)

    def _demand_constant(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value, wanted: Sharded) -> None:
        known = self.constant_uses.setdefault(Use(node, index), wanted)
        if not self.agree(known, wanted):
            raise Conflict(f"{value.name} is {known} here, but must be {wanted}")
        length = products(value)[wanted.axis]
        if length is None or length.divided_by(wanted.segments.times(Product(wanted.units))) is None:
            raise Conflict(f"axis {wanted.axis} of {value.name} ({length}) does not consist of {wanted}")

    def _set(self, value: onnx_ir.Value, spec: Spec) -> None:
        if self.specs.get(value) == spec:
            return
        self.specs[value] = spec
        for node in value.consumers():
            if node in self._order:
                self._enqueue(self._order[node])

    def _enqueue(self, index: int) -> None:
        if index not in self._queued:
            self._queued.add(index)
            heapq.heappush(self._queue, index)

    def _visit(self, node: onnx_ir.Node) -> None:
        try:
            specs = self._forward(self, node)
            for value, spec in zip(node.outputs, specs, strict=True):
                self._computed(value, spec)
        except (Conflict, ValueError) as reason:
            if not self.coarser:  # Otherwise the conflict may vanish when the seeds start again with coarser units.
                raise PassError(
                    f"{describe(node)}: {reason}. Leave shard out for this graph, or change this node so that every "
                    f"rank needs its own part of the value only."
                ) from None

    def _computed(self, value: onnx_ir.Value, spec: Spec) -> None:
        """Set the computed spec of a value, which must agree with what was demanded of it before."""
        before = self.specs.get(value, REPLICATED)
        if value in self.masked and isinstance(spec, VocabMasked):
            return
        if not isinstance(before, Replicated) and not self.agree(before, spec):
            raise Conflict(f"{value.name} is needed {before}, but computed {spec}")
        self._set(value, spec)


def is_constant(value: onnx_ir.Value) -> bool:
    """Return True for an initializer that is no graph input, and for the output of a Constant node."""
    return constant_tensor(value) is not None


def is_weight_side(value: onnx_ir.Value | None) -> bool:
    """Return True if the value is a weight, perhaps transposed, cast, dequantised or normalised."""
    if value is None:
        return False
    if is_constant(value):
        return True
    node = value.producer()
    if node is None or not node.inputs or node.op_type not in _WEIGHT_PATH:
        return False
    return all(item is None or is_weight_side(item) for item in node.inputs)


_WEIGHT_PATH = frozenset(
    {"Transpose", "Cast", "DequantizeLinear", "Identity", "Div", "Mul", "Expand", "Clip", "ReduceL2", "Max"}
)


def describe(node: onnx_ir.Node) -> str:
    """Return the operator and name of a node and, if known, the module of the original model that it comes from."""
    module = node.metadata_props.get(MODULE)
    return called(node) + (f" in {module}" if module else "")
