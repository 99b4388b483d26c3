"""Convert one node to an older opset, if the older operator is known to have all that the node uses."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx
import onnx_ir

from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.opset.changes import DECOMPOSED_BY, UNCHANGED, changes
from passopt.passes.opset.image_converters import RENAMED_MODES
from passopt.passes.opset.meanings import check_meaning
from passopt.passes.opset.step import INLINE, OF_FUNCTION, refuse

Formal = onnx.defs.OpSchema.FormalParameter

#: Changes whose converter edits nothing and only refuses a rare dtype, so that nodes can be lowered without one.
_REVERSIBLE = frozenset({("Cast", 24), ("CastLike", 24)})
#: Values of attributes that came with an opset, while the attribute itself is older.
_NEW_VALUES: Mapping[tuple[str, int], tuple[str, frozenset[str]]] = {
    ("Pad", 19): ("mode", frozenset({"wrap"})),
    ("Resize", 19): ("coordinate_transformation_mode", frozenset({"half_pixel_symmetric"})),
}


def lower_node(node: onnx_ir.Node, version: int, *, typed: bool) -> int:
    """Convert a node, whose operator changed in opset `version`, to the opset before; raise PassError if that fails.

    Args:
        node: The node, which is changed in place.
        version: The opset that the node has.
        typed: Check the dtypes too. Inside of functions they are unknown; there the calls have to be checked.

    Returns:
        1 if the node was edited, and 0 otherwise.
    """
    if changes(node.op_type)[0] == version:
        is_inside = not typed or OF_FUNCTION in node.metadata_props
        _refuse_new_operator(node, version, is_inside_function=is_inside)
    converter = _CONVERTERS.get((node.op_type, version))
    if converter is not None:
        converter(node)
    elif node.op_type not in UNCHANGED.get(version, ()) and (node.op_type, version) not in _REVERSIBLE:
        refuse(node, version, version - 1, "its operator changed, and no conversion of it is known")
    check_meaning(node, version, version, version - 1)
    _check_values(node, version)
    dropped = _drop_defaults(node, version)
    _check_inputs(node, version)
    if typed:
        _check_types(node, version)
    return int(converter is not None or dropped)


def _refuse_new_operator(node: onnx_ir.Node, version: int, *, is_inside_function: bool) -> NoReturn:
    """Refuse a node whose operator came with opset `version`, and say which pass takes it apart, and what keeps it."""
    hint = DECOMPOSED_BY.get(node.op_type)
    if hint is None:
        refuse(node, version, version - 1, "no such operator there, and passopt knows no decomposition of it")
    first = f"inline-functions,{hint}" if is_inside_function else hint
    advice = f"Run {first} first; `passopt why {hint} MODEL` tells what keeps it from a node."
    refuse(node, version, version - 1, "no such operator there", advice)


def _check_values(node: onnx_ir.Node, version: int) -> None:
    """Refuse an attribute whose value the older operator does not know."""
    name, values = _NEW_VALUES.get((node.op_type, version), ("", frozenset()))
    attribute = node.attributes.get(name)
    if attribute is None:
        return
    if attribute.is_ref():
        refuse(node, version, version - 1, f"its attribute {name} is a parameter of its function", INLINE)
    if attribute.as_string() in values:
        refuse(node, version, version - 1, f"{name} = {attribute.as_string()} has no equivalent there")


def _drop_defaults(node: onnx_ir.Node, version: int) -> bool:
    """Remove attributes that the older operator lacks, if they have their default value; refuse any other value.

    Returns True if an attribute was removed.
    """
    newer, older = (_schema(node.op_type, number) for number in (version, version - 1))
    unknown = [name for name in node.attributes if name not in older.attributes]
    for name in unknown:
        attribute = node.attributes[name]
        if attribute.is_ref():
            refuse(node, version, version - 1, f"its attribute {name} is a parameter of its function", INLINE)
        if not _is_default(newer, name, attribute.value):
            refuse(node, version, version - 1, f"the attribute {name} = {attribute.value} has no equivalent there")
        del node.attributes[name]
    return bool(unknown)


def _is_default(schema: onnx.defs.OpSchema, name: str, found: Any) -> bool:
    """Return True if an attribute says what its absence says: its default, or a step of 1 along every axis."""
    if name == "dilations":
        return all(step == 1 for step in found)
    default = schema.attributes[name].default_value
    expected = onnx.helper.get_attribute_value(default) if default.name else None
    return bool(found == (expected.decode() if isinstance(expected, bytes) else expected))


def _check_inputs(node: onnx_ir.Node, version: int) -> None:
    """Refuse an input that the older operator lacks, unless it is absent."""
    older = _schema(node.op_type, version - 1)
    while node.inputs and node.inputs[-1] is None and len(node.inputs) > older.max_input:
        node.resize_inputs(len(node.inputs) - 1)
    if len(node.inputs) > older.max_input:
        name = _schema(node.op_type, version).inputs[older.max_input].name
        refuse(node, version, version - 1, f"the input {name} has no equivalent there")


def _check_types(node: onnx_ir.Node, version: int) -> None:
    """Refuse a node unless the older operator is known to take its inputs and outputs in their types."""
    newer, older = (_schema(node.op_type, number) for number in (version, version - 1))
    sides = ((node.inputs, newer.inputs, older.inputs), (node.outputs, newer.outputs, older.outputs))
    for value, before, after in itertools.chain.from_iterable(_paired(*side) for side in sides):
        if value is None or not value.name:
            continue
        if value.type is None and not before.types <= after.types:
            reason = f"the dtype of {value.name} is unknown, and opset {version - 1} takes fewer as {after.name}"
            refuse(node, version, version - 1, reason)
        if value.type is not None and (found := _spelled(value.type)) not in after.types:
            shown = value.dtype.name if value.dtype is not None and found.startswith("tensor") else found
            refuse(node, version, version - 1, f"{after.name} cannot be {shown} there ({value.name})")


def _paired(
    values: Sequence[onnx_ir.Value | None], newer: Sequence[Formal], older: Sequence[Formal]
) -> Iterator[tuple[onnx_ir.Value | None, Formal, Formal]]:
    """Pair each value with its formal parameters; further values belong to the last one, which may be variadic."""
    for index, value in enumerate(values):
        yield value, newer[min(index, len(newer) - 1)], older[min(index, len(older) - 1)]


def _spelled(kind: onnx_ir.TypeProtocol) -> str:
    """Return a type as operator schemas spell it, such as `seq(tensor(float))`."""
    for outer, name in ((onnx_ir.SequenceType, "seq"), (onnx_ir.OptionalType, "optional")):
        if isinstance(kind, outer):
            return f"{name}({_spelled(kind.elem_type)})"
    prefix = "sparse_tensor" if isinstance(kind, onnx_ir.SparseTensorType) else "tensor"
    return f"{prefix}({onnx.TensorProto.DataType.Name(kind.dtype.value).lower()})"


@functools.cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, version, "")


def _old_modes(node: onnx_ir.Node) -> None:
    """Rename the mode of a GridSample, and refuse any number of axes but that of an image."""
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        shape = None if source is None else source.shape
        reason = f"it samples images [n, c, h, w] only there, and its input has the shape {shape}"
        refuse(node, 20, 19, reason, INLINE if shape is None else "")
    attribute = node.attributes.get("mode")
    if attribute is not None and attribute.is_ref():
        refuse(node, 20, 19, "its attribute mode is a parameter of its function", INLINE)
    mode = attribute.as_string() if attribute is not None else "linear"
    older = next((old for old, new in RENAMED_MODES.items() if new == mode), mode)
    node.attributes["mode"] = onnx_ir.AttrString("mode", older)


def _axis_to_attribute(node: onnx_ir.Node) -> None:
    """Turn the axis of a DFT back into an attribute; without one, it is the last axis but one."""
    axis = np.array(-2)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        found = small_constant(node.inputs[2])
        if found is None:
            refuse(node, 20, 19, f"its axis {node.inputs[2].name} is not constant")
        axis = found
        node.resize_inputs(2)
    node.attributes["axis"] = onnx_ir.AttrInt64("axis", int(axis.reshape(())))


#: Conversions to the opset before the one of the key.
_CONVERTERS: Mapping[tuple[str, int], Callable[[onnx_ir.Node], None]] = {
    ("DFT", 20): _axis_to_attribute,
    ("GridSample", 20): _old_modes,
}
