"""Exports of both families: the contract of the graph, its numbers, and loud failures where either would be wrong."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest

from passopt.api.export import clean_up
from passopt.frontends import baichuan
from passopt.frontends.bind_weights import bind_weights
from passopt.frontends.checkpoint import Checkpoint, open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions, Phase
from passopt.frontends.self_check import TOLERANCES, self_check
from passopt.ir.errors import CheckError, ModelError, UsageError
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.serialization.model_files import save_materialized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.testing.checkpoints import ODD, ROTARY, CheckpointSpec, make_checkpoint

# Two layers are enough to tell layers apart; the ALiBi family is to be right over a long context.
SHORT = dataclasses.replace(ROTARY, layers=2)
LONG = dataclasses.replace(ODD, max_positions=4096)
#: The self-check goes over 1,024 columns, where the steepest ALiBi bias is 512: one unit in its last place is 6e-5.
FP32_OVER_A_LONG_CONTEXT = 2e-5


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("rotary") / "checkpoint", SHORT, trained=False))


@pytest.fixture(scope="module")
def alibi(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("alibi") / "checkpoint"
    return open_checkpoint(make_checkpoint(directory, LONG, trained=False, dtype="fp16"))


@pytest.fixture(scope="module")
def rotary_graph(rotary: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> onnx_ir.Model:
    return export_graph(rotary, options(), tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def alibi_graph(alibi: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> onnx_ir.Model:
    return export_graph(alibi, options(), tmp_path_factory.mktemp("scratch"))


def options(**settings: Any) -> ExportOptions:
    return ExportOptions(**{"trust_remote_code": True, **settings})


def unchanged(model: onnx_ir.Model) -> onnx_ir.Model:
    return model


def signature(values: Any) -> dict[str, list[Any]]:
    return {value.name: [str(dim) if not isinstance(dim, int) else dim for dim in value.shape] for value in values}


def cache(kind: str, spec: CheckpointSpec, length: str) -> dict[str, list[Any]]:
    shape = ["batch", spec.heads, length, spec.head_dim]
    return {f"{kind}.{layer}.{part}": shape for layer in range(spec.layers) for part in ("key", "value")}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rotary", "alibi"])
def test_inputs_and_outputs_are_those_of_the_contract(family: str, request: pytest.FixtureRequest) -> None:
    spec = SHORT if family == "rotary" else LONG
    model = request.getfixturevalue(f"{family}_graph")
    inputs: dict[str, list[Any]] = {"input_ids": ["batch", "seq"], "attention_mask": ["batch", "past+seq"]}
    if family == "rotary":
        inputs["position_ids"] = ["batch", "seq"]
    inputs |= cache("past", spec, "past")
    outputs = {"logits": ["batch", "seq", spec.vocab]} | cache("present", spec, "past+seq")

    assert list(signature(model.graph.inputs).items()) == list(inputs.items())
    assert list(signature(model.graph.outputs).items()) == list(outputs.items())
    assert {value.dtype for value in model.graph.inputs[: len(inputs) - 2 * spec.layers]} == {DataType.INT64}
    assert (model.ir_version, model.opset_imports) == (10, {"": 21})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rotary", "alibi"])
def test_every_dimension_of_the_graph_has_a_name_of_the_contract(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"{family}_graph")
    shapes = [value.shape for node in model.graph for value in node.outputs if value.shape is not None]
    assert {str(dim) for shape in shapes for dim in shape if not isinstance(dim, int)} <= {
        "batch",
        "seq",
        "past",
        "past+seq",
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rotary", "alibi"])
def test_weights_are_lazy_under_their_state_dict_names(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint, model = (request.getfixturevalue(name) for name in (family, f"{family}_graph"))
    weights = {
        name: value.const_value.expression.text()
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, LazyWeight)
    }
    assert weights == {name: source.cast(DataType.FLOAT16).text() for name, source in checkpoint.tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rotary", "alibi"])
def test_half_precision_has_fp32_islands(family: str, request: pytest.FixtureRequest) -> None:
    """Seen in the graph, since onnxruntime on a CPU computes them in fp32 whatever the graph says."""
    nodes = [
        node for node in request.getfixturevalue(f"{family}_graph").graph if node.op_type in {"Softmax", "ReduceMean"}
    ]
    assert len(nodes) == 2 + (2 * 2 + 1)
    assert {node.inputs[0].dtype for node in nodes} == {DataType.FLOAT}


@pytest.mark.slow
def test_rotary_tables_are_one_pair(rotary_graph: onnx_ir.Model) -> None:
    tables = [name for name, value in rotary_graph.graph.initializers.items() if len(value.shape or ()) == 4]
    assert tables == ["rotary.cos", "rotary.sin"]
    assert {rotary_graph.graph.initializers[name].dtype for name in tables} == {DataType.FLOAT}


@pytest.mark.slow
def test_slopes_are_of_the_true_head_count(alibi_graph: onnx_ir.Model) -> None:
    slopes = alibi_graph.graph.initializers["alibi.slopes"].const_value
    assert slopes is not None
    assert slopes.dtype == DataType.FLOAT
    assert np.array_equal(slopes.numpy(), alibi_slopes(LONG.heads).reshape(-1, 1, 1))


@pytest.mark.slow
def test_nodes_say_where_they_come_from(alibi: Checkpoint, alibi_graph: onnx_ir.Model) -> None:
    keys = {key for node in alibi_graph.graph for key in node.metadata_props}
    assert keys == {"passopt.module", "passopt.source"}
    softmax = next(node for node in alibi_graph.graph if node.op_type == "Softmax")
    assert softmax.metadata_props["passopt.module"] == "model.layers.0.self_attn"
    file, line = softmax.metadata_props["passopt.source"].split(":")
    assert "softmax" in (alibi.directory / file).read_text().splitlines()[int(line) - 1]


def test_code_of_the_checkpoint_leaves_no_trace(
    rotary: Checkpoint, rotary_graph: onnx_ir.Model, alibi_graph: onnx_ir.Model
) -> None:
    assert not [name for name in sys.modules if "baichuan" in name and not name.startswith("passopt.")]
    assert not (rotary.directory / "__pycache__").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DataType.FLOAT, DataType.FLOAT16])
def test_rotary_family_agrees_with_the_stock_code(
    rotary: Checkpoint, dtype: DataType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert self_check(rotary, options(dtype=dtype), finish=unchanged) < TOLERANCES[dtype] / 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_alibi_family_agrees_with_the_stock_code(alibi: Checkpoint) -> None:
    assert self_check(alibi, options(dtype=DataType.FLOAT, alibi="baked"), finish=unchanged) < FP32_OVER_A_LONG_CONTEXT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rotary", "alibi"])
@pytest.mark.parametrize("phase", ["merged", "prefill", "decode"])
def test_torchscript_agrees_with_the_stock_code(family: str, phase: Phase, request: pytest.FixtureRequest) -> None:
    settings = options(dtype=DataType.FLOAT, exporter="torchscript", phase=phase)
    assert self_check(request.getfixturevalue(family), settings, finish=clean_up) < FP32_OVER_A_LONG_CONTEXT


@pytest.mark.slow
def test_bf16_agrees_after_constants_were_folded(alibi: Checkpoint) -> None:
    def fold(model: onnx_ir.Model) -> onnx_ir.Model:
        FoldConstants().run(model)
        return model

    assert self_check(alibi, options(dtype=DataType.BFLOAT16), finish=fold) < FP32_OVER_A_LONG_CONTEXT


@pytest.mark.slow
def test_self_check_notices_a_wrong_graph(alibi: Checkpoint) -> None:
    def steeper(model: onnx_ir.Model) -> onnx_ir.Model:
        slopes = model.graph.initializers["alibi.slopes"]
        assert slopes.const_value is not None
        slopes.const_value = onnx_ir.Tensor(slopes.const_value.numpy() * np.float32(1.5), name=slopes.name)
        return model

    with pytest.raises(CheckError, match="differs from the stock code"):
        self_check(alibi, options(dtype=DataType.FLOAT), finish=steeper)


@pytest.mark.slow
def test_fp16_is_right_at_the_end_of_the_context(alibi: Checkpoint, alibi_graph: onnx_ir.Model, tmp_path: Path) -> None:
    """At column 4095 a bias in fp16 is off by 2, which softmax turns into other attention: 8e-2 instead of 2e-3."""
    reference = export_graph(alibi, options(dtype=DataType.FLOAT), tmp_path)
    random = np.random.default_rng(0)
    length, past = 5, LONG.max_positions - 5
    feeds = {
        "input_ids": random.integers(0, LONG.vocab, (1, length)),
        "attention_mask": np.ones((1, past + length), np.int64),
    }
    states = random.standard_normal((2 * LONG.layers, 1, LONG.heads, past, LONG.head_dim)).astype(np.float16)
    names = list(cache("past", LONG, "past"))

    logits = []
    for name, model, kind in (("half", alibi_graph, np.float16), ("full", reference, np.float32)):
        caches = dict(zip(names, states.astype(kind), strict=True))
        logits.append(first_output(model, feeds | caches, tmp_path / name))
    assert np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max() < 2e-3


def first_output(model: onnx_ir.Model, feeds: dict[str, Any], directory: Path) -> np.ndarray[Any, np.dtype[Any]]:
    import onnxruntime  # type: ignore[import-untyped]

    directory.mkdir()
    save_materialized(model, directory)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], feeds)[0], np.float32)


@pytest.mark.slow
def test_without_consent_nothing_of_the_checkpoint_runs(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", ODD, trained=False)
    (directory / "modeling_baichuan.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"modeling_baichuan\.py.*pass `trust_remote_code=True`"):
        export_graph(open_checkpoint(directory), options(trust_remote_code=False), tmp_path)


def test_code_that_fails_to_import_is_named(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint", ODD, trained=False)
    (directory / "modeling_baichuan.py").write_text("import no_such_module")
    with pytest.raises(
        ModelError, match=r"modeling_baichuan\.py: importing BaichuanForCausalLM failed.*no_such_module"
    ):
        export_graph(open_checkpoint(directory), options(), tmp_path)


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        (None, "names BaichuanForCausalLM and no AutoConfig in an auto_map"),
        ({"AutoConfig": "someone/code--configuration.Config"}, "passopt downloads nothing"),
    ],
)
def test_code_that_is_not_in_the_checkpoint(rotary: Checkpoint, auto_map: object, message: str, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(rotary, config={**rotary.config, "auto_map": auto_map})
    with pytest.raises(ModelError, match=message):
        export_graph(checkpoint, options(), tmp_path)


def test_other_classes_are_not_supported() -> None:
    with pytest.raises(ModelError, match=r"SimpleNamespace is not supported.*Baichuan"):
        baichuan.check_supported(SimpleNamespace())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": DataType.INT8}, "FLOAT16, BFLOAT16, not in INT8"),
        ({"alibi": "none"}, "alibi is one of formula, baked, not 'none'"),
        ({"exporter": "fx"}, "exporter is one of dynamo, torchscript, not 'fx'"),
        ({"phase": "chunked"}, "phase is one of merged, prefill, decode, not 'chunked'"),
        ({"attention": "flash"}, "attention is one of eager, sdpa, not 'flash'"),
        ({"opset": 17}, "opset is one of 18, .* not 17"),
        ({"exporter": "torchscript", "opset": 21}, "torchscript exporter writes opset ≤ 20, not 21"),
        ({"exporter": "torchscript", "alibi": "baked"}, "torchscript exporter cannot slice a baked ALiBi mask"),
    ],
)
def test_options_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**settings)


def test_attention_of_the_checkpoint_is_not_chosen(rotary: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Baichuan checkpoint has one attention implementation"):
        export_graph(rotary, options(attention="sdpa"), tmp_path)


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    tensors = {key: source for key, source in checkpoint.tensors.items() if key != name}
    return dataclasses.replace(checkpoint, tensors=tensors)


def test_missing_weight_is_named(rotary: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights are missing that BaichuanForCausalLM has: model\.norm\.weight"):
        export_graph(without(rotary, "model.norm.weight"), options(), tmp_path)


def test_superfluous_weight_is_named(rotary: Checkpoint, tmp_path: Path) -> None:
    head = rotary.tensors["lm_head.weight"]
    extra = {"lm_head.bias": head, "model.layers.0.self_attn.rotary_emb.inv_freq": head}
    checkpoint = dataclasses.replace(rotary, tensors={**rotary.tensors, **extra})
    with pytest.raises(ModelError, match=r"does not have: lm_head\.bias$"):
        export_graph(checkpoint, options(), tmp_path)


def test_weight_of_another_shape_is_named(rotary: Checkpoint, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(rotary, config={**rotary.config, "vocab_size": 7})
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight' has shape \[520, 64\], by config.json it is \[7, 64\]"
    ):
        export_graph(checkpoint, options(), tmp_path)


def test_quantised_weights_are_not_a_start(rotary: Checkpoint, tmp_path: Path) -> None:
    codes = dataclasses.replace(rotary.tensors["model.norm.weight"], dtype=DataType.INT8)
    checkpoint = dataclasses.replace(rotary, tensors={**rotary.tensors, "model.norm.weight": codes})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is INT8"):
        export_graph(checkpoint, options(), tmp_path)


GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
head (float[1,2] x) => (float[1,3] logits) <float[3,2] w> {
    turned = Transpose (w)
    logits = MatMul (x, turned)
}
"""


def test_initializer_without_data_is_loud(rotary: Checkpoint) -> None:
    model = onnx_ir.from_onnx_text(GRAPH)
    value = onnx_ir.Value(name="model.lost", type=onnx_ir.TensorType(DataType.FLOAT), shape=onnx_ir.Shape([1]))
    value.const_value = LazyWeight(Literal.of(np.ones(1, np.float32)), "model.lost")
    model.graph.register_initializer(value)
    value.const_value = None
    with pytest.raises(ModelError, match=r"no tensor of the checkpoint for the weights model\.lost"):
        bind_weights(model, rotary, DataType.FLOAT)


def test_weight_that_tracing_lost_is_loud(rotary: Checkpoint) -> None:
    with pytest.raises(ModelError, match=r"does not use: lm_head\.weight, model\.embed_tokens\.weight"):
        bind_weights(onnx_ir.from_onnx_text(GRAPH), rotary, DataType.FLOAT)


@pytest.mark.slow
def test_head_that_lost_its_normalisation_is_loud(rotary_graph: onnx_ir.Model) -> None:
    baichuan.check_head(rotary_graph)
    with pytest.raises(ModelError, match="does not normalise its weight"):
        baichuan.check_head(onnx_ir.from_onnx_text(GRAPH))


def test_baked_mask_is_the_stock_mask(tmp_path: Path) -> None:
    source = baichuan.write_future_mask(tmp_path / "alibi.safetensors", alibi_slopes(3), 5)
    with Evaluator() as evaluator:
        mask = evaluator.array(source)
    expected = alibi_slopes(3)[:, None, None] * np.arange(5, dtype=np.float32) + np.triu(np.full((5, 5), -np.inf), 1)
    assert np.array_equal(mask, expected.astype(np.float32))
