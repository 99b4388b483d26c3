"""Convert nodes whose operator changed, so that they keep their meaning in the newer opset.

There is one function per kind of change; `CONVERTERS` lists them by (operator, opset). A converter edits the node in
place, so that its name, metadata and outputs stay, and may insert nodes before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.graph.builder import Builder
from passopt.ir.graph.provenance import set_provenance


class Step:
    """The conversion of one node from opset `version` - 1 to `version`; `fail` refuses it by raising PassError.

    Args:
        node: The node to convert.
        version: The opset to reach.
        place: The graph or function that holds the node.
    """

    def __init__(self, node: onnx_ir.Node, version: int, place: Place) -> None:
        self.node = node
        self.version = version
        self.place = place

    def fail(self, reason: str) -> NoReturn:
        """Raise PassError, which says why the node cannot be converted."""
        raise PassError(
            f"legalize: {self.node.op_type} {self.node.name!r} cannot go from opset {self.version - 1} "
            f"to {self.version}: {reason}"
        )

    def input(self, index: int) -> onnx_ir.Value | None:
        """Return input number `index`; None if the node has no such input or it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute, or the default if it is absent.

        Raises:
            PassError: If the attribute is a parameter of the function that holds the node, so its value is not known.
        """
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.is_ref():
            self.fail(f"its attribute {name} is a parameter of the function that it stands in")
        return attribute.as_int()

    def set_input(self, index: int, value: onnx_ir.Value) -> None:
        """Let the node read `value` as input number `index`, which it need not have had before."""
        self.node.resize_inputs(max(len(self.node.inputs), index + 1))
        self.node.replace_input_with(index, value)

    def builder(self) -> Builder:
        """Return a builder for nodes to insert with `before` or `after`."""
        return Builder(self.version, self.place.unique, self.node.outputs[0].name or self.node.op_type)

    def before(self, builder: Builder) -> None:
        """Insert the nodes of `builder` before the node."""
        self._adopt(builder)
        self.node.prepend(builder.built.nodes)

    def after(self, builder: Builder, result: onnx_ir.Value) -> None:
        """Insert the nodes of `builder` after the node, and let them replace its first output.

        Everything that read the output reads `result` instead, which takes over the output's name, type and shape.
        """
        self._adopt(builder)
        target, inside = self.node.outputs[0], set(builder.built.nodes)
        users = [(use.node, use.idx) for use in target.uses() if use.node not in inside]
        self.node.append(builder.built.nodes)
        graph = self.node.graph
        assert graph is not None
        for index, output in enumerate(graph.outputs):
            if output is target:
                graph.outputs[index] = result
        for node, index in users:
            node.replace_input_with(index, result)
        result.type, result.shape = target.type or result.type, target.shape or result.shape
        name = target.name or "value"
        result.name, target.name = name, self.place.unique(f"{name}.inner")

    def _adopt(self, builder: Builder) -> None:
        assert not builder.built.initializers, "constants come from `constant`, which knows where they may stand"
        for node in builder.built.nodes:
            set_provenance(node, "legalize", [self.node])

    def constant(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> onnx_ir.Value:
        """Return a constant that the node can read: an initializer, or the output of a Constant node in a function."""
        return self.place.constant(name, array, self.node)

    def attribute_to_input(self, name: str, index: int, dtype: Any = np.int64) -> None:
        """Turn the attribute `name` into input `index`, a constant of `dtype`; do nothing if it is absent."""
        attribute = self.node.attributes.pop(name, None)
        if attribute is None:
            return
        if attribute.is_ref():
            self.set_input(index, self._parameter(name, attribute))
        else:
            self.set_input(index, self.constant(name, np.asarray(attribute.value, dtype)))

    def _parameter(self, name: str, attribute: onnx_ir.Attr) -> onnx_ir.Value:
        """Return the value of a Constant node that holds an attribute parameter of the enclosing function."""
        kinds = {onnx_ir.AttributeType.INTS: "value_ints", onnx_ir.AttributeType.FLOAT: "value_float"}
        inner = onnx_ir.RefAttr(kinds[attribute.type], attribute.ref_attr_name or "", attribute.type)
        node = onnx_ir.Node("", "Constant", [], [inner], name=self.place.unique(f"{self.node.name}/Constant"))
        node.outputs[0].name = self.place.unique(name)
        set_provenance(node, "legalize", [self.node])
        self.node.prepend(node)
        return node.outputs[0]


class Place:
    """The graph or function in which nodes are converted; it makes names and constants for all of them.

    Args:
        container: The graph or function.
        unique: Returns its argument, or a name like it that nothing else has.
    """

    def __init__(self, container: onnx_ir.Graph | onnx_ir.Function, unique: Callable[[str], str]) -> None:
        self.container = container
        self.unique = unique
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx_ir.Value] = {}

    def constant(self, name: str, array: np.ndarray[Any, np.dtype[Any]], user: onnx_ir.Node) -> onnx_ir.Value:
        """Return a constant for the node `user`.

        Equal constants of a graph are one initializer. A function has no initializers, so there the constant is the
        output of a new Constant node before `user`.
        """
        tensor = onnx_ir.tensor(array, name=name)
        if isinstance(self.container, onnx_ir.Function):
            attribute = onnx_ir.AttrTensor("value", tensor)
            node = onnx_ir.Node("", "Constant", [], [attribute], name=self.unique(f"{user.name}/Constant"))
            node.outputs[0].name = self.unique(name)
            set_provenance(node, "legalize", [user])
            user.prepend(node)
            return node.outputs[0]
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            value = onnx_ir.Value(
                name=self.unique(name),
                shape=onnx_ir.Shape(array.shape),
                type=onnx_ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.container.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


def axes_to_input(step: Step) -> None:
    """Turn the axes of reductions, Squeeze and Unsqueeze into an input, as ONNX did in opsets 13 and 18."""
    step.attribute_to_input("axes", 1)


def sizes_to_input(step: Step) -> None:
    """Turn the sizes of a Split into an input, as ONNX did in opset 13."""
    step.attribute_to_input("split", 1)


def count_outputs(step: Step) -> None:
    """State the number of outputs of a Split without sizes, which opset 18 requires."""
    if step.input(1) is None:
        step.node.attributes["num_outputs"] = onnx_ir.AttrInt64("num_outputs", len(step.node.outputs))


def ratio_to_input(step: Step) -> None:
    """Turn the ratio of a Dropout into an input, as ONNX did in opset 12; it drops nothing in inference anyway."""
    dtype = step.node.inputs[0].dtype if step.node.inputs[0] is not None else None
    if step.node.attributes.get("ratio") is not None and dtype is None:
        step.fail(f"the dtype of {step.node.inputs[0]} is unknown, its ratio needs the same")
    step.attribute_to_input("ratio", 1, dtype.numpy() if dtype is not None else np.float32)


def one_axis(step: Step) -> None:
    """Convert a Softmax, LogSoftmax or Hardmax to opset 13, in which it normalises over one axis only.

    Before, it normalised over all axes from `axis` on. If that is more than the last axis, these axes are flattened
    into one before the node, and the shape is restored behind it.
    """
    node, source = step.node, step.node.inputs[0]
    assert source is not None
    attribute = node.attributes.get("axis")
    axis = attribute if attribute is not None else onnx_ir.AttrInt64("axis", 1)
    ndim = len(source.shape) if source.shape is not None else None
    if not axis.is_ref() and axis.as_int() in {-1, None if ndim is None else ndim - 1}:
        node.attributes["axis"] = axis
        return
    front = step.builder()
    flat = front.Flatten(source)
    front.built.nodes[-1].attributes["axis"] = axis
    shape = front.Shape(source)
    step.before(front)
    node.replace_input_with(0, flat)
    node.attributes["axis"] = onnx_ir.AttrInt64("axis", -1)
    back = step.builder()
    inner = node.outputs[0]
    step.after(back, back.Reshape(inner, shape))
    inner.shape = flat.shape


def floats_only(step: Step) -> None:
    """Refuse an Erf of integers, which opset 13 no longer has."""
    dtype = step.node.inputs[0].dtype if step.node.inputs[0] is not None else None
    if dtype is not None and not dtype.is_floating_point():
        step.fail(f"it no longer takes {dtype.name}")


def inference_only(step: Step) -> None:
    """Drop the outputs of a BatchNormalization other than Y, whose meaning in training changed in opset 14.

    A node of which such an output is used is refused.
    """
    extra = [value.name for value in step.node.outputs[1:] if value.uses() or value.is_graph_output()]
    if extra:
        step.fail(f"its training outputs {', '.join(map(str, extra))} changed their meaning")
    step.node.resize_outputs(1)


def scale_per_channel(step: Step) -> None:
    """Repeat the scale and bias of a GroupNormalization for every channel of a group, as opset 21 expects them.

    Before, they had one element per group. The number of channels must be known.
    """
    source, groups = step.node.inputs[0], step.integer("num_groups", 0)
    channels = source.shape[1] if source is not None and source.shape is not None and len(source.shape) > 1 else None
    if not isinstance(channels, int):
        step.fail("the number of channels of its input is unknown")
    for index in (1, 2):
        per_group = step.node.inputs[index]
        axes = step.constant("axes", np.array([1], np.int64))
        sizes = step.constant("sizes", np.array([groups, channels // groups], np.int64))
        flat = step.constant("flat", np.array([-1], np.int64))
        builder = step.builder()
        per_channel = builder.Reshape(builder.Expand(builder.Unsqueeze(per_group, axes), sizes), flat)
        step.before(builder)
        step.node.replace_input_with(index, per_channel)


def no_unsigned_zero_floats(step: Step) -> None:
    """Refuse casts to the FNUZ float8 types, which opset 24 gives the largest number for infinity instead of NaN."""
    attribute = step.node.attributes.get("to")
    to = attribute.value if attribute is not None and not attribute.is_ref() else step.node.outputs[0].dtype
    if to in {onnx_ir.DataType.FLOAT8E4M3FNUZ, onnx_ir.DataType.FLOAT8E5M2FNUZ}:
        step.fail(f"the cast of infinities to {onnx_ir.DataType(to).name} changed")


#: A function that converts the node of a step in place.
Converter = Callable[[Step], None]

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

#: The converter for each operator and the opset in which it changed.
CONVERTERS: Mapping[tuple[str, int], Converter] = {
    ("Dropout", 12): ratio_to_input,
    ("Softmax", 13): one_axis,
    ("LogSoftmax", 13): one_axis,
    ("Hardmax", 13): one_axis,
    ("Erf", 13): floats_only,
    ("ReduceSum", 13): axes_to_input,
    ("Squeeze", 13): axes_to_input,
    ("Unsqueeze", 13): axes_to_input,
    ("Split", 13): sizes_to_input,
    ("BatchNormalization", 14): inference_only,
    **{(f"Reduce{kind}", 18): axes_to_input for kind in _REDUCTIONS},
    ("Split", 18): count_outputs,
    ("GroupNormalization", 21): scale_per_channel,
    ("Cast", 24): no_unsigned_zero_floats,
    ("CastLike", 24): no_unsigned_zero_floats,
}
