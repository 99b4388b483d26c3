"""Build nodes whose outputs have types and shapes at once; passes make nodes in no other way.

Types and shapes come from ONNX's own inference for single operators, and from the rules below for collectives,
caches and passopt's own functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir
from onnx import shape_inference

from passopt.ir.errors import VerifyError
from passopt.ir.graph.attributes import attributes_key
from passopt.ir.graph.functions import DOMAIN, grown, infer_function_types
from passopt.ir.graph.operators import COLLECTIVE_OPS, infer_contrib_types, is_runtime_operator
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.slices import is_disputed
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import LazyWeight, small_constant

Value: TypeAlias = onnx_ir.Value
Operand: TypeAlias = "onnx_ir.Value | int | float | Sequence[int] | np.ndarray[Any, np.dtype[Any]] | np.generic | None"

Inferred: TypeAlias = "tuple[onnx_ir.DataType | None, tuple[int | str | None, ...] | None]"
TypesMemo: TypeAlias = dict[Hashable, list[Inferred]]
_SCALARS = frozenset({int, float, str})
_GRAPHS = frozenset({onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS})
#: Operators whose inference in ONNX is wrong or absent in some opsets, and the opset that has it right for the same
#: operator: the Slice of opset 10 keeps the symbol of an axis that it cuts, and an older If takes the shape of either
#: branch; comparisons that began as functions got no shape.
_OPSET_OF_INFERENCE = {
    ("Slice", 10): 11,
    **{("If", opset): 11 for opset in range(1, 11)},
    **{(name, opset): 16 for name in ("GreaterOrEqual", "LessOrEqual") for opset in range(12, 16)},
}

#: The domain of the collectives, which passopt writes beside ONNX's own operators.
MICROSOFT = "com.microsoft"


@dataclasses.dataclass
class Built:
    """The nodes and initializers that a builder has made, before anybody inserts them into a graph."""

    nodes: list[onnx_ir.Node] = dataclasses.field(default_factory=list)
    initializers: list[onnx_ir.Value] = dataclasses.field(default_factory=list)
    #: The dtype and shape that inference found for each output.
    inferred: dict[onnx_ir.Value, tuple[onnx_ir.DataType | None, onnx_ir.Shape | None]] = dataclasses.field(
        default_factory=dict
    )


class Builder:
    """Makes nodes: `b.MatMul(x, w)` makes a MatMul and returns its output; numbers and arrays become initializers.

    Keyword arguments are attributes, except `outputs=` (their number), `domain=` and `like=` (see `node`). Names start
    with `hint` and are made unique by the function `unique`, so a rule never chooses one. Nothing enters a graph here:
    the caller inserts `built`. The optional `types` remembers what inference found, so that equal nodes are inferred
    once. `Editor.builder` makes one; use it instead of calling this class.

    Example:
        ::

            b = editor.builder("mlp")
            y = b.Gelu(b.MatMul(x, w), approximate="tanh")
            editor.insert(b.built, before=node)
    """

    def __init__(
        self, opset: int, unique: Callable[[str], str], hint: str = "value", *, types: TypesMemo | None = None
    ) -> None:
        self.opset = opset
        self.hint = hint
        self.built = Built()
        self._unique = unique
        self._types = types
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **keywords: self.node(op_type, *inputs, **keywords)

    def node(
        self,
        op_type: str,
        *inputs: Operand,
        outputs: int = 1,
        domain: str = "",
        like: Value | None = None,
        **attributes: Any,
    ) -> Any:
        """Make one node and return its output, or a tuple of outputs if `outputs` is not 1.

        Args:
            op_type: The operator, such as "MatMul".
            *inputs: Values, or None for an omitted input, or numbers, lists and arrays, which become initializers.
            outputs: The number of outputs.
            domain: The operator's domain; empty for standard ONNX.
            like: A value whose dtype and shape the outputs have. It is meant for operators of other domains, of which
                nobody can infer them.
            **attributes: The node's attributes.

        Returns:
            The output value, or a tuple of the outputs; each has a type and a shape where inference finds them.

        Raises:
            VerifyError: If the operator does not exist in the opset or does not accept these inputs, or if there is a
                float among the inputs but no value whose dtype it could take.
        """
        values = self._operands(op_type, inputs)
        while values and values[-1] is None:
            values.pop()  # onnxruntime 1.32 crashes on an empty name behind the last input of LayerNormalization.
        converted = [_attribute(name, value) for name, value in attributes.items()]
        name = self._unique(f"{self.hint}/{op_type}")
        node = onnx_ir.Node(domain, op_type, values, converted, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = self._unique(f"{self.hint}.{op_type.lower()}" + (f".{index}" if outputs > 1 else ""))
        infer_types(node, self.opset, self._types)
        for value in node.outputs if like is not None else ():
            value.type, value.shape = value.type or like.type, value.shape or like.shape  # type: ignore[union-attr]
        self.built.nodes.append(node)
        self.built.inferred.update((value, (value.dtype, value.shape)) for value in node.outputs)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def initializer(self, name: str, tensor: Expression | np.ndarray[Any, np.dtype[Any]]) -> Value:
        """Make an initializer from an expression or a small array.

        Args:
            name: Its name, to which a number is added if it is taken.
            tensor: A weight expression, which stays unread, or an array.

        Returns:
            The value of the initializer.
        """
        name = self._unique(name)
        data: onnx_ir.TensorProtocol
        data = LazyWeight(tensor, name) if isinstance(tensor, Expression) else onnx_ir.tensor(tensor, name=name)
        value = onnx_ir.Value(name=name, shape=data.shape, type=onnx_ir.TensorType(data.dtype), const_value=data)  # type: ignore[arg-type]
        self.built.initializers.append(value)
        return value

    def literal(self, array: np.ndarray[Any, np.dtype[Any]]) -> Value:
        """Return an initializer for a small constant; equal constants of one builder share one initializer.

        Args:
            array: The constant, of any dtype.
        """
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"{self.hint}.constant", array)
        return self._constants[key]

    def _operands(self, op_type: str, inputs: Sequence[Operand]) -> list[Value | None]:
        """Turn operands into values: integers and lists become int64, a float takes the dtype of the first value."""
        like = next((item.dtype for item in inputs if isinstance(item, onnx_ir.Value) and item.dtype), None)
        values: list[Value | None] = []
        for item in inputs:
            if item is None or isinstance(item, onnx_ir.Value):
                values.append(item)
            elif isinstance(item, (np.ndarray, np.generic)):
                values.append(self.literal(np.asarray(item)))
            elif isinstance(item, float):
                if like is None:
                    raise VerifyError(f"{op_type}: the dtype of the number {item} is unknown; pass an array")
                values.append(self.literal(np.asarray(item, like.numpy())))
            else:
                values.append(self.literal(np.asarray(item, np.int64)))
        return values


def _attribute(name: str, value: Any) -> onnx_ir.Attr:
    """Convert an attribute like onnx-ir, but without its many type checks for the two most frequent types."""
    if type(value) is int:
        return onnx_ir.AttrInt64(name, value)
    if type(value) is float:
        return onnx_ir.AttrFloat32(name, value)
    return onnx_ir.convenience.convert_attribute(name, value)


def infer_types(node: onnx_ir.Node, opset: int, memo: TypesMemo | None = None) -> None:
    """Set dtype and shape of the node's outputs from its inputs, leaving unknown what inference cannot find.

    Args:
        node: The node, whose outputs are changed in place.
        opset: The version of the standard operators.
        memo: Results of earlier calls, which this call uses and extends (see `RunContext.types`).

    Raises:
        VerifyError: If the operator does not exist in this opset or does not accept its inputs.
    """
    if node.domain == MICROSOFT and node.op_type in COLLECTIVE_OPS:
        _infer_collective(node)
        return
    if node.domain == DOMAIN:
        infer_function_types(node)
        return
    if node.domain == MICROSOFT or is_runtime_operator(node, opset):
        infer_contrib_types(node)
        return
    if node.domain or any(value is not None and value.type is None for value in node.inputs):
        return
    key = _inference_key(node, opset) if memo is not None else None
    found = memo.get(key) if memo is not None and key is not None else None
    if found is None:
        found = _inferred(node, opset)
        if memo is not None and key is not None:
            memo[key] = found
    if is_disputed(node):
        found = [(dtype, None if dims is None else (None,) * len(dims)) for dtype, dims in found]
    for value, (dtype, dims) in zip(node.outputs, found, strict=True):
        if dtype is not None:
            value.type = onnx_ir.TensorType(dtype)
        if dims is not None:
            value.shape = onnx_ir.Shape(dims)
    if node.op_type == "Attention":
        _infer_cache(node)


def _inference_key(node: onnx_ir.Node, opset: int) -> Hashable | None:
    """Return a key of everything that inference looks at; None if that is more than tensors and attributes.

    A node with subgraphs may read any value.
    """
    attributes: list[Hashable] = []
    for item in node.attributes.data.values():
        content = item.value
        if type(content) in _SCALARS:
            attributes.append((item.name, content))
        elif item.type in _GRAPHS:
            return None
        elif type(content) is tuple:
            attributes.append((item.name, *content))
        else:
            attributes.append(attributes_key(node))
    inputs: list[Hashable] = []
    for value in node.inputs:
        if value is None:
            inputs.append(None)
            continue
        if not isinstance(value.type, onnx_ir.TensorType):
            return None
        data = _shape_data(value)
        dims = None if value.shape is None else tuple(_dim(dim) for dim in value.shape.dims)
        inputs.append((value.dtype, dims, None if data is None else (data.shape, data.tobytes())))
    return node.op_type, opset, len(node.outputs), tuple(attributes), tuple(inputs)


def _shape_data(value: Value) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return the numbers of a small int64 constant, since output shapes may depend on them; None for anything else."""
    if value.dtype != onnx_ir.DataType.INT64:
        return None
    return small_constant(value)


def _inferred(node: onnx_ir.Node, opset: int) -> list[Inferred]:
    """Run ONNX's own inference: return dtype and dimensions of each output, with None for what it does not find."""
    types, data = {}, {}
    for value in node.inputs:
        if value is None or not value.name:
            continue
        types[value.name] = _type_proto(value)
        constant = _shape_data(value)
        if constant is not None:
            data[value.name] = onnx.numpy_helper.from_array(constant, value.name)
    try:
        schema = onnx.defs.get_schema(node.op_type, _OPSET_OF_INFERENCE.get((node.op_type, opset), opset), "")
    except onnx.defs.SchemaError:
        raise VerifyError(
            f"{called(node)}: no such operator in opset {opset}; if a later one has it, run legalize"
        ) from None
    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx_ir.serde.serialize_node(node)
    try:
        found = shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
    except (shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        inputs = [f"{v.name}: {v.dtype} {v.shape}" for v in node.inputs if v is not None]
        raise VerifyError(f"{called(node)} does not fit its inputs {inputs}: {error}") from error
    return [_read_type(found.get(value.name or "")) for value in node.outputs]


def _read_type(proto: onnx.TypeProto | None) -> Inferred:
    if proto is None or not proto.HasField("tensor_type"):
        return None, None
    dtype = onnx_ir.DataType(proto.tensor_type.elem_type)
    if not proto.tensor_type.HasField("shape"):
        return dtype, None
    shape = proto.tensor_type.shape
    return dtype, tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in shape.dim)


def _infer_cache(node: onnx_ir.Node) -> None:
    """Set the shape of Attention's present keys and values, whose length ONNX's inference leaves open."""
    for new, past, output in zip(node.inputs[1:3], node.inputs[4:6], node.outputs[1:3]):
        if new is not None and past is not None:
            output.type = output.type or new.type
            output.shape = grown(past.shape, new.shape) or output.shape


def _type_proto(value: Value) -> onnx.TypeProto:
    if not isinstance(value.type, onnx_ir.TensorType):  # The dtype of a sequence is that of its elements.
        return onnx_ir.serde.serialize_value(value).type
    assert value.dtype is not None
    shape = None if value.shape is None else [_dim(dim) for dim in value.shape.dims]
    return onnx.helper.make_tensor_type_proto(value.dtype.value, shape)


def _dim(dim: int | onnx_ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _infer_collective(node: onnx_ir.Node) -> None:
    """Set type and shape of a collective's output, which onnxruntime's inference does not give.

    AllReduce keeps the shape; AllGather multiplies the length of its axis by the group size.
    """
    source = node.inputs[0]
    assert source is not None
    target = node.outputs[0]
    target.type = source.type
    if source.shape is None or node.op_type == "AllReduce":
        target.shape = source.shape
        return
    dims, along, ranks = list(source.shape.dims), node.attributes.get("axis"), node.attributes.get("group_size")
    if along is None or ranks is None or not -len(dims) <= along.as_int() < len(dims):
        return  # Only passopt's own collectives are sure to state both.
    axis, size = along.as_int() % len(dims), ranks.as_int()
    length = dims[axis]
    gathered = length * size if isinstance(length, int) else None
    target.shape = onnx_ir.Shape([*dims[:axis], gathered, *dims[axis + 1 :]])
