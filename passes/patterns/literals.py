"""Compare the numbers and attributes of a pattern with those of a graph.

The matcher and `passopt why` both use these functions, so that they always agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir

from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.patterns.language import Number, Numbers


def attribute_value(node: onnx_ir.Node, name: str, opset: int) -> Any:
    """Return an attribute's value, or the default of ONNX's schema at `opset`; None if there is neither."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return attribute.value
    if node.domain:
        return None
    try:
        default = onnx.defs.get_schema(node.op_type, opset, "").attributes[name].default_value
    except (onnx.defs.SchemaError, KeyError):
        return None
    return onnx.helper.get_attribute_value(default) if default.name else None


def same_attribute(expected: Any, found: Any) -> bool:
    """Return True if an attribute value as written in a pattern equals the value that a node holds."""
    if isinstance(expected, (list, tuple)):
        return found is not None and list(expected) == list(found)
    if isinstance(expected, onnx_ir.DataType):
        return bool(found == expected.value)
    if isinstance(expected, float) and isinstance(found, float):
        return bool(np.float32(expected) == np.float32(found))  # ONNX stores float attributes as float32
    return bool(expected == (found.decode() if isinstance(found, bytes) else found))


def is_constant(pattern: Number | Numbers, value: onnx_ir.Value | None) -> bool:
    """Return True if `value` is a small constant that the pattern matches."""
    array = small_constant(value)
    return array is not None and same_constant(pattern, array)


def same_constant(pattern: Number | Numbers, array: np.ndarray[Any, np.dtype[Any]]) -> bool:
    """Return True if the array is the number (compared in the array's dtype) or the integers of the pattern.

    A number may have one axis at most, as `Rewriter.number` wants it: with more, it may add axes to what it is combined
    with, and the pattern would stand for another shape.
    """
    if isinstance(pattern, Numbers):
        return array.dtype.kind in "iu" and array.reshape(-1).tolist() == list(pattern.values)
    if array.size != 1 or array.ndim > 1:
        return False
    number = array.reshape(-1)[0]
    if pattern.tolerance:
        return abs(float(number) - pattern.value) <= pattern.tolerance * abs(pattern.value)
    if array.dtype.kind in "iub":
        return bool(int(number) == pattern.value)
    with np.errstate(over="ignore"):
        return bool(np.asarray(pattern.value, array.dtype) == number)
