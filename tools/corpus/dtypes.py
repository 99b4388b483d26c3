"""Move numbers between dtypes: inputs as a result declares them, and what a narrow dtype holds of an output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

#: The floats of 16 bits that a cast makes.
_SHORT = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def as_declared(feeds: Mapping[str, Any], proto: onnx.ModelProto) -> dict[str, Any]:
    """Return inputs in the dtypes that a model declares."""
    declared = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    return {
        name: cast(value, declared[name]) if declared.get(name) else value
        for name, value in feeds.items()
        if name in declared
    }


def cast(value: Any, dtype: int) -> Any:
    """Return an array of numbers in an ONNX dtype; anything else stays as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OUS" or dtype == onnx.TensorProto.STRING:
        return value
    with np.errstate(all="ignore"):
        return value.astype(onnx_ir.DataType(dtype).numpy())


def as_held(expected: Any, found: Any) -> Any:
    """Return an expected output with infinities where the dtype of what was found holds no such large numbers."""
    if not all(_is_array_of_floats(item) for item in (expected, found)):
        return expected
    with np.errstate(all="ignore"):
        held = expected.astype(found.dtype).astype(expected.dtype)
    return np.where(np.isinf(held), held, expected)


def _is_array_of_floats(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.dtype.kind in "fV"


def like(found: Any, expected: Any) -> Any:
    """Return an output in the dtype of what is expected, if both are floats."""
    if not isinstance(found, np.ndarray) or not isinstance(expected, np.ndarray):
        return found
    return found.astype(expected.dtype) if all(map(_is_array_of_floats, (found, expected))) else found


def _element(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def short_dtype(path: Path) -> int | None:
    """Return the float of 16 bits that inputs or outputs of a model have, or None."""
    graph = onnx.load(path, load_external_data=False).graph
    return next((kind for kind in map(_element, (*graph.input, *graph.output)) if kind in _SHORT), None)
