"""Connect onnx-ir tensors with weight expressions: a `LazyWeight` is a tensor whose bytes have not been read."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.literals import Literal

#: Constants up to this size stay inside model.onnx and may be looked at by a pass.
SMALL_BYTES = 1024


class LazyWeight(onnx_ir.LazyTensor):
    """A tensor given by an expression, for an initializer. Passes never read it: `numpy()` evaluates the expression.

    Args:
        expression: What the tensor is made of.
        name: The name of the initializer.
    """

    def __init__(self, expression: Expression, name: str | None = None) -> None:
        super().__init__(self._evaluate, expression.dtype, onnx_ir.Shape(expression.shape), name=name)
        self.expression = expression

    def __repr__(self) -> str:
        return f"LazyWeight({self.name}: {self.expression.dtype.name}{list(self.expression.shape)})"

    __str__ = __repr__  # The method of onnx-ir shows the numbers, so it would evaluate the weight.

    def _evaluate(self) -> onnx_ir.TensorProtocol:
        if self.expression.depends_on_rank:
            raise ModelError(f"weight {self.name!r} differs between ranks; evaluate it for one rank")
        with Evaluator() as evaluator:
            return onnx_ir.Tensor(evaluator.array(self.expression), dtype=self.expression.dtype, name=self.name)


def expression_of(value: onnx_ir.Value) -> Expression | None:
    """Return the expression of an initializer or constant, or None for a computed value.

    A tensor in memory becomes a literal, so that every constant weight can be sliced or sharded in the same way.
    """
    tensor = value.const_value if value.const_value is not None else constant_tensor(value)
    if tensor is None:
        return None
    if isinstance(tensor, LazyWeight):
        return tensor.expression
    if isinstance(tensor, onnx_ir.ExternalTensor):
        raise ModelError(f"weight {value.name!r} is external data that was not read through passopt.ir.load_model")
    return Literal(tensor.dtype, tuple(tensor.shape.numpy()), _bytes_of(tensor))


def _bytes_of(tensor: onnx_ir.TensorProtocol) -> bytes:
    """Return the bytes of a tensor; those of strings are separated, so that different strings differ."""
    if tensor.dtype != onnx_ir.DataType.STRING:
        return tensor.tobytes()
    strings: list[bytes] = tensor.string_data()  # type: ignore[attr-defined]
    return b"".join(b"%d:%s," % (len(item), item) for item in strings)


def is_large(tensor: onnx_ir.TensorProtocol) -> bool:
    """Return whether a tensor is a lazy weight, or takes more than `SMALL_BYTES`; strings always count as small."""
    if isinstance(tensor, LazyWeight):
        return True
    return tensor.dtype != onnx_ir.DataType.STRING and tensor.nbytes > SMALL_BYTES


def is_checkpoint_weight(value: onnx_ir.Value) -> bool:
    """Return whether the value is an initializer with a lazy weight, which no pass may read."""
    # Compare types, because isinstance would go through a slow protocol check.
    return type(value.const_value) is LazyWeight and not value.is_graph_input()


def constant_tensor(value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node, or None for any other value.

    A graph input gives None even if it has an initializer as its default, because callers may feed another value.
    """
    if value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            tensor: onnx_ir.TensorProtocol = attribute.value  # as_tensor() would check a protocol, which is slow.
            return tensor
        if name in {"value_int", "value_ints"}:
            return onnx_ir.tensor(np.array(attribute.value, np.int64))
        if name in {"value_float", "value_floats"}:
            return onnx_ir.tensor(np.array(attribute.value, np.float32))
    return None


def small_constant(value: onnx_ir.Value | None) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return the numbers of a constant of at most `SMALL_BYTES`, or None; never read a weight of the checkpoint."""
    if value is None:
        return None
    tensor = constant_tensor(value)
    kind = type(tensor)  # isinstance would go through a slow protocol check.
    if tensor is None or kind is LazyWeight:
        return None
    if kind is onnx_ir.serde.TensorProtoTensor:
        proto: onnx.TensorProto = tensor.raw
        plain = _PLAIN.get(proto.data_type)
        if plain is not None and proto.HasField("raw_data"):
            return _raw_array(proto, plain)
    return tensor.numpy() if tensor.nbytes <= SMALL_BYTES else None


#: Dtypes that numpy can read from raw bytes. Rules read hundreds of small constants, and the general way of onnx-ir
#: takes five times as long.
_PLAIN: dict[int, np.dtype[Any]] = {
    onnx_ir.DataType.FLOAT.value: np.dtype("<f4"),
    onnx_ir.DataType.FLOAT16.value: np.dtype("<f2"),
    onnx_ir.DataType.DOUBLE.value: np.dtype("<f8"),
    onnx_ir.DataType.INT32.value: np.dtype("<i4"),
    onnx_ir.DataType.INT64.value: np.dtype("<i8"),
    onnx_ir.DataType.BOOL.value: np.dtype(np.bool_),
}


def _raw_array(proto: onnx.TensorProto, dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]] | None:
    data = proto.raw_data
    return np.frombuffer(data, dtype).reshape(tuple(proto.dims)) if len(data) <= SMALL_BYTES else None
