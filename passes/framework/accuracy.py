"""Declare how exactly a pass keeps the numbers: EXACT, REASSOCIATED or lossy(budget), with the errors they allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir

DataType = onnx_ir.DataType


#: Largest error of one rewrite by the dtype of the value: a rounding step of a sum that a kernel blocks otherwise.
_EXACT: Mapping[DataType, float] = {DataType.FLOAT: 1e-6, DataType.FLOAT16: 1e-3, DataType.BFLOAT16: 8e-3}


#: The same sums in another order, intermediate values in fp32 or not.
_REASSOCIATED: Mapping[DataType, float] = {DataType.FLOAT: 1e-5, DataType.FLOAT16: 5e-3, DataType.BFLOAT16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A declaration, printed as `exact`, `reassociated` or `lossy(0.02)`; made by the names below."""

    kind: str
    budget: float | None = None

    def budget_of(self, dtype: DataType) -> float:
        """The largest relative error that the declaration allows a value of `dtype`; 0 for integers unless lossy."""
        if self.budget is not None:
            return self.budget
        table = _EXACT if self.kind == "exact" else _REASSOCIATED
        return table.get(dtype, table[DataType.FLOAT] if dtype == DataType.DOUBLE else 0.0)

    def __str__(self) -> str:
        return self.kind if self.budget is None else f"{self.kind}({self.budget:g})"


#: The same numbers, but for roundings that depend on how a kernel blocks its sums.
EXACT = Accuracy("exact")


#: Equal in exact arithmetic: sums in another order, intermediate values of another precision.
REASSOCIATED = Accuracy("reassociated")


def lossy(budget: float) -> Accuracy:
    """Other numbers by design, within `budget` for every value that the pass replaces."""
    if not 0 < budget < 1:
        raise ValueError(f"a lossy pass needs a budget between 0 and 1, not {budget}")
    return Accuracy("lossy", budget)
