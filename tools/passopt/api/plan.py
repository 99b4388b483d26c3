"""Find the legal degrees of tensor parallelism, and what blocks the others: `passopt.plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from passopt.api.model import Model, ModelLike, changeable
from passopt.ir.errors import UsageError
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.sharding.legal_degrees import ShardPlan, make_plan
from passopt.reporting.result import Result

#: The degrees for which blockers are listed.
_DEGREES = (2, 3, 4, 5, 6, 8, 10, 16, 20, 32)


@dataclasses.dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """The result of `plan`: the ways in which a model can be sharded.

    Attributes:
        found: The findings of the propagation: groups of weights by their number of units, sharded and replicated
            tensors.
    """

    found: ShardPlan

    @property
    def legal_degrees(self) -> tuple[int, ...]:
        """Return the degrees from 2 on that need no padding."""
        return self.found.legal_degrees

    @property
    def ok(self) -> bool:
        """Return whether any degree is legal without padding."""
        return bool(self.legal_degrees)

    def to_text(self, degrees: Sequence[int] = _DEGREES) -> str:
        """Return the legal degrees, the collectives, the groups of weights, and what blocks each degree.

        Args:
            degrees: The degrees to list.
        """
        found = self.found
        lines = [
            f"legal degrees: {', '.join(map(str, found.legal_degrees)) or 'none without padding'}",
            f"collectives: {found.all_reduces} AllReduce, {found.all_gathers} AllGather",
            f"sharded: {len(found.sharded)} tensors; replicated: {len(found.replicated)}",
            *(
                f"  {group.units:7d} units  {group.tensors:4d} tensors such as {group.example}"
                for group in found.groups
            ),
            "degree  blocked by",
        ]
        for degree in degrees:
            blockers = [f"{item.units} units of {item.example}" for item in found.blockers(degree)]
            lines.append(f"{degree:6d}  {', '.join(blockers) or 'nothing'}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        blockers = {
            str(degree): [dataclasses.asdict(item) for item in self.found.blockers(degree)] for degree in _DEGREES
        }
        return {**dataclasses.asdict(self.found), "legal_degrees": self.found.legal_degrees, "blockers": blockers}


def plan(model: ModelLike) -> PlanResult:
    """Find the degrees at which a model can be sharded, without changing it.

    Args:
        model: A model, or its path.

    Returns:
        The legal degrees, and what blocks the others.

    Raises:
        UsageError: The model is sharded already.
        ModelError: There is no model at the path, or it is damaged.
        PassError: The model cannot be sharded at all; the message names the node.
    """
    found = changeable(model)
    if found.degree > 1:
        shown = found.path if isinstance(model, Model) else model
        raise UsageError(f"{shown}: is sharded already, degree {found.degree}; plan the unsplit model")
    run_passes(found.ir, resolve("fold-norm-head,inject-norm-head-bias").passes)
    return PlanResult(make_plan(found.ir))
