"""List facts about operators by their names, and infer the dtypes that onnxruntime's own operators give."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

#: Operators whose results differ in every run. (Dropout is not among them, since it does nothing outside of training.)
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def random_operators(model: onnx_ir.Model) -> list[str]:
    """Return the operators of a model that draw random numbers, in bodies and functions too."""
    nodes = [*model.graph.all_nodes(), *(node for item in model.functions.values() for node in item.all_nodes())]
    return sorted({node.op_type for node in nodes if not node.domain and node.op_type in RANDOM})


def operators(*lines: str) -> frozenset[str]:
    """Return the operator names in lines of text, where they are separated by spaces."""
    return frozenset(name for line in lines for name in line.split())


#: The operators of onnxruntime's domain that make ranks wait for each other. All others of that domain are unknown.
COLLECTIVE_OPS = frozenset({"AllReduce", "AllGather"})
#: Operators of two inputs whose order does not matter.
COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal"})

_INT32 = onnx_ir.DataType.INT32

#: Operators whose first output has the dtype and the shape of the first input.
_ALIKE = operators(
    "BiasGelu FastGelu Gelu QuickGelu RotaryEmbedding",
    "SkipLayerNormalization SkipSimplifiedLayerNormalization",
)
#: For each operator, where its outputs take their dtype from: an input, or a fixed dtype, or None if that depends.
_DTYPES: Mapping[str, tuple[int | onnx_ir.DataType | None, ...]] = {
    **dict.fromkeys(_ALIKE, (0,)),
    "SkipLayerNormalization": (0, None, None, 0),
    "SkipSimplifiedLayerNormalization": (0, None, None, 0),
    "Attention": (0, 0),
    "DequantizeLinear": (1,),
    "DynamicQuantizeMatMul": (0,),
    "EmbedLayerNormalization": (2, _INT32, 2),
    "FusedConv": (0,),
    "FusedGemm": (0,),
    "FusedMatMul": (0,),
    "GatherBlockQuantized": (2,),
    "GroupQueryAttention": (0, 3, 3),
    "LayerNormalization": (0,),
    "MatMulIntegerToFloat": (2,),
    "MatMulNBits": (0,),
    "MultiHeadAttention": (0, 0, 0),
    "QuantizeLinear": (2,),
    "SimplifiedLayerNormalization": (1,),
    "TransposeMatMul": (0,),
}
_NEVER = 1 << 30
#: onnxruntime's own operators in the default domain, with the opset that made them standard.
_RUNTIME_OPS: Mapping[str, int] = {"SimplifiedLayerNormalization": _NEVER, "LayerNormalization": 17}


def is_runtime_operator(node: onnx_ir.Node, opset: int) -> bool:
    """Return whether a node of the default domain is onnxruntime's own, since the opset does not have it (yet)."""
    return not node.domain and opset < _RUNTIME_OPS.get(node.op_type, 0)


def infer_contrib_types(node: onnx_ir.Node) -> None:
    """Set the dtypes, and some shapes, of the outputs of an operator of onnxruntime; leave the others unknown."""
    sources = _DTYPES.get(node.op_type, ())
    for value, source in zip(node.outputs, sources, strict=False):
        dtype = source if isinstance(source, onnx_ir.DataType) else _dtype(node, source)
        if dtype is not None:
            value.type = onnx_ir.TensorType(dtype)
    first = node.inputs[0] if node.inputs else None
    if (node.op_type in _ALIKE or node.op_type in _RUNTIME_OPS) and first is not None and first.shape is not None:
        node.outputs[0].shape = first.shape


def _dtype(node: onnx_ir.Node, source: int | None) -> onnx_ir.DataType | None:
    value = node.inputs[source] if source is not None and source < len(node.inputs) else None
    return value.dtype if value is not None else None
