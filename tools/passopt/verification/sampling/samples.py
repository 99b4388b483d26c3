"""Make samples of a graph's inputs: lengths and styles of values, to be tried on the graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.verification.sampling.lengths import Lengths, assignments, free_inputs
from passopt.verification.sampling.values import INTEGERS, STYLES, Sampler, Style, index_bounds

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: What an input is fed with: an array, or a list of arrays for a sequence.
Fed: TypeAlias = "Array | list[Array]"


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


def candidates(model: onnx_ir.Model, seed: int = 0) -> Iterator[Sample]:
    """Yield samples to try, the most telling ones first.

    Raises:
        Unsampled: If an input has a type that no value is made for.
    """
    turns = itertools.cycle(STYLES)
    first = None
    for lengths in assignments(model):
        first = first or lengths
        yield made(model, lengths, next(turns), seed)
    assert first is not None
    for style in STYLES:  # each style at lengths that may differ from the ones above
        yield made(model, first, style, seed)
    if any(_is_free_integer(value) for value in model.graph.inputs):
        for turn, integers in enumerate(INTEGERS):
            yield made(model, first, dataclasses.replace(STYLES[turn], integers=integers), seed)


def _is_free_integer(value: onnx_ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def made(model: onnx_ir.Model, lengths: Lengths, style: Style, seed: int = 0) -> Sample:
    """Return a sample of the given lengths and style.

    Raises:
        Unsampled: If an input has a type that no value is made for, or a dimension that follows from nothing known.
    """
    inputs = free_inputs(model)
    bounds = index_bounds(inputs, _length)
    sampler = Sampler(style, lengths.past, bounds, seed)
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


def _length(value: onnx_ir.Value, axis: int) -> int | None:
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    length = value.shape[axis]
    return length if isinstance(length, int) else None
