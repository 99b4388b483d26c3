"""Declare how exactly a pass preserves the numbers: as EXACT, REASSOCIATED or lossy(budget).

Every declaration allows a relative error per dtype. `--verify-each=numeric` and the `check_pass` test fixture measure
max|difference| / max|reference| of what a pass replaced, and compare it with that allowance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir

DataType = onnx_ir.DataType


#: The largest relative error that EXACT allows one rewrite, by the dtype of the value. It is not 0, because a kernel
#: may split a sum into other blocks, which rounds differently.
_EXACT: Mapping[DataType, float] = {DataType.FLOAT: 1e-6, DataType.FLOAT16: 1e-3, DataType.BFLOAT16: 8e-3}


#: The largest relative error that REASSOCIATED allows, by dtype: sums in another order, and intermediate values that
#: are in fp32 on one side only.
_REASSOCIATED: Mapping[DataType, float] = {DataType.FLOAT: 1e-5, DataType.FLOAT16: 5e-3, DataType.BFLOAT16: 2e-2}


@dataclasses.dataclass(frozen=True)
class QualityBar:
    """How far a lossy pass may move the predictions of a language model whose linears it changes all.

    Attributes:
        kl: The largest mean KL divergence of next-token distributions from the original, in nats.
        kl99: The largest 99th percentile of that divergence over positions.
        top1: The smallest share of positions of a text at which both models predict the same token.
    """

    kl: float
    kl99: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A declared accuracy, printed as `exact`, `reassociated` or `lossy(0.02)`.

    Use EXACT, REASSOCIATED or `lossy(budget)` instead of calling this class.

    Attributes:
        kind: "exact", "reassociated" or "lossy".
        budget: The largest relative error that a lossy pass may cause; None for the other two kinds.
        bar: How far a lossy pass may move predictions; None if it declares nothing of them.
    """

    kind: str
    budget: float | None = None
    bar: QualityBar | None = None

    def budget_of(self, dtype: DataType) -> float:
        """Return the largest relative error that is allowed for a value of `dtype`; 0 for integers unless lossy."""
        if self.budget is not None:
            return self.budget
        table = _EXACT if self.kind == "exact" else _REASSOCIATED
        return table.get(dtype, table[DataType.FLOAT] if dtype == DataType.DOUBLE else 0.0)

    def __str__(self) -> str:
        return self.kind if self.budget is None else f"{self.kind}({self.budget:g})"


#: The pass computes the same numbers, except for roundings that depend on how a kernel splits its sums into blocks.
EXACT = Accuracy("exact")


#: The pass is equal in exact arithmetic, but orders sums differently or changes the precision of intermediate values.
REASSOCIATED = Accuracy("reassociated")


def lossy(budget: float, *, bar: QualityBar | None = None) -> Accuracy:
    """Declare that a pass changes the numbers by design, as quantization does, but by no more than `budget`.

    Args:
        budget: The largest allowed relative error, max|difference| / max|reference|, of every value that the pass
            replaces; more than 0 and less than 1.
        bar: How far the pass may move the predictions of a language model, which `passopt verify` judges.

    Returns:
        The declaration for the class attribute `accuracy` of a pass.

    Raises:
        ValueError: If `budget` is not between 0 and 1.

    Example:
        ``accuracy = lossy(2e-2)`` in the body of a pass allows an error of 2 %.
    """
    if not 0 < budget < 1:
        raise ValueError(f"a lossy pass needs a budget between 0 and 1, not {budget}")
    return Accuracy("lossy", budget, bar)
