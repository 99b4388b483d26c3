"""ALiBi from export to rank files: slopes of the true head count, and the baked mask turned into the formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.api.export import clean_up
from passopt.frontends.checkpoint import open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.serialization.model_files import load_model
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.lazy_weight import constant_tensor
from passopt.ir.weights.sources import safetensors_sources
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.folders.output import Origin, Output
from passopt.targets.onnxruntime.joined_ranks import load_any
from passopt.testing.checkpoints import ALIBI, CheckpointSpec, make_checkpoint
from passopt.verification.verify import VerifyOptions, verify

ORIGIN = Origin("0.1", "", {})
WIDTH = 4  # of a head


def exported(folder: Path, spec: CheckpointSpec, alibi: str = "formula", dtype=onnx_ir.DataType.FLOAT):
    if not folder.exists():
        make_checkpoint(folder, spec, trained=False)
    scratch = folder.parent / f"{folder.name}-{alibi}-{dtype.name}"
    scratch.mkdir(exist_ok=True)
    options = ExportOptions(dtype=dtype, alibi=alibi, trust_remote_code=True)
    model = export_graph(open_checkpoint(folder), options, scratch)
    return clean_up(model)


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., onnx_ir.Model]:
    """`export_of(alibi, dtype)`: a copy of an export of one checkpoint, which is made once."""
    folder = tmp_path_factory.mktemp("alibi") / "checkpoint"

    @functools.cache
    def made(alibi: str, dtype: onnx_ir.DataType) -> onnx_ir.Model:
        return exported(folder, ALIBI, alibi, dtype)

    return lambda alibi, dtype=onnx_ir.DataType.FLOAT: made(alibi, dtype).clone()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [5, 6, 12, 28, 40, 60])
def test_slopes_of_all_ranks_are_those_of_the_true_head_count(heads: int, tmp_path: Path):
    """Also where padding reaches or crosses a power of two, which would change the slopes of a padded count."""
    spec = CheckpointSpec("alibi", heads, heads * WIDTH, heads * 2, 1, 2 * heads + 1, 16)
    model = exported(tmp_path / "checkpoint", spec)
    expected = alibi_slopes(heads)
    degrees = sorted({*range(2, 9), *(degree for degree in range(2, 31) if heads % degree == 0)})
    for degree in degrees:
        shards = model.clone()
        run_passes(shards, resolve(f"tp{{degree={degree},pad=true}}").passes)
        Output(shards, ORIGIN).write(tmp_path / str(degree))
        found = np.concatenate([read_slopes(tmp_path / str(degree) / f"rank{rank}") for rank in range(degree)])
        np.testing.assert_array_equal(found[:heads], expected, err_msg=f"degree {degree}")
        assert not found[heads:].any(), f"degree {degree}: padded heads must have slope 0"


def read_slopes(folder: Path) -> np.ndarray:
    """The slopes of a rank as any tool would read them from its files."""
    model = load_model(folder)
    value = model.graph.initializers["alibi.slopes"]
    tensor = constant_tensor(value)
    assert tensor is not None
    assert "alibi.slopes" not in safetensors_sources(folder / "weights.safetensors"), "small constants are inline"
    return tensor.numpy().reshape(-1)


def test_a_padded_degree_with_other_slopes_would_be_wrong():
    """The trap that the test above guards against is real."""
    assert not np.array_equal(alibi_slopes(8)[:6], alibi_slopes(6))
    assert not np.array_equal(alibi_slopes(3), alibi_slopes(6)[:3])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16])
def test_a_baked_mask_becomes_the_graph_of_the_formula(dtype: onnx_ir.DataType, export_of):
    baked, formula = export_of("baked", dtype), export_of("formula", dtype)
    assert "alibi.future_mask" in baked.graph.initializers
    (record, *_) = run_passes(baked, resolve("dematerialize-alibi,fold-constants,dead-code").passes)
    assert record.result.matches == 1
    assert print_model(baked, canonical=True) == print_model(formula, canonical=True)


@pytest.mark.slow
def test_a_baked_mask_shards_after_dematerialisation(export_of, tmp_path: Path):
    baked, candidate = export_of("baked"), export_of("baked")
    run_passes(candidate, resolve("dematerialize-alibi,tp{degree=3}").passes)
    Output(candidate, ORIGIN).write(tmp_path / "out")
    report = verify(baked, load_any(tmp_path / "out"), options=VerifyOptions(tolerance=1e-5, max_positions=64))
    assert report.ok, report.to_text()
