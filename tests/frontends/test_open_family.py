"""Families whose classes transformers has: contract, every weight accounted for, numbers against eager torch."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from passopt.api.export import clean_up, export
from passopt.frontends.checkpoint import Checkpoint, open_checkpoint
from passopt.frontends.contract_names import name_dimensions
from passopt.frontends.export import export_graph
from passopt.frontends.options import MODEL_TYPES, ExportOptions
from passopt.frontends.self_check import self_check
from passopt.ir.errors import CheckError, ModelError, UsageError
from passopt.ir.graph.decoder import positions_of
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.testing.families import CONFIGS, make_family_checkpoint
from passopt.verification.verify import verify

FP32 = DataType.FLOAT


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Checkpoint] = {}

    def checkpoint(family: str) -> Checkpoint:
        if family not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                directory = make_family_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", family)
            made[family] = open_checkpoint(directory)
        return made[family]

    return checkpoint


@pytest.fixture(scope="module")
def llama(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> onnx_ir.Model:
    options = ExportOptions(dtype=FP32, opset=18)
    return export_graph(checkpoints("llama"), options, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def legacy(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> onnx_ir.Model:
    options = ExportOptions(dtype=FP32, exporter="torchscript", attention="sdpa")
    return export_graph(checkpoints("llama"), options, tmp_path_factory.mktemp("scratch"))


def signature(values: Any) -> dict[str, list[Any]]:
    return {value.name: [dim if isinstance(dim, int) else str(dim) for dim in value.shape] for value in values}


def expected_cache(kind: str, length: str) -> dict[str, list[Any]]:
    return {f"{kind}.{n}.{part}": ["batch", 2, length, 10] for n in range(2) for part in ("key", "value")}


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["llama", "legacy"])
def test_inputs_and_outputs_are_those_of_the_contract(graph: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(graph)
    inputs = {"input_ids": ["batch", "seq"], "attention_mask": ["batch", "past+seq"], "position_ids": ["batch", "seq"]}
    outputs = {"logits": ["batch", "seq", 97]}
    assert list(signature(model.graph.inputs).items()) == list((inputs | expected_cache("past", "past")).items())
    assert list(signature(model.graph.outputs).items()) == list(
        (outputs | expected_cache("present", "past+seq")).items()
    )
    assert model.opset_imports == {"": 18 if graph == "llama" else 20}


@pytest.mark.parametrize("graph", ["llama", "legacy"])
def test_weights_are_lazy_under_their_state_dict_names(
    graph: str, checkpoints: Any, request: pytest.FixtureRequest
) -> None:
    lazy = {
        name: value.const_value.expression
        for name, value in request.getfixturevalue(graph).graph.initializers.items()
        if isinstance(value.const_value, LazyWeight)
    }
    assert lazy == checkpoints("llama").tensors


@pytest.mark.parametrize("graph", ["llama", "legacy"])
def test_nodes_say_where_they_come_from(graph: str, request: pytest.FixtureRequest) -> None:
    softmax = [node for node in request.getfixturevalue(graph).graph if node.op_type == "Softmax"]
    assert [node.metadata_props["passopt.module"] for node in softmax] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    file = "modeling_llama.py" if graph == "llama" else "sdpa_attention.py"
    assert {node.metadata_props["passopt.source"].split(":")[0] for node in softmax} == {file}


def test_both_exporters_and_implementations_agree(llama: onnx_ir.Model, legacy: onnx_ir.Model) -> None:
    """Prefill with padding on the left, chunks, decode with a cache."""
    assert verify(clean_up(llama.clone()), clean_up(legacy.clone())).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"exporter": "torchscript"}),
        ("mistral", {"exporter": "torchscript", "attention": "sdpa", "dtype": DataType.FLOAT16}),
        ("gpt2", {"exporter": "torchscript", "opset": 18}),
        ("falcon-gqa", {"exporter": "torchscript", "phase": "prefill"}),
        ("opt", {"exporter": "torchscript", "phase": "decode"}),
        ("bloom", {"exporter": "torchscript", "dtype": DataType.FLOAT16}),
        ("bloom", {"dtype": DataType.BFLOAT16}),
        ("falcon-mqa", {"opset": 23, "attention": "sdpa"}),
    ],
)
def test_families_agree_with_eager_torch(
    family: str, settings: dict[str, Any], checkpoints: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoints(family)
    capfd.readouterr()
    options = ExportOptions(**{"dtype": FP32, **settings})
    error = self_check(checkpoint, options, finish=clean_up)
    assert error < {FP32: 1e-5, DataType.BFLOAT16: 1e-4, DataType.FLOAT16: 5e-3}[options.dtype]
    assert capfd.readouterr().out == ""


def test_self_check_notices_a_wrong_graph(checkpoints: Any) -> None:
    def another_scale(model: onnx_ir.Model) -> onnx_ir.Model:
        softmax = next(node for node in model.graph if node.op_type == "Softmax")
        softmax.attributes["axis"] = onnx_ir.AttrInt64("axis", 2)
        return model

    with pytest.raises(CheckError, match="differs from the stock code"):
        self_check(checkpoints("qwen2"), ExportOptions(dtype=FP32, exporter="torchscript"), finish=another_scale)


def test_prefill_has_no_past(checkpoints: Any, tmp_path: Path) -> None:
    options = ExportOptions(dtype=FP32, exporter="torchscript", phase="prefill")
    model = export_graph(checkpoints("llama"), options, tmp_path)
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert signature(model.graph.inputs)["attention_mask"] == ["batch", "seq"]
    assert signature(model.graph.outputs)["present.1.value"] == ["batch", 2, "seq", 10]


def test_decode_takes_one_token(checkpoints: Any, tmp_path: Path) -> None:
    options = ExportOptions(dtype=FP32, exporter="torchscript", phase="decode")
    model = export_graph(checkpoints("llama"), options, tmp_path)
    inputs, outputs = signature(model.graph.inputs), signature(model.graph.outputs)
    assert (inputs["input_ids"], inputs["attention_mask"]) == (["batch", 1], ["batch", "past+1"])
    assert (outputs["logits"], outputs["present.0.key"]) == (["batch", 1, 97], ["batch", 2, "past+1", 10])


def with_tensors(checkpoint: Checkpoint, **changed: Any) -> Checkpoint:
    tensors = {name: source for name, source in checkpoint.tensors.items() if name not in changed}
    added = {name: source for name, source in changed.items() if source is not None}
    return dataclasses.replace(checkpoint, tensors=tensors | added)


LEGACY = ExportOptions(dtype=FP32, exporter="torchscript")


def test_body_that_was_saved_alone_finds_its_weights(checkpoints: Any, tmp_path: Path) -> None:
    """As published GPT-2 checkpoints are: no `transformer.` before the names, and buffers of a causal mask."""
    checkpoint = checkpoints("gpt2")
    tensors = {name.removeprefix("transformer."): source for name, source in checkpoint.tensors.items()}
    tensors["h.0.attn.bias"] = tensors["wpe.weight"]
    model = export_graph(dataclasses.replace(checkpoint, tensors=tensors), LEGACY, tmp_path)
    assert "transformer.wte.weight" in model.graph.initializers


def test_head_under_its_published_name_finds_its_weight(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("gpt-neox")
    assert "embed_out.weight" in checkpoint.tensors
    head = export_graph(checkpoint, LEGACY, tmp_path).graph.initializers["lm_head.weight"].const_value
    assert isinstance(head, LazyWeight)
    assert head.expression == checkpoint.tensors["embed_out.weight"]


def test_tied_head_may_be_repeated(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("qwen2")
    repeated = with_tensors(checkpoint, **{"lm_head.weight": checkpoint.tensors["model.embed_tokens.weight"]})
    model = export_graph(repeated, LEGACY, tmp_path)
    assert "lm_head.weight" not in model.graph.initializers


def test_tied_head_of_other_values_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("qwen2")
    other = checkpoints("llama").tensors["lm_head.weight"]
    with pytest.raises(ModelError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' differ"):
        export_graph(with_tensors(checkpoint, **{"lm_head.weight": other}), LEGACY, tmp_path)


def test_missing_and_unknown_weights_are_named(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(
        ModelError, match=r"weights are missing that LlamaForCausalLM has: model\.layers\.1\.self_attn\.q"
    ):
        export_graph(with_tensors(checkpoint, **{name: None}), LEGACY, tmp_path)
    extra = {"model.layers.0.self_attn.q_proj.bias": checkpoint.tensors["model.norm.weight"]}
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.0\.self_attn\.q_proj\.bias"):
        export_graph(with_tensors(checkpoint, **extra), LEGACY, tmp_path)


def test_implementation_that_a_class_lacks_is_named(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bloom with sdpa attention cannot be built"):
        export_graph(checkpoints("bloom"), ExportOptions(attention="sdpa"), tmp_path)


def test_baked_mask_is_for_baichuan2(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only Baichuan can be exported with a baked ALiBi mask"):
        export_graph(checkpoints("bloom"), ExportOptions(alibi="baked"), tmp_path)


def test_configurations_are_of_supported_types() -> None:
    assert {str(config["model_type"]) for config in CONFIGS.values()} == MODEL_TYPES


def test_unknown_type_names_what_is_supported(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    unknown = dataclasses.replace(checkpoint, config={**checkpoint.config, "model_type": "rwkv"})
    with pytest.raises(ModelError, match=r"bloom, falcon, .*qwen3, and Baichuan"):
        export_graph(unknown, LEGACY, tmp_path)


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        ("((s70**2)//s70)", "seq"),
        ("s62 + s70", "past+seq"),
        ("1 + s62", "past+1"),
        ("6*s53", "6*batch"),
        ("(s70//2)", "(seq//2)"),
    ],
)
def test_dimensions_are_named_by_the_inputs(dimension: str, expected: str) -> None:
    value = onnx_ir.Value(name="input_ids", shape=onnx_ir.Shape(["s53", "s70"]))
    past = onnx_ir.Value(name="past.0.key", shape=onnx_ir.Shape(["s53", 2, "s62", 10]))
    mask = onnx_ir.Value(name="attention_mask", shape=onnx_ir.Shape(["s53", "s62 + s70"]))
    node = onnx_ir.node("Identity", [value])
    node.outputs[0].shape = onnx_ir.Shape([dimension])
    name_dimensions(onnx_ir.Graph([value, past, mask], node.outputs, nodes=[node]), "merged")
    assert node.outputs[0].shape == [expected]


def test_the_last_position_of_mpt_is_left_out_and_said_so(tmp_path: Path) -> None:
    """Its bias begins at max(0, positions - length), which is 0 on both sides of that branch; nobody knows that."""
    make_family_checkpoint(tmp_path / "mpt", "mpt")
    result = export(tmp_path / "mpt", tmp_path / "out", dtype="fp32")
    assert ", at most 63 positions\n" in str(result)
    assert result.positions == 63
    assert positions_of(result.model.ir) == 63
