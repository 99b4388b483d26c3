"""Write graphs with the sizes of Baichuan2 and the operators that exporters write, whose weights take no disk space.

A graph adds one bias per head to the mask, as the 13B model does for ALiBi, or rotates queries and keys (`rotary`), as
the 7B model does. As in exported graphs, every small number is a Constant node of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
HEAD_DIM = 128
VOCABULARY = 125_696
POSITIONS = 4096
WEIGHTS = "weights.bin"
#: Channels, and channels inside of the MLP, by `rotary`: 13B (ALiBi) and 7B (rotary).
_PUBLISHED = {False: (5120, 13_696), True: (4096, 11_008)}
LOWEST = float(np.finfo(np.float32).min)


class GraphWriter:
    """Collect the nodes and the sparse weights of one decoder."""

    def __init__(self, hidden: int, width: int, rotary: bool) -> None:
        self.hidden, self.width, self.rotary = hidden, width, rotary
        self.heads = hidden // HEAD_DIM
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.nbytes = 0

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"constant_{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value, dtype), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name=f"node_{name}", value=tensor))
        return name

    def weight(self, name: str, *shape: int) -> str:
        size = 4 * math.prod(shape)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS), ("offset", self.nbytes), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.nbytes += -(-size // 4096) * 4096
        self.weights.append(tensor)
        return name

    def layer(self, index: int, x: str, mask: str) -> str:
        prefix = f"model.layers.{index}."
        x = self.op("Add", x, self._attention(prefix, self._norm(x, prefix + "input_layernorm.weight"), mask))
        return self.op("Add", x, self._mlp(prefix, self._norm(x, prefix + "post_attention_layernorm.weight")))

    def _norm(self, x: str, weight: str) -> str:
        square = self.op("Pow", x, self.constant(2.0, np.float32))
        mean = self.op("ReduceMean", square, self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(1e-6, np.float32)))
        scaled = self.op("Mul", x, self.op("Div", self.constant(1.0, np.float32), root))
        return self.op("Mul", self.weight(weight, self.hidden), scaled)

    def _attention(self, prefix: str, x: str, mask: str) -> str:
        packed = self.op("MatMul", x, self.weight(prefix + "self_attn.W_pack.weight", self.hidden, 3 * self.hidden))
        packed = self.op("Reshape", packed, self.constant([0, 0, 3, self.hidden]))
        packed = self.op("Transpose", self.op("Unsqueeze", packed, self.constant([0])), perm=[3, 1, 2, 0, 4])
        packed = self.op("Squeeze", packed, self.constant([3]))
        query, key, value = (self._split_heads(packed, part) for part in range(3))
        if self.rotary:
            cos, sin = (self._angles(f"{prefix}{name}") for name in ("cos", "sin"))
            query, key = (self._rotated(item, cos, sin) for item in (query, key))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.op("Div", scores, self.constant(math.sqrt(HEAD_DIM), np.float32))
        scores = self.op("Max", self.op("Add", scores, mask), self.constant(LOWEST, np.float32))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        joined = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.constant([0, 0, self.hidden]))
        return self.op("MatMul", joined, self.weight(prefix + "self_attn.o_proj.weight", self.hidden, self.hidden))

    def _split_heads(self, packed: str, part: int) -> str:
        flat = self.op("Gather", packed, self.constant(part), axis=0)
        heads = self.op("Reshape", flat, self.constant([0, 0, self.heads, HEAD_DIM]))
        return self.op("Transpose", heads, perm=[0, 2, 1, 3])

    def _angles(self, name: str) -> str:
        table = self.weight(name, POSITIONS, HEAD_DIM)
        return self.op("Unsqueeze", self.op("Gather", table, "position_ids"), self.constant([1]))

    def _rotated(self, x: str, cos: str, sin: str) -> str:
        half, axis = HEAD_DIM // 2, [3]
        first = self.op("Slice", x, self.constant([0]), self.constant([half]), self.constant(axis))
        end = self.constant([np.iinfo(np.int64).max])
        second = self.op("Slice", x, self.constant([half]), end, self.constant(axis))
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def _mlp(self, prefix: str, x: str) -> str:
        gate = self.op("MatMul", x, self.weight(prefix + "mlp.gate_proj.weight", self.hidden, self.width))
        active = self.op("Mul", gate, self.op("Sigmoid", gate))
        up = self.op("MatMul", x, self.weight(prefix + "mlp.up_proj.weight", self.hidden, self.width))
        product = self.op("Mul", active, up)
        return self.op("MatMul", product, self.weight(prefix + "mlp.down_proj.weight", self.width, self.hidden))

    def finish(self, x: str) -> None:
        """Add the last norm and the head, whose rows are normalised at every step as in NormHead."""
        x = self._norm(x, "model.norm.weight")
        head = self.weight("lm_head.weight", VOCABULARY, self.hidden)
        norm = self.op("ReduceL2", head, self.constant([1]), keepdims=1)
        rows = self.op("Div", head, self.op("Max", norm, self.constant(1e-12, np.float32)))
        self.op("MatMul", x, self.op("Transpose", rows, perm=[1, 0]))
        self.nodes[-1].output[0] = "logits"


def make_graph(folder: Path, *, layers: int, rotary: bool, hidden: int = 0) -> Path:
    """Write model.onnx, in which every value has a type, beside a sparse file of weights, and return its path.

    Args:
        folder: The folder to create for both files.
        layers: The number of decoder layers.
        rotary: Rotate queries and keys as 7B does; otherwise add a bias per head as 13B does.
        hidden: The number of channels; 0 stands for the published one.
    """
    folder.mkdir(parents=True)
    hidden, width = (hidden, 2 * hidden) if hidden else _PUBLISHED[rotary]
    writer = GraphWriter(hidden, width, rotary)
    x = writer.op("Gather", writer.weight("model.embed_tokens.weight", VOCABULARY, hidden), "input_ids")
    mask = "mask"
    if not rotary:
        mask = writer.op("Add", writer.weight("model.alibi", writer.heads, 1, 1), mask)
    for index in range(layers):
        x = writer.layer(index, x, mask)
    writer.finish(x)
    with (folder / WEIGHTS).open("wb") as file:
        file.truncate(writer.nbytes)
    path = folder / "model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(_model(writer), data_prop=True), path)
    return path


def _model(writer: GraphWriter) -> onnx.ModelProto:
    integers, floats = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("input_ids", integers, ["batch", "seq"]),
        helper.make_tensor_value_info("mask", floats, ["batch", 1, "seq", "seq"]),
    ]
    if writer.rotary:
        inputs.append(helper.make_tensor_value_info("position_ids", integers, ["batch", "seq"]))
    outputs = [helper.make_tensor_value_info("logits", floats, ["batch", "seq", VOCABULARY])]
    graph = helper.make_graph(writer.nodes, "decoder", inputs, outputs, initializer=writer.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
