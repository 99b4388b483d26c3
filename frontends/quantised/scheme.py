"""Say which quantised checkpoints export takes, and read their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from passopt.frontends.quantised import compressed_tensors, gptq
from passopt.frontends.quantised.small_tensors import read
from passopt.ir.errors import ModelError
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.expressions import DataType, Expression, Source

SUPPORTED = (
    "compressed-tensors (int-quantized and pack-quantized) and GPTQ, symmetric, of 8 bits with a scale per channel, or "
    "of 4 bits in groups of 32, 64 or 128"
)
#: By how much rounding a scale may change it: what rounding does to numbers that a 16-bit dtype holds as normal ones.
_LEAST_PRECISION = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: "compressed-tensors" or "gptq".
        settings: What its configuration says.
    """

    method: str
    settings: Mapping[str, Any]

    @property
    def quantises_activations(self) -> bool:
        """Return whether the checkpoint is meant to run with int8 activations."""
        return self.method == compressed_tensors.METHOD and compressed_tensors.activations_of(self.settings)

    def weights(self, tensors: Mapping[str, Source], where: Path) -> Mapping[str, Expression]:
        """Return the tensors with every quantised weight as a lazy weight under its name in the float model.

        Args:
            tensors: The tensors of the files by name.
            where: The checkpoint, for messages.

        Raises:
            ModelError: If tensors do not fit together, if they cannot be taken exactly, or if none is quantised.
        """
        if self.method == gptq.METHOD:
            found = gptq.weights_of(tensors, self.settings, where)
        else:
            found = compressed_tensors.weights_of(tensors, self.settings, where)
        if not any(isinstance(weight, Dequantized) for weight in found.values()):
            raise ModelError(
                f"{where}: its configuration says {self.method}, and no weight is quantised. Remove "
                f"quantization_config from config.json if they are floats"
            )
        return found


def scheme_of(settings: Mapping[str, Any], where: str) -> tuple[Scheme | None, list[str]]:
    """Return the scheme that settings describe, or None and the reasons why it cannot be exported exactly.

    Args:
        settings: The `quantization_config` of config.json, or the content of quantize_config.json.
        where: Where it stands, for messages about values of a wrong kind.
    """
    method = settings.get("quant_method")
    for room in (compressed_tensors, gptq):
        if method == room.METHOD:
            reasons = list(room.refusals(settings, where))
            return (None if reasons else Scheme(room.METHOD, settings)), reasons
    return None, []


def rounded_scales(tensors: Mapping[str, Expression], dtype: DataType, where: Path) -> tuple[int, int]:
    """Return how many scales of quantised weights a dtype does not hold exactly, and how many there are.

    Args:
        tensors: The tensors of a checkpoint, by name.
        dtype: The dtype of the graph, to which scales are rounded.
        where: The checkpoint, for messages.

    Raises:
        ModelError: If a scale is no finite number, or is too small or too large for the dtype.
    """
    changed = total = 0
    for name, weight in tensors.items():
        if not isinstance(weight, Dequantized):
            continue
        exact, rounded = (read(scales).astype("f8") for scales in (weight.scales, weight.scales.cast(dtype)))
        if not np.isfinite(exact).all():
            raise ModelError(f"{where}: the scales of {name!r} hold NaN or infinity; the checkpoint is damaged")
        off = abs(rounded - exact) > _LEAST_PRECISION * abs(exact)
        if off.any():
            raise ModelError(
                f"{where}: {dtype.name} does not hold the scale {exact[off][0]:.3g} of {name!r}, so that its codes "
                f"would stand for other weights; export with `dtype=fp32`"
            )
        changed, total = changed + int((rounded != exact).sum()), total + exact.size
    return changed, total
