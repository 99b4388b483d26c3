"""Write the fastest graph of a shape that onnxruntime can be given, and measure its speed.

Norms with their residual, rotary embedding, attention and activation are onnxruntime's own fused operators. The KV
cache is written in place through I/O binding. There are four forms of linears: `fp32` is MatMul, `dynamic` is
DynamicQuantizeMatMul, `integer` is one DynamicQuantizeLinear for several MatMulIntegerToFloat, and `nbits N` is
MatMulNBits in blocks of N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from compiled.shapes import HEAD_DIM, Array, Memory, Shape, draw, draw_layer, evict, quantized, slopes, timed, tokens

#: Tokens that the KV cache holds.
CAPACITY = 2048
MICROSOFT = "com.microsoft"
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
}


class Writer:
    """Collect the nodes of a decoder, and stream its weights into one file."""

    def __init__(self, folder: Path, shape: Shape, linears: str) -> None:
        self.shape = shape
        self.kind, _, block = linears.partition(" ")
        self.block = int(block or 0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        folder.mkdir(parents=True)
        self.folder, self.file = folder, (folder / "weights.bin").open("wb")

    def op(self, op_type: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its first output."""
        outputs = outputs or (f"{op_type}_{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op_type, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, array: Array) -> str:
        """Write an array to the file of weights from a page's start on, add the initializer, and return its name."""
        self.file.seek(-(-self.file.tell() // 4096) * 4096)
        tensor = TensorProto(
            name=name, data_type=_TYPES[array.dtype.name], dims=array.shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", "weights.bin"), ("offset", self.file.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.file.write(np.ascontiguousarray(array).data)
        self.weights.append(tensor)
        return name

    def linear(self, x: str, name: str, weight: Array) -> str:
        """Add x · weightᵀ for a weight [out, in] in the form asked for, and return the name of the result."""
        if self.kind == "fp32":
            return self.op("MatMul", x, self.weight(name, weight.T))
        if self.kind == "nbits":
            return self._nbits(x, name, weight)
        codes, scales = quantized(weight)
        packed, scale = self.weight(f"{name}.codes", codes.T), self.weight(f"{name}.scales", scales)
        return self.op("DynamicQuantizeMatMul", x, packed, scale, domain=MICROSOFT)

    def _nbits(self, x: str, name: str, weight: Array) -> str:
        rows, columns = weight.shape
        blocks = -(-columns // self.block)
        padded = np.zeros((rows, blocks * self.block), np.float32)
        padded[:, :columns] = weight
        codes, scales = quantized(padded.reshape(-1, self.block))
        stored = (codes.view(np.uint8) ^ np.uint8(128)).reshape(rows, blocks, self.block)
        inputs = (self.weight(f"{name}.codes", stored), self.weight(f"{name}.scales", scales.reshape(rows, blocks)))
        attributes = {"K": columns, "N": rows, "bits": 8, "block_size": self.block, "accuracy_level": 4}
        return self.op("MatMulNBits", x, *inputs, domain=MICROSOFT, **attributes)

    def norm(self, x: str, name: str) -> str:
        """Add an RMS norm whose weight is `name`, and return the name of its result."""
        weight = self.weight(name, draw(name, (self.shape.hidden,)))
        return self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=1e-6)

    def norm_of_sum(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """Add the RMS norm of x + residual, and return the names of the norm and of the sum."""
        weight = self.weight(name, draw(name, (self.shape.hidden,)))
        outputs = (f"{name}.norm", "", "", f"{name}.sum")
        inputs = (x, residual, weight)
        self.op("SkipSimplifiedLayerNormalization", *inputs, outputs=outputs, domain=MICROSOFT, epsilon=1e-6)
        return outputs[0], outputs[3]

    def layer(self, index: int, normed: str, residual: str, following: str) -> tuple[str, str]:
        """Add a layer, and return the result of the next norm, whose weight is `following`, and the new residual."""
        weights = draw_layer(self.shape, index)
        packed = np.concatenate([next(weights)[1] for _ in "qkv"])
        query = self.linear(normed, f"{index}.qkv", packed)
        del packed
        mixed = self._attention(index, query)
        normed, residual = self.norm_of_sum(
            self.linear(mixed, f"{index}.o", next(weights)[1]), residual, f"blk.{index}.ffn_norm"
        )
        gate = self.linear(normed, f"{index}.gate", next(weights)[1])
        active = self.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
        product = self.op("Mul", active, self.linear(normed, f"{index}.up", next(weights)[1]))
        return self.norm_of_sum(self.linear(product, f"{index}.down", next(weights)[1]), residual, following)

    def _attention(self, index: int, packed: str) -> str:
        rotary = self.shape.family == "rotary"
        caches = (f"past.{index}.key", f"past.{index}.value")
        angles = ("cos", "sin", "", "") if rotary else ("", "", "", "bias")
        inputs = (packed, "", "", *caches, "seqlens_k", "total", *angles)
        outputs = (f"{index}.mixed", f"present.{index}.key", f"present.{index}.value")
        heads = {"num_heads": self.shape.heads, "kv_num_heads": self.shape.heads, "scale": HEAD_DIM**-0.5}
        return self.op(
            "GroupQueryAttention", *inputs, outputs=outputs, domain=MICROSOFT, do_rotary=int(rotary), **heads
        )

    def finish(self) -> None:
        """Add the whole decoder with the logits of the last position, and save it under the name of `file_of`.

        The form `integer` is saved beside `dynamic`, since both have the same weights.
        """
        shape = self.shape
        table = self.weight("embed", draw("embed", (shape.vocabulary, shape.hidden)).astype(np.float16))
        x = self.op("Cast", self.op("Gather", table, "input_ids"), to=TensorProto.FLOAT)
        if shape.family == "rotary":
            for name, angles in zip(("cos", "sin"), rotary_angles(4096), strict=True):
                self.weight(name, angles)
        normed, residual = self.norm(x, "blk.0.attn_norm"), x
        for index in range(shape.layers):
            last = index + 1 == shape.layers
            following = "output_norm" if last else f"blk.{index + 1}.attn_norm"
            normed, residual = self.layer(index, normed, residual, following)
        bounds = [helper.make_tensor(f"bound.{value}", TensorProto.INT64, [1], [value]) for value in (-1, 1 << 40, 1)]
        self.weights.extend(bounds)
        last_row = self.op("Slice", normed, "bound.-1", f"bound.{1 << 40}", "bound.1")
        head = draw("head", (shape.vocabulary, shape.hidden))
        self.op("Identity", self.linear(last_row, "head", head), outputs=("logits",))
        self.file.close()
        onnx.save(self._model(), self.folder / file_of(self.kind))
        if self.kind == "dynamic":
            self.nodes = list(quantized_apart(self.nodes))
            onnx.save(self._model(), self.folder / file_of("integer"))

    def _model(self) -> onnx.ModelProto:
        real, integer = TensorProto.FLOAT, TensorProto.INT32
        info = helper.make_tensor_value_info
        cache = [1, self.shape.heads, "capacity", HEAD_DIM]
        layers = range(self.shape.layers)
        inputs = [
            info("input_ids", TensorProto.INT64, [1, "seq"]),
            info("seqlens_k", integer, [1]),
            info("total", integer, []),
        ]
        if self.shape.family == "alibi":
            inputs.append(info("bias", real, [1, self.shape.heads, "seq", "length"]))
        inputs += [info(f"past.{index}.{part}", real, cache) for index in layers for part in ("key", "value")]
        outputs = [info("logits", real, [1, 1, self.shape.vocabulary])]
        outputs += [info(f"present.{index}.{part}", real, cache) for index in layers for part in ("key", "value")]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, initializer=self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def rotary_angles(positions: int) -> tuple[Array, Array]:
    """Return cosines and sines, each [positions, HEAD_DIM / 2]."""
    frequencies = 10_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.outer(np.arange(positions), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def quantized_apart(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the same nodes, but quantise activations in a node of their own, which all linears that take them share.

    This turns the form `dynamic` into the form `integer`.
    """
    known: set[str] = set()
    for node in nodes:
        if node.op_type != "DynamicQuantizeMatMul":
            yield node
            continue
        x, packed, scale = node.input
        codes = [f"{x}.codes", f"{x}.scale", f"{x}.zero"]
        if x not in known:
            yield helper.make_node("DynamicQuantizeLinear", [x], codes)
            known.add(x)
        inputs = [codes[0], packed, codes[1], scale, codes[2]]
        yield helper.make_node("MatMulIntegerToFloat", inputs, node.output, domain=MICROSOFT)


def file_of(kind: str) -> str:
    """Return the file name of a form's graph."""
    return f"{kind}.onnx"


def write(folder: Path, shape: Shape, linears: str) -> None:
    """Write the model into `folder`; `dynamic` and `integer` are written together, as they share their weights."""
    Writer(folder, shape, "dynamic" if linears == "integer" else linears).finish()


class Session:
    """Run a model in a session whose past and present share one buffer per cache."""

    def __init__(self, model: Path, shape: Shape, threads: int) -> None:
        import onnxruntime

        self.ort: Any = onnxruntime
        self.shape = shape
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        size = (1, shape.heads, CAPACITY, HEAD_DIM)
        random = np.random.default_rng(1).standard_normal(size, np.float32)
        names = [f"{index}.{part}" for index in range(shape.layers) for part in ("key", "value")]
        # An OrtValue of a numpy array uses the array's memory: each cache needs an array, which must stay alive here.
        self.arrays = {name: random.copy() for name in names}
        self.caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}
        self.logits = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, shape.vocabulary), np.float32))

    def bind(self, ids: Array, past: int) -> Any:
        """Return a binding that feeds `ids` after `past` tokens, of which the cache holds random numbers."""
        total = past + len(ids)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids.astype(np.int64)[None])
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        if self.shape.family == "alibi":
            row = slopes(self.shape.heads)[None, :, None, None] * np.arange(total, dtype=np.float32)
            binding.bind_cpu_input("bias", np.ascontiguousarray(np.repeat(row, len(ids), axis=2)))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_ortvalue_output("logits", self.logits)
        return binding

    def run(self, binding: Any) -> None:
        """Run the model once with what the binding feeds."""
        self.session.run_with_iobinding(binding)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of all points, the logits after the first prompt to compare, and the memory held."""
    shape = Shape(**job["shape"])
    (threads,) = job["threads"]
    memory, kind = Memory(), job["variant"].partition(" ")[0]
    session = Session(Path(job["model"]) / file_of(kind), shape, threads)
    results: dict[str, Any] = {}
    for count in job["prefill"]:
        run = partial(session.run, session.bind(tokens(count, shape.vocabulary), 0))
        results[f"prefill {count} {threads}"] = timed(run, seconds=job["seconds"], prepare=evict)
        results.setdefault("logits", session.logits.numpy().ravel().tolist())
    for past in job["decode"]:
        run = partial(session.run, session.bind(tokens(1, shape.vocabulary), past))
        results[f"decode {past} {threads}"] = timed(run, seconds=job["seconds"])
    caches = sum(array.nbytes for array in session.arrays.values())
    return results | {"memory": memory.held(caches)}
