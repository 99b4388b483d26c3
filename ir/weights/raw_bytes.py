"""Let a weight file hold dtypes that the safetensors format does not have, such as int4 and float8, as plain bytes."""

from __future__ import annotations

import dataclasses

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression, Source
from passopt.ir.weights.groups import FOUR_BITS, View, packed_bytes
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.sources import SAFETENSORS_NAMES


def stored(weight: Expression, name: str) -> Expression:
    """Return what a weight file holds for a weight: the weight, or its bytes if safetensors does not have its dtype.

    Args:
        weight: The weight.
        name: Its name, for the error.

    Raises:
        ModelError: If the bytes are not there as they are, because the weight is computed from others.
    """
    while isinstance(weight, View):
        weight = weight.operand
    if weight.dtype in SAFETENSORS_NAMES:
        return weight
    if weight.dtype in FOUR_BITS and not isinstance(weight, (Source, Literal)):
        return packed_bytes(weight)
    if not isinstance(weight, (Source, Literal)):
        raise ModelError(
            f"weight {name!r} is {weight.dtype.name}, which can be copied but not cut, padded or cast. "
            f"Leave out the pass that changes it."
        )
    return dataclasses.replace(weight, dtype=DataType.UINT8, shape=(weight.nbytes,))
