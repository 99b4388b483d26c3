"""Find the tensor-parallel degrees that a model allows, and what blocks the others.

`passopt plan` prints this, and `shard` names it in its errors.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import onnx_ir

from passopt.ir.graph.completion import complete_types
from passopt.passes.sharding.placement import Sharded
from passopt.passes.sharding.propagate import Propagation, is_constant
from passopt.passes.sharding.rules import propagate

_LARGEST_DEGREE = 64


@dataclasses.dataclass(frozen=True)
class Group:
    """The sharded tensors that are divided into the same number of units, such as heads or vocabulary rows.

    Attributes:
        units: The number of units.
        example: The name of one of the tensors.
        tensors: How many tensors there are.
    """

    units: int
    example: str
    tensors: int


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """A summary of how a model would be sharded, which is the same for every degree.

    Attributes:
        groups: The sharded tensors, grouped by their number of units.
        sharded: Pairs of the name of a sharded tensor and a description of its sharding.
        replicated: The names of the weights that every rank holds whole.
        all_reduces: The number of AllReduce.
        all_gathers: The number of AllGather.
    """

    groups: tuple[Group, ...]
    sharded: tuple[tuple[str, str], ...]
    replicated: tuple[str, ...]
    all_reduces: int
    all_gathers: int

    @property
    def legal_degrees(self) -> tuple[int, ...]:
        """Return the degrees from 2 to 64 that divide the units of every group, so that nothing is padded."""
        common = math.gcd(*(group.units for group in self.groups)) if self.groups else 0
        return tuple(degree for degree in range(2, min(common, _LARGEST_DEGREE) + 1) if common % degree == 0)

    def blockers(self, degree: int) -> list[Group]:
        """Return the groups whose units cannot be divided by the degree."""
        return [group for group in self.groups if group.units % degree]


def make_plan(model: onnx_ir.Model) -> ShardPlan:
    """Find out how a model would be sharded, without changing it except for missing types.

    Raises:
        PassError: If the model cannot be sharded.
    """
    complete_types(model)
    return plan_of(propagate(model))


def plan_of(state: Propagation) -> ShardPlan:
    """Summarise a finished propagation as a `ShardPlan`."""
    tensors: dict[str, Sharded] = {}
    for use, spec in state.constant_uses.items():
        value = use.node.inputs[use.index]
        if value is not None and value.name is not None:
            tensors[value.name] = spec
    by_units: dict[int, list[str]] = collections.defaultdict(list)
    for name, spec in tensors.items():
        by_units[spec.units].append(name)
    groups = tuple(Group(units, names[0], len(names)) for units, names in sorted(by_units.items()))
    weights = [name for name, value in state.model.graph.initializers.items() if is_constant(value)]
    replicated = tuple(name for name in weights if name not in tensors)
    outputs = [value for value in state.model.graph.outputs if isinstance(state.specs.get(value), Sharded)]
    gathers = sum(not state.is_cache_output(value) for value in outputs)
    described = tuple((name, str(spec)) for name, spec in tensors.items())
    return ShardPlan(groups, described, replicated, len(state.partial) + len(state.masked), gathers)
