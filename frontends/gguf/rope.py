"""Translate the rotary positions of a GGUF file, scaling and factors, into terms of transformers' configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: What Llama 3 was trained with; used to name a solution, and the only one if there are too few factors for one.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: The largest relative error of a factor, stored in fp32, that still is the formula's.
_TOLERANCE = 1e-5


def scaling(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return transformers' `rope_scaling` for the keys behind `rope.scaling.`, or None if there is no scaling.

    Raises:
        ValueError: If the kind of scaling or one of its settings is unknown; the message completes "rope scaling …".
    """
    left = dict(settings)
    kind = left.pop("type", "none" if "factor" not in left else "linear")
    left.pop("finetuned", None)  # Whether weights were trained for it; it changes nothing.
    factor = left.pop("factor", 1.0)
    if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in (factor, *left.values())):
        raise ValueError(f"with settings that are no numbers from 0 on: {dict(settings)}")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        left.pop("original_context_length", None)
        found: dict[str, Any] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor}
        for name, own in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if name in left:
                found[own] = left.pop(name)
        if "original_max_position_embeddings" not in found:
            raise ValueError("yarn without the original context length")
    else:
        raise ValueError(f"of type {kind!r} (supported: none, linear, yarn, and the factors of Llama 3)")
    if left:
        raise ValueError(f"{kind} with the settings {', '.join(sorted(left))}")
    return found


def llama3_scaling(factors: Array, base: float) -> dict[str, Any]:
    """Return the settings of Llama 3's scaling from which a file's factors were computed.

    Between two wavelengths the inverse of a factor is linear in the inverse of the wavelength, from 1 / largest to 1.
    So the two ends follow from the factors between them. Only their ratio to the original length matters.

    Raises:
        ValueError: If the factors are not of that formula.
    """
    factors = factors.astype(np.float64).ravel()
    largest = float(factors.max())
    waves = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    for found in ({**_LLAMA3, "factor": largest}, _solved(factors, waves, largest)):
        if found is not None and np.allclose(_llama3(waves, found), factors, rtol=_TOLERANCE, atol=0.0):
            return {"rope_type": "llama3", **found}
    raise ValueError("by factors that are not those of Llama 3's formula")


def _solved(factors: Array, waves: Array, largest: float) -> dict[str, Any] | None:
    between = (factors > 1 + 1e-3) & (factors < largest * (1 - 1e-3))
    if between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, start = np.polyfit(1 / waves[between], smooth, 1)
    length = _LLAMA3["original_max_position_embeddings"]
    low, high = -start / slope * length, (1 - start) / slope * length
    if not 0 < low < high:
        return None
    return {**_LLAMA3, "factor": largest, "low_freq_factor": float(low), "high_freq_factor": float(high)}


def _llama3(waves: Array, settings: Mapping[str, Any]) -> Array:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    smooth = (settings["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    mixed: Array = 1 / ((1 - smooth) / settings["factor"] + smooth)
    return mixed
