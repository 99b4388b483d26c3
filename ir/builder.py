"""Build nodes whose outputs have types and shapes at once; the only way in which passes make nodes.

Types and shapes come from ONNX's own inference per operator, and from the rules below for collectives,
caches and passopt's own functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir
from onnx import shape_inference

from passopt.ir.errors import VerifyError
from passopt.ir.expressions import Expression
from passopt.ir.functions import DOMAIN, grown, infer_function_types
from passopt.ir.weights import LazyWeight, small_constant

Value: TypeAlias = onnx_ir.Value
Operand: TypeAlias = "onnx_ir.Value | int | float | Sequence[int] | np.ndarray[Any, np.dtype[Any]] | np.generic | None"

#: Domains of the operators that passopt writes beside ONNX's own.
MICROSOFT = "com.microsoft"


@dataclasses.dataclass
class Built:
    """What a builder has made and nobody has put into a graph yet."""

    nodes: list[onnx_ir.Node] = dataclasses.field(default_factory=list)
    initializers: list[onnx_ir.Value] = dataclasses.field(default_factory=list)


class Builder:
    """`b.MatMul(x, w)` makes a node and returns its output; numbers and arrays become initializers.

    Keyword arguments are attributes, but for `outputs=` (how many) and `domain=`. Names come from `hint` and are made
    unique by `unique`, so a rule never chooses one. Nothing enters a graph here: the caller inserts `built`.
    """

    def __init__(self, opset: int, unique: Callable[[str], str], hint: str = "value") -> None:
        self.opset = opset
        self.hint = hint
        self.built = Built()
        self._unique = unique
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **keywords: self.node(op_type, *inputs, **keywords)

    def node(self, op_type: str, *inputs: Operand, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """One node; returns its output, or a tuple of them if `outputs` is not 1."""
        values = self._operands(op_type, inputs)
        node = onnx_ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
        node.name = self._unique(f"{self.hint}/{op_type}")
        for index, value in enumerate(node.outputs):
            value.name = self._unique(f"{self.hint}.{op_type.lower()}" + (f".{index}" if outputs > 1 else ""))
        infer_types(node, self.opset)
        self.built.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def initializer(self, name: str, tensor: Expression | np.ndarray[Any, np.dtype[Any]]) -> Value:
        """A new initializer called `name` (made unique) holding an expression or a small array."""
        name = self._unique(name)
        data: onnx_ir.TensorProtocol
        data = LazyWeight(tensor, name) if isinstance(tensor, Expression) else onnx_ir.tensor(tensor, name=name)
        value = onnx_ir.Value(name=name, shape=data.shape, type=onnx_ir.TensorType(data.dtype), const_value=data)  # type: ignore[arg-type]
        self.built.initializers.append(value)
        return value

    def literal(self, array: np.ndarray[Any, np.dtype[Any]]) -> Value:
        """A small constant; equal constants of one builder are one initializer."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"{self.hint}.constant", array)
        return self._constants[key]

    def _operands(self, op_type: str, inputs: Sequence[Operand]) -> list[Value | None]:
        """Integers and lists are int64; a float takes the dtype of the node's first value."""
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


def infer_types(node: onnx_ir.Node, opset: int) -> None:
    """Set dtype and shape of the node's outputs from its inputs. Leaves unknown what inference does not know."""
    if node.domain == MICROSOFT:
        _infer_collective(node)
        return
    if node.domain == DOMAIN:
        infer_function_types(node)
        return
    if node.domain or any(value is not None and value.type is None for value in node.inputs):
        return
    types, data = {}, {}
    for value in node.inputs:
        if value is None or not value.name:
            continue
        types[value.name] = _type_proto(value)
        constant = small_constant(value)
        if constant is not None and constant.dtype == np.int64:
            data[value.name] = onnx.numpy_helper.from_array(constant, value.name)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise VerifyError(f"{node.op_type} {node.name!r}: no such operator in opset {opset}") from None
    opsets = [onnx.helper.make_opsetid("", opset)]
    try:
        found = shape_inference.infer_node_outputs(schema, onnx_ir.to_proto(node), types, data, opset_imports=opsets)
    except (shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        inputs = [f"{v.name}: {v.dtype} {v.shape}" for v in node.inputs if v is not None]
        raise VerifyError(f"{node.op_type} {node.name!r} does not fit its inputs {inputs}: {error}") from error
    for value in node.outputs:
        proto = found.get(value.name or "")
        if proto is None or not proto.HasField("tensor_type"):
            continue
        value.type = onnx_ir.TensorType(onnx_ir.DataType(proto.tensor_type.elem_type))
        if proto.tensor_type.HasField("shape"):
            value.shape = onnx_ir.serde.deserialize_type_proto_for_shape(proto)
    if node.op_type == "Attention":
        _infer_cache(node)


def _infer_cache(node: onnx_ir.Node) -> None:
    """ONNX's inference leaves the present keys and values of Attention without a length."""
    for new, past, output in zip(node.inputs[1:3], node.inputs[4:6], node.outputs[1:3]):
        if new is not None and past is not None:
            output.type = output.type or new.type
            output.shape = grown(past.shape, new.shape) or output.shape


def _type_proto(value: Value) -> onnx.TypeProto:
    assert value.dtype is not None
    shape = None if value.shape is None else [_dim(dim) for dim in value.shape.dims]
    return onnx.helper.make_tensor_type_proto(value.dtype.value, shape)


def _dim(dim: int | onnx_ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _infer_collective(node: onnx_ir.Node) -> None:
    """AllReduce keeps the shape; AllGather multiplies its axis. onnxruntime's inference gives nothing here."""
    source = node.inputs[0]
    assert source is not None
    target = node.outputs[0]
    target.type = source.type
    if source.shape is None or node.op_type == "AllReduce":
        target.shape = source.shape
        return
    dims = list(source.shape.dims)
    axis, size = node.attributes["axis"].as_int() % len(dims), node.attributes["group_size"].as_int()
    length = dims[axis]
    gathered = length * size if isinstance(length, int) else None
    target.shape = onnx_ir.Shape([*dims[:axis], gathered, *dims[axis + 1 :]])
