"""Make samples of a graph's inputs: lengths and styles of values, to be tried on the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.verification.sampling.hints import computed_integers
from passopt.verification.sampling.lengths import Lengths, free_inputs
from passopt.verification.sampling.values import Sampler, Style, index_bounds

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: What an input is fed with: an array, or a list of arrays for a sequence.
Fed: TypeAlias = "Array | list[Array]"

#: The styles of floats that lossy passes are judged on.
ORDINARY = frozenset({"normal", "coarse"})
#: Numbers of a mask to add that are this low hide a position.
_HIDDEN = -1e4


class Unsampled(Exception):
    """Raised for an input that no value can be made for; its message is the reason that reports show."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values for all inputs of a graph, with the lengths and the style that they were drawn by."""

    lengths: Lengths
    style: Style
    feeds: Mapping[str, Fed]

    def __str__(self) -> str:
        return f"{self.lengths}; {self.style}"


def made(model: onnx_ir.Model, lengths: Lengths, style: Style, seed: int = 0) -> Sample:
    """Return a sample of the given lengths and style.

    Raises:
        Unsampled: If an input has a type that no value is made for, or a dimension that follows from nothing known.
    """
    inputs = free_inputs(model)
    bounds = index_bounds(inputs, length_of)
    computed = computed_integers(model) if style.integers in {"near", "wide"} else frozenset()
    sampler = Sampler(style, lengths.past, bounds, seed, computed)
    return Sample(lengths, style, {value.name or "": _fed(value, lengths, sampler) for value in inputs})


def _fed(value: onnx_ir.Value, lengths: Lengths, sampler: Sampler) -> Fed:
    name = value.name or ""
    if isinstance(value.type, onnx_ir.SequenceType):
        dtype = value.type.dtype
        shape = lengths.shape_of(value) or ()
        return [sampler.sample(f"{name}.{index}", dtype, shape) for index in range(3)]
    if value.dtype is None or not isinstance(value.type, (onnx_ir.TensorType, type(None))):
        raise Unsampled(f"the input {name} has the type {value.type}, for which no values are made")
    found = lengths.shape_of(value)
    if found is None:
        raise Unsampled(f"the shape of the input {name} is unknown")
    return sampler.sample(name, value.dtype, found)


def length_of(value: onnx_ir.Value, axis: int) -> int | None:
    """Return the stated length of an axis; None if it is unknown or a symbol."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    length = value.shape[axis]
    return length if isinstance(length, int) else None


def hidden_rows(name: str, array: Any) -> Array | None:
    """Return which rows of a mask to add hide all positions, of which each dtype makes something else.

    The result is None for anything but such a mask.
    """
    if "mask" not in name.lower() or not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind in "iubO":
        return None
    rows: Array = np.asarray((array.astype(np.float64) <= _HIDDEN).all(axis=-1, keepdims=True))
    return rows if array.shape[-1] else np.zeros_like(rows)


def hides_a_row(feeds: Mapping[str, Fed]) -> bool:
    """Return whether some mask among the inputs hides all positions of a row."""
    found = (hidden_rows(name, array) for name, array in feeds.items())
    return any(rows is not None and bool(rows.any()) for rows in found)
