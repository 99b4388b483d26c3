"""Ranks joined in one graph: equal to the unsplit model, with its interface, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.model_files import load_model, save_reference
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.targets.folders.output import Origin, Output
from passopt.targets.onnxruntime.joined_ranks import at_rank, check_rank_logits, join_ranks, load_any, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.testing.decoders import DecoderSpec, tiny_decoder


def feeds(past: int, seq: int = 5, heads: int = 3, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(past)
    mask = np.ones((2, past + seq), np.int64)
    mask[1, :2] = 0
    found = {
        "input_ids": random.integers(0, 34, (2, seq)),
        "attention_mask": mask,
        "position_ids": np.clip(mask.cumsum(1) - 1, 0, None)[:, past:],
    }
    for layer in range(2):
        for part in ("key", "value"):
            found[f"past.{layer}.{part}"] = random.normal(size=(2, heads, past, 4)).astype(dtype)
    return found


def worst(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() <= other.keys()
    return max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one)


def joined(spec: DecoderSpec, **options: object) -> onnx_ir.Model:
    return join_ranks(rank_models(tiny_decoder(spec)), heads=spec.heads, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("past", [0, 3])
def test_joined_ranks_equal_the_unsplit_model(degree: int, past: int, quantized: bool) -> None:
    spec = DecoderSpec(degree=degree, quantized=quantized)
    whole = Session(tiny_decoder(dataclasses.replace(spec, degree=1))).run(feeds(past))
    split = Session(joined(spec, rank_logits=True)).run(feeds(past))
    assert worst(whole, split) < 1e-6
    check_rank_logits(split)


def test_interface_is_that_of_the_unsplit_model() -> None:
    whole, split = tiny_decoder(), joined(DecoderSpec(degree=2))
    for one, other in zip((*whole.graph.inputs, *whole.graph.outputs), (*split.graph.inputs, *split.graph.outputs)):
        assert (one.name, one.dtype, str(one.shape)) == (other.name, other.dtype, str(other.shape))
    assert split.graph.opset_imports == whole.graph.opset_imports
    assert decoder_of(split) == decoder_of(whole)


def test_without_a_head_count_the_cache_shows_the_padding() -> None:
    split = join_ranks(rank_models(tiny_decoder(DecoderSpec(degree=2))))
    assert decoder_of(split).kv_heads == 4
    padded = feeds(3)
    for name, array in padded.items():
        if name.startswith("past"):
            padded[name] = np.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)))
    whole = Session(tiny_decoder()).run(feeds(3))
    outputs = Session(split).run(padded)
    assert not outputs["present.0.key"][:, 3].any()
    assert np.abs(outputs["logits"] - whole["logits"]).max() < 1e-5


def test_what_ranks_compute_alike_is_computed_once() -> None:
    split = joined(DecoderSpec(degree=2))
    names = [node.op_type for node in split.graph]
    alone = [node.op_type for node in tiny_decoder().graph]
    assert names.count("Softmax") == 2 * alone.count("Softmax")
    assert names.count("Sqrt") == alone.count("Sqrt")
    assert names.count("Range") == alone.count("Range")
    weights = split.graph.initializers
    assert "model.norm.weight" in weights
    assert "rank1/model.layers.0.mlp.up_proj.weight" in weights


def test_fp16_ranks_run() -> None:
    spec = DecoderSpec(degree=3, dtype=DataType.FLOAT16)
    given = feeds(2, dtype=np.float16)
    whole = Session(tiny_decoder(dataclasses.replace(spec, degree=1))).run(given)
    assert worst(whole, Session(joined(spec)).run(given)) < 2e-2


def test_swapped_heads_are_not_equal() -> None:
    ranks = rank_models(tiny_decoder(DecoderSpec(degree=3)))
    split = join_ranks([ranks[1], ranks[0], ranks[2]])
    assert worst(Session(tiny_decoder()).run(feeds(3)), Session(split).run(feeds(3))) > 1e-2


def test_a_shared_weight_that_disagrees_shows_in_the_logits() -> None:
    ranks = rank_models(tiny_decoder(DecoderSpec(degree=2)))
    value = ranks[1].graph.initializers["model.norm.weight"]
    value.const_value = LazyWeight(Literal.of(np.ones(10, np.float32)), value.name)
    outputs = Session(join_ranks(ranks, heads=3, rank_logits=True)).run(feeds(0))
    assert worst({"logits": Session(tiny_decoder()).run(feeds(0))["logits"]}, outputs) > 1e-3

    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        mlp (float[n,2] x) => (float[n,3] logits) <float[2,3] w = {%s}> { logits = MatMul(x, w) }"""
    pair = [parse_model(text % "1,2,3,4,5,6"), parse_model(text % "1,2,3,4,5,7")]
    outputs = Session(join_ranks(pair, rank_logits=True)).run({"x": np.ones((2, 2), np.float32)})
    with pytest.raises(ModelError, match="rank1/logits differs from rank0/logits"):
        check_rank_logits(outputs)


def test_at_rank_takes_a_piece_of_each_segment() -> None:
    whole = Literal.of(np.arange(24, dtype=np.float32).reshape(12, 2))
    second = at_rank(whole.shard(0, 2, segments=3), 1)
    assert not second.depends_on_rank
    value = LazyWeight(second).numpy()
    assert value[:, 0].tolist() == [4, 6, 12, 14, 20, 22]


def test_nodes_with_subgraphs_are_refused() -> None:
    model = parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        branch (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = one () => (float[2] a) { a = Identity(x) },
                        else_branch = two () => (float[2] b) { b = Neg(x) }>
        }""")
    with pytest.raises(ModelError, match="subgraphs"):
        join_ranks([model, model.clone()])


def write(tmp_path: Path, spec: DecoderSpec, name: str = "out") -> Path:
    model = tiny_decoder(spec, checkpoint=tmp_path / "checkpoint.safetensors")
    Output(model, Origin("1", "tp", {})).write(tmp_path / name)
    return tmp_path / name


def test_rank_folders_are_joined(tmp_path: Path) -> None:
    folder = write(tmp_path, DecoderSpec(degree=2))
    split = load_any(folder, heads=3)
    assert worst(Session(tiny_decoder()).run(feeds(3)), Session(split).run(feeds(3))) < 1e-6
    # Bytes that are equal in all rank folders are kept once, as in memory.
    assert set(split.graph.initializers) == set(joined(DecoderSpec(degree=2)).graph.initializers)


def test_single_models_and_plans_load(tmp_path: Path) -> None:
    single = write(tmp_path, DecoderSpec())
    for path in (single, single / "model.onnx"):
        verify_model(load_any(path))
    (tmp_path / "plan").mkdir()
    save_reference(tiny_decoder(DecoderSpec(degree=3)), tmp_path / "plan")
    split = load_any(tmp_path / "plan")
    assert worst(Session(tiny_decoder()).run(feeds(0)), Session(split).run(feeds(0))) < 1e-6


def test_one_rank_alone_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, DecoderSpec(degree=2))
    with pytest.raises(ModelError, match="one rank of 2; name the folder"):
        load_any(folder / "rank1")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, DecoderSpec(degree=2))
    shutil.rmtree(folder / "rank1")
    with pytest.raises(ModelError, match="rank1"):
        load_any(folder)


def test_a_damaged_replicated_weight_is_not_hidden(tmp_path: Path) -> None:
    folder = write(tmp_path, DecoderSpec(degree=2))
    weights = load_model(folder / "rank1").graph.initializers
    source = next(expression_of(weights["model.norm.weight"]).sources())  # type: ignore[union-attr]
    with (folder / "rank1" / "weights.safetensors").open("r+b") as file:
        file.seek(source.offset)
        file.write(np.float32(9).tobytes())
    assert "rank1/model.norm.weight" in load_any(folder).graph.initializers


def test_schedules_that_differ_are_refused(tmp_path: Path) -> None:
    folder, other = write(tmp_path, DecoderSpec(degree=2)), write(tmp_path, DecoderSpec(degree=2, layers=1), "other")
    for name in ("model.onnx", "weights.safetensors"):
        shutil.copy(other / "rank1" / name, folder / "rank1" / name)
    with pytest.raises(ModelError, match=r"collective 2 differs: manifest.json has AllReduce .* rank1 has AllGather"):
        load_any(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("shape", [1, 2]), ("dtype", "FLOAT16"), ("axis", 1), ("op", "AllGather")]
)
def test_a_schedule_is_compared_field_by_field(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path, DecoderSpec(degree=2))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["collectives"][3][field] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=re.escape("collective 3 differs: manifest.json has")):
        load_any(folder)
