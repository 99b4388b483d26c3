"""Small models for the tests of lowering and runtime.

A compiled folder made by hand, small enough to be computed by numpy, with everything an engine has to handle.

logits[b, s] = total[b] · headᵀ + positions[b, s], where total is the sum of the embeddings of all columns that the mask
counts, cached ones included.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from passopt.ir.serialization.model_files import load_model
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.streaming.write_weights import write_safetensors
from passopt.targets.tvm.compiled_folder import CacheLayout, CodeFile, Library, Logits, WeightsFile
from passopt.targets.tvm.compiler.kernels.code_generation import code_generation
from passopt.targets.tvm.compiler.lowering.graph import Lowered, lower
from passopt.targets.tvm.compiler.relax_steps import run_steps
from passopt.targets.tvm.machines import find_cpu

Array = np.ndarray[Any, Any]

VOCAB, WIDTH, POSITIONS = 11, 6, 40
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class TinyLibrary:
    """The folder and what its function computes."""

    folder: Path
    embedding: np.ndarray[Any, Any]
    head: np.ndarray[Any, Any]

    def logits(self, ids: Any, mask: Any, positions: Any) -> np.ndarray[Any, Any]:
        """For all columns so far, positions for the last ones."""
        total = (self.embedding[np.asarray(ids)] * np.asarray(mask)[..., None]).sum(axis=1)
        return (total @ self.head.T)[:, None, :] + np.asarray(positions)[..., None]


@pytest.fixture(scope="module")
def make_tiny_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyLibrary]:
    def make(kind: str = "in-place", dtype: str = "fp32", *, positions: bool = True, **changes: Any) -> TinyLibrary:
        folder = tmp_path_factory.mktemp("tiny") / "library"
        folder.mkdir()
        random = np.random.default_rng(3)
        # Whole numbers: exact in every dtype of the cache.
        embedding = random.integers(-8, 8, (VOCAB, WIDTH)).astype(np.float32)
        head = random.integers(-4, 5, (VOCAB, WIDTH)).astype(np.float32)
        _build(folder / "lib.so", kind, DTYPES[dtype], positions=positions)
        arrays = {"embedding": embedding, "head": head}
        literals = {name: Literal(DataType.FLOAT, array.shape, array.tobytes()) for name, array in arrays.items()}
        digests = write_safetensors(folder / "weights.safetensors", literals)
        library = Library(
            passopt="0.1.0",
            target="llvm",
            mcpu="x86-64",
            isa="plain",
            features=(),
            library=CodeFile.of(folder / "lib.so"),
            weights=WeightsFile.of(folder / "weights.safetensors", digests),
            function="main",
            inputs=("input_ids", "attention_mask", *(["position_ids"] if positions else [])),
            parameters=("embedding", "head"),
            cache=CacheLayout(1, 1, WIDTH, dtype, kind=kind),  # type: ignore[arg-type]
            logits=Logits("all", VOCAB),
            max_positions=POSITIONS,
            rank=0,
            degree=1,
            passes="",
        )
        dataclasses.replace(library, **changes).write(folder)
        return TinyLibrary(folder, embedding, head)

    return make


@pytest.fixture(scope="module")
def tiny(make_tiny_library):
    return make_tiny_library()


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "library", ignore=shutil.ignore_patterns("*.verified")))


def _build(path: Path, kind: str, dtype: str, *, positions: bool) -> None:
    import tvm
    from tvm import relax
    from tvm.relax import op

    builder = relax.BlockBuilder()
    batch, seq, past, blocks = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq", "past", "blocks"))

    def variable(name: str, shape: tuple[Any, ...], kind: str = "float32") -> Any:
        return relax.Var(name, relax.TensorType(shape, kind))

    ids, mask = variable("ids", (batch, seq), "int64"), variable("mask", (batch, past + seq), "int64")
    place = variable("positions", (batch, seq), "int64")
    count = relax.Var("past", relax.ShapeType([past]))
    embedding, head = variable("embedding", (VOCAB, WIDTH)), variable("head", (VOCAB, WIDTH))
    if kind == "in-place":
        key = variable("key", (batch, 1, blocks, WIDTH, 16), dtype)
        value = variable("value", (batch, 1, blocks * 16, WIDTH), dtype)
    else:
        key = variable("key", (batch, 1, past, WIDTH), dtype)
        value = variable("value", (batch, 1, past, WIDTH), dtype)
    leading = [ids, mask, *([place] if positions else []), count, key, value]
    with builder.function("main", [*leading, embedding, head]):
        with builder.dataflow():
            emit = builder.emit
            flat = emit(op.take(embedding, emit(op.reshape(ids, (batch * seq,))), axis=0))
            new = emit(op.astype(emit(op.reshape(flat, (batch, 1, seq, WIDTH))), dtype))
            if kind == "in-place":
                append = builder.add_func(_append(dtype), "append")
                shapes = (key.ty, value.ty)
                pair = emit(op.call_tir_inplace(append, [new, key, value, past], [1, 2], list(shapes)))
                values = emit(relax.TupleGetItem(pair, 1))
                present = emit(op.strided_slice(values, [2], [0], [past + seq], assume_inbound=True))
            else:
                present = emit(op.concat([value, new], axis=2))
            columns = emit(op.astype(emit(op.reshape(present, (batch, past + seq, WIDTH))), "float32"))
            counts = emit(op.reshape(emit(op.astype(mask, "float32")), (batch, past + seq, 1)))
            total = emit(op.sum(emit(op.multiply(columns, counts)), axis=[1]))
            rows = emit(op.matmul(total, emit(op.permute_dims(head))))
            wide = emit(op.broadcast_to(emit(op.reshape(rows, (batch, 1, VOCAB))), (batch, seq, VOCAB)))
            if positions:
                wide = emit(op.add(wide, emit(op.astype(emit(op.reshape(place, (batch, seq, 1))), "float32"))))
            if kind == "in-place":
                result = builder.emit_output(wide)
            else:
                keys = emit(op.concat([key, new], axis=2))
                result = builder.emit_output(relax.Tuple([wide, keys, present]))
        builder.emit_func_output(result)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})
    assert find_cpu("x86-64").isa.name == "plain"
    relax.build(builder.get(), target).export_library(str(path))


def _append(dtype: str) -> Any:
    """Keys and values of the new columns to their places in the caches."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as ib, T.prim_func(s_tir=True, is_private=True):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        b, s, n = (tvm.tirx.Var(name, "int64") for name in ("b", "s", "n"))
        new = T.match_buffer(T.arg("new", T.handle()), (b, 1, s, WIDTH), dtype)
        key = T.match_buffer(T.arg("key", T.handle()), (b, 1, n, WIDTH, 16), dtype)
        value = T.match_buffer(T.arg("value", T.handle()), (b, 1, n * 16, WIDTH), dtype)
        past = T.arg("past", tvm.tirx.Var("past", "int64"))
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            with T.serial(0, b) as row, T.serial(0, s) as column, T.serial(0, WIDTH) as d:
                place = past + column
                T.buffer_store(key, new[row, 0, column, d], [row, 0, place // 16, d, place % 16])
                T.buffer_store(value, new[row, 0, column, d], [row, 0, place, d])
    return ib.get()


# Graphs as text, for what lowering makes of them.

HEADER = """
<ir_version: 10, opset_import: ["" : OPSET]>
model (
   int64[batch,seq] input_ids, int64[batch,"past+seq"] attention_mask,
   float[batch,2,past,3] "past.0.key", float[batch,2,past,3] "past.0.value"
) => (float[a,b,c] logits)
<float[7,6] table = {TABLE}, float[7,6] other = {WEIGHT}, EXTRA> {
   x = Gather (table, input_ids)
   y = Gather (other, input_ids)
BODY
}"""


def _decoder_text(body: str, extra: str = "", opset: int = 23) -> str:
    rng = np.random.default_rng(3)

    def numbers(count: int) -> str:
        return ", ".join(f"{item:.4f}" for item in rng.standard_normal(count))

    text = (
        HEADER.replace("TABLE", numbers(42))
        .replace("WEIGHT", numbers(42))
        .replace("BODY", body)
        .replace("OPSET", str(opset))
    )
    return text.replace("EXTRA", extra) if extra else text.replace(", EXTRA", "")


@pytest.fixture
def decoder_text() -> Callable[..., str]:
    """(body, extra constants, opset) → the text of a decoder: `body` computes logits from x and y [batch, seq, 6]."""
    return _decoder_text


@pytest.fixture
def lowered_text(tmp_path: Path) -> Callable[..., Lowered]:
    """As `decoder_text`, lowered for this machine."""

    def make(body: str, extra: str = "", opset: int = 23, **options: Any) -> Lowered:
        path = tmp_path / "model.onnxtxt"
        path.write_text(_decoder_text(body, extra, opset))
        return lower(load_model(path), find_cpu(), **options)

    return make


@pytest.fixture
def both(lowered_text: Callable[..., Lowered]) -> Callable[..., tuple[Array, Array]]:
    """Logits of the lowered function and of onnxruntime, for a past of 4 positions and 5 new ones of 3 sequences.

    onnxruntime runs `twin` where it has no kernels for `body`.
    """

    def run(body: str, extra: str = "", twin: str | None = None, **options: Any) -> tuple[Array, Array]:
        lowered = lowered_text(body, extra, **options)
        return _compiled(lowered), _reference(onnx.parser.parse_model(_decoder_text(twin or body, extra)))

    return run


RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 7, (3, 5))
MASK = np.ones((3, 9), np.int64)
PAST = RNG.standard_normal((2, 3, 2, 4, 3)).astype(np.float32)


def _reference(proto: onnx.ModelProto) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # or it quantises the input too
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feeds = {"input_ids": IDS, "attention_mask": MASK, "past.0.key": PAST[0], "past.0.value": PAST[1]}
    return np.asarray(session.run(["logits"], feeds)[0])


def _compiled(lowered: Lowered) -> Array:
    import tvm
    from tvm import relax

    from passopt.ir.weights.evaluator import Evaluator

    target = find_cpu().target()
    with code_generation(target):
        executable = relax.build(run_steps(lowered.module, target), target, relax_pipeline=None)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    tensor = tvm.runtime.tensor
    with Evaluator() as evaluator:
        weights = [tensor(evaluator.array(item.expression)) for item in lowered.parameters]
    if lowered.in_place:
        keys, values = np.zeros((3, 2, 16, 3), np.float32), np.zeros((3, 2, 16, 3), np.float32)
        keys[:, :, :4], values[:, :, :4] = PAST
        caches = [tensor(np.ascontiguousarray(keys.reshape(3, 2, 1, 16, 3).swapaxes(3, 4))), tensor(values)]
    else:
        caches = [tensor(PAST[0]), tensor(PAST[1])]
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    found = machine["main"](
        *(tensor(inputs[name]) for name in lowered.inputs), tvm.runtime.ShapeTuple([4]), *caches, *weights
    )
    return np.asarray((found if lowered.in_place else found[0]).numpy())
