"""Edit one node whose operator changed: `Step` is its conversion by one opset, `Place` the graph that it stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.graph.builder import Builder
from passopt.ir.graph.provenance import called, set_provenance

#: What to do about a node whose dtypes or attributes depend on the call of the function that it stands in.
INLINE = "Run inline-functions first."
#: The metadata of nodes of a copy without calls, where it says what a node was called in the function it stood in.
OF_FUNCTION = "passopt.of_function"


def refuse(node: onnx_ir.Node, given: int, wanted: int, reason: str, advice: str = "") -> NoReturn:
    """Raise PassError, which names a node that cannot be converted, and says why and what to do.

    Args:
        node: The node.
        given: The opset that the node has.
        wanted: The next opset, up or down, that it cannot have.
        reason: Why, as a clause without a final period.
        advice: The next step, as a sentence; by default, to stay at the opset that the node has.
    """
    advice = advice or f"Change that node, or stay at opset {given}: legalize{{opset={given}}}."
    where = node.metadata_props.get(OF_FUNCTION) or called(node)
    raise PassError(f"legalize: {where} cannot go from opset {given} to {wanted}: {reason}. {advice}")


class Step:
    """The conversion of one node from opset `version` - 1 to `version`; `fail` refuses it by raising PassError.

    Args:
        node: The node to convert.
        version: The opset to reach in this step.
        place: The graph or function that holds the node.
        target: The opset that the model has in the end.
    """

    def __init__(self, node: onnx_ir.Node, version: int, place: Place, target: int) -> None:
        self.node = node
        self.version = version
        self.place = place
        self.target = target

    def fail(self, reason: str, advice: str = "") -> NoReturn:
        """Raise PassError, which says why the node cannot be converted, and what to do."""
        refuse(self.node, self.version - 1, self.version, reason, advice)

    def source(self) -> onnx_ir.Value:
        """Return the first input, which every operator that is converted has."""
        value = self.node.inputs[0]
        assert value is not None, f"{called(self.node)} has no input"
        return value

    def dtype(self, what: str) -> onnx_ir.DataType:
        """Return the dtype of the first input, which the new input `what` must have too; refuse if it is unknown."""
        value = self.source()
        if value.dtype is None:
            self.fail(f"the dtype of {value.name} is unknown, and {what} needs the same", INLINE)
        return value.dtype

    def text(self, name: str, default: str) -> str:
        """Return a text attribute, or the default if it is absent; refuse a parameter of a function."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.is_ref():
            self.fail(f"its attribute {name} is a parameter of the function that it stands in", INLINE)
        return attribute.as_string()

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
            self.fail(f"its attribute {name} is a parameter of the function that it stands in", INLINE)
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

    def attribute_to_input(self, name: str, index: int, dtype: Any = np.int64, *, ndim: int | None = None) -> None:
        """Turn the attribute `name` into input `index`, a constant of `dtype`; do nothing if it is absent.

        With `ndim`, the constant has that many axes: 1 makes a vector of a single number.
        """
        attribute = self.node.attributes.pop(name, None)
        if attribute is None:
            return
        if attribute.is_ref():
            self.set_input(index, self._parameter(name, attribute, dtype, ndim))
            return
        with np.errstate(over="ignore"):  # A bound beyond fp16 is infinite there, as the operator itself made it.
            array = np.asarray(attribute.value).astype(dtype)
        self.set_input(index, self.constant(name, array.reshape(-1) if ndim == 1 else array))

    def _parameter(self, name: str, attribute: onnx_ir.Attr, dtype: Any, ndim: int | None) -> onnx_ir.Value:
        """Return the value of a Constant node that holds an attribute parameter of the enclosing function."""
        kind = _PARAMETERS.get(attribute.type)
        if kind is None or np.dtype(kind[1]) != np.dtype(dtype) or ndim not in {None, kind[2]}:
            self.fail(f"its attribute {name} is a parameter of the function that it stands in", INLINE)
        if self.target < _OPSET_OF_CONSTANT_PARAMETERS:
            self.fail(f"a Constant takes {name} from the call of its function from opset 12 on only", INLINE)
        inner = onnx_ir.RefAttr(kind[0], attribute.ref_attr_name or "", attribute.type)
        node = onnx_ir.Node("", "Constant", [], [inner], name=self.place.unique(f"{self.node.name}/Constant"))
        node.outputs[0].name = self.place.unique(name)
        set_provenance(node, "legalize", [self.node])
        self.node.prepend(node)
        return node.outputs[0]


#: The attribute of Constant that takes a parameter of a function, the dtype of the constant, and its number of axes.
_PARAMETERS: Mapping[onnx_ir.AttributeType, tuple[str, Any, int]] = {
    onnx_ir.AttributeType.INTS: ("value_ints", np.int64, 1),
    onnx_ir.AttributeType.INT: ("value_int", np.int64, 0),
    onnx_ir.AttributeType.FLOATS: ("value_floats", np.float32, 1),
    onnx_ir.AttributeType.FLOAT: ("value_float", np.float32, 0),
}
_OPSET_OF_CONSTANT_PARAMETERS = 12


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
