"""Make cheap tests, once per pattern, that tell whether a value or a node is worth a closer look.

The tests bind no names. They let the matcher give up early at most nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.weights.lazy_weight import is_checkpoint_weight, small_constant
from passopt.passes.patterns.language import Absent, Alternatives, Number, Numbers, Output, Scalar, ValuePattern, Weight
from passopt.passes.patterns.literals import attribute_value, same_attribute, same_constant

Test: TypeAlias = Callable[[Any], bool]
_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Constants:
    """A cache of the small constants of one model, so that all rules of a run read each of them once."""

    def __init__(self) -> None:
        self._arrays: dict[onnx_ir.Value, _Array | None] = {}

    def array(self, value: onnx_ir.Value) -> _Array | None:
        """Return what `small_constant` returns: the array of a small constant, or None."""
        if value.const_value is None:
            node = value.producer()
            if node is None or node.op_type != "Constant":
                return None  # Most values are computed, so remembering them would only cost memory.
        if value not in self._arrays:
            self._arrays[value] = small_constant(value)
        return self._arrays[value]


def input_test(item: ValuePattern, constants: Constants) -> Test | None:
    """Return a test that every matching input passes, whatever is bound; None if every input would pass.

    For numbers and absent inputs the test is complete: what passes it matches. For outputs of nodes it only looks at
    the operator type of the node.
    """
    if isinstance(item, Output):
        return _made_by(frozenset((item.node.op_type,)))
    if isinstance(item, Absent):
        return lambda value: value is None
    if isinstance(item, Weight):
        return lambda value: value is not None and is_checkpoint_weight(value)
    if isinstance(item, Scalar):
        return lambda value: value is not None and (array := constants.array(value)) is not None and array.size == 1
    if isinstance(item, (Number, Numbers)):
        return _constant_test(item, constants)
    if isinstance(item, Alternatives):
        return _any_test(item, constants)
    return None


def _made_by(op_types: frozenset[str]) -> Test:
    if len(op_types) == 1:
        (only,) = op_types
        return lambda value: value is not None and (node := value.producer()) is not None and node.op_type == only
    return lambda value: value is not None and (node := value.producer()) is not None and node.op_type in op_types


def _any_test(item: Alternatives, constants: Constants) -> Test | None:
    choices = tuple(item.choices.values())
    op_types = frozenset(choice.node.op_type for choice in choices if isinstance(choice, Output))
    others = [input_test(choice, constants) for choice in choices if not isinstance(choice, Output)]
    made_by = _made_by(op_types)
    if not others:
        return made_by
    tests = [test for test in others if test is not None]
    if len(tests) < len(others):
        return None
    return lambda value: made_by(value) or any(test(value) for test in tests)


def _constant_test(item: Number | Numbers, constants: Constants) -> Test:
    verdicts: dict[tuple[str, tuple[int, ...], bytes], bool] = {}

    def test(value: onnx_ir.Value | None) -> bool:
        array = constants.array(value) if value is not None else None
        if array is None:
            return False
        key = (array.dtype.char, array.shape, array.tobytes())
        found = verdicts.get(key)
        if found is None:
            found = verdicts[key] = same_constant(item, array)
        return found

    return test


def attribute_reader(name: str, opset: int) -> Callable[[onnx_ir.Node], Any]:
    """Return a function that does the same as `attribute_value`, but looks up each operator's default only once."""
    defaults: dict[str, Any] = {}

    def read(node: onnx_ir.Node) -> Any:
        attribute = node.attributes.data.get(name)
        if attribute is not None:
            return attribute.value
        if node.op_type not in defaults:
            defaults[node.op_type] = attribute_value(node, name, opset)
        return defaults[node.op_type]

    return read


def attribute_test(name: str, expected: Any, opset: int) -> Test:
    """Return a test for nodes whose attribute `name`, or else its default, equals the `expected` value."""
    read = attribute_reader(name, opset)
    return lambda node: same_attribute(expected, read(node))
