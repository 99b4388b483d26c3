"""Output folders: planned to the byte, whole or absent, and described by their manifest."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from blake3 import blake3
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError, UsageError, VerifyError
from passopt.ir.graph.collectives import schedule_of
from passopt.ir.graph.decoder import DEGREE
from passopt.ir.serialization.model_files import file_weights, load_model
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.concat import concat
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.sources import safetensors_sources
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.targets.folders import output
from passopt.targets.folders.digests import root_digest
from passopt.targets.folders.manifest import read_manifest
from passopt.targets.folders.output import Origin, Output, OutputReport
from passopt.testing.decoders import DecoderSpec, tiny_decoder

#: Even literals of this size are too large to stay inside model.onnx.
BIG = DecoderSpec(hidden=38)
SPECS = [
    DecoderSpec(),
    DecoderSpec(quantized=True),
    DecoderSpec(degree=2, dtype=DataType.FLOAT16),
    DecoderSpec(degree=3, quantized=True),
    DecoderSpec(degree=11, layers=1),
]


ORIGIN = Origin("0.1", "tp{degree=2}", {"model": "model.onnx", "root": "f" * 64})


def write(model: onnx_ir.Model, directory: Path, companions: Path | None = None) -> OutputReport:
    origin = dataclasses.replace(ORIGIN, companions=companions)
    return Output(model, origin).write(directory, stream=StreamOptions(arena_bytes=0))


def decoder(folder: Path, spec: DecoderSpec | None = None) -> onnx_ir.Model:
    """The tiny decoder with its weights in a file, as those of a checkpoint are."""
    return tiny_decoder(spec, checkpoint=folder / "checkpoint.safetensors")


@pytest.mark.parametrize("spec", SPECS)
def test_plan_is_what_is_written_to_the_byte(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"12345")
    (tmp_path / "source" / "modeling.py").write_text("never copied")
    report = write(decoder(tmp_path, spec), tmp_path / "out", tmp_path / "source")
    written = {
        str(path.relative_to(tmp_path / "out")): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert report.sizes.files == written
    assert report.sizes.nbytes == sum(written.values())
    assert report.sizes.weights.checkpoint > 0


def test_planning_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passopt.ir.weights.evaluator.Evaluator._pread", lambda *_: pytest.fail("a weight was read"))
    sizes = Output(decoder(tmp_path, DecoderSpec(degree=2)), ORIGIN).sizes
    assert set(sizes.files) == {"manifest.json"} | {
        f"rank{rank}/{name}" for rank in range(2) for name in ("model.onnx", "weights.safetensors")
    }
    assert f"{sizes.nbytes:,}  total" in sizes.to_text()
    assert json.loads(json.dumps(sizes.to_json()))["bytes"] == sizes.nbytes


def test_sharded_bytes_are_the_full_ones_and_padding(tmp_path: Path) -> None:
    whole = Output(decoder(tmp_path), ORIGIN).sizes.weights
    for degree in (2, 3, 4):
        model = decoder(tmp_path, DecoderSpec(degree=degree))
        split = Output(model, ORIGIN).sizes.weights
        weights = file_weights(model)
        replicated = sum(weight.nbytes for weight in weights.values() if not weight.depends_on_rank)
        assert split.checkpoint + split.constants == whole.checkpoint + whole.constants + (degree - 1) * replicated
        everything = sum(degree * weight.nbytes for weight in weights.values())
        assert split.checkpoint + split.constants + split.padding == everything
        assert bool(split.padding) == (degree != 1)


def test_what_is_made_of_shards_counts_as_they_do() -> None:
    """A Concat of two shards, and its cast, hold every number of both weights once, and what was padded."""
    one, other = (Literal.of(np.ones((rows, 60), np.float32)) for rows in (8, 10))
    joined = concat([one.shard(0, 2), other.pad(0, 12).shard(0, 2)], axis=0)
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n,60] x) => (float[n,10] y)
        <float[10,60] w = {{{",".join(["1"] * 600)}}}> {{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }}"""
    model = parse_model(text)
    model.metadata_props[DEGREE] = "2"
    for weight, width in ((joined, 4), (joined.cast(DataType.FLOAT16), 2)):
        value = model.graph.initializers["w"]
        value.const_value = LazyWeight(weight, "w")
        found = Output(model, ORIGIN).sizes.weights
        assert (found.constants, found.padding) == (18 * 60 * width, 2 * 60 * width)


def test_codes_and_scales_are_told_apart(tmp_path: Path) -> None:
    model = decoder(tmp_path, DecoderSpec(quantized=True))
    found = Output(model, ORIGIN).sizes.weights
    weights = file_weights(model)
    assert found.codes == sum(weight.nbytes for name, weight in weights.items() if name.endswith(".codes"))
    assert found.scales == sum(weight.nbytes for name, weight in weights.items() if name.endswith(".scales"))
    assert found.padding == 0
    # Written and read again, codes come from a file like any other weight; what reads them tells.
    write(model, tmp_path / "out")
    again = Output(load_model(tmp_path / "out"), ORIGIN).sizes.weights
    assert (again.codes, again.scales) == (found.codes, found.scales)


def test_rank_folders_hold_what_each_rank_computes_with(tmp_path: Path) -> None:
    spec = DecoderSpec(degree=2)
    report = write(decoder(tmp_path, spec), tmp_path / "out")
    whole = LazyWeight(file_weights(decoder(tmp_path))["model.layers.0.mlp.up_proj.weight"]).numpy()
    ranks = [load_model(tmp_path / "out" / f"rank{rank}") for rank in range(2)]
    parts = [model.graph.initializers["model.layers.0.mlp.up_proj.weight"].const_value.numpy() for model in ranks]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    slopes = [model.graph.initializers["alibi.slopes"].const_value.numpy().ravel().tolist() for model in ranks]
    assert slopes == [[0.0625, 0.00390625], [0.25, 0.0]]
    onnx.checker.check_model(tmp_path / "out" / "rank0" / "model.onnx")
    assert report.manifest.degree == 2


def test_manifest_describes_the_output(tmp_path: Path) -> None:
    model = decoder(tmp_path, DecoderSpec(degree=2))
    write(model, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.version, manifest.pipeline, manifest.degree) == ("0.1", "tp{degree=2}", 2)
    assert manifest.source == {"model": "model.onnx", "root": "f" * 64}
    assert manifest.collectives == schedule_of(model)
    assert collections.Counter(entry.op for entry in manifest.collectives) == {"AllReduce": 4, "AllGather": 1}
    assert "model.norm.weight" in manifest.replicated
    assert "model.layers.1.mlp.down_proj.weight" in manifest.sharded
    assert sorted(manifest.replicated + manifest.sharded) == sorted(file_weights(model))
    for rank in manifest.ranks:
        folder = tmp_path / "out" / rank.directory
        assert rank.model == blake3((folder / "model.onnx").read_bytes()).hexdigest()
        weights = load_model(folder).graph.initializers
        found = {name: blake3(weights[name].const_value.tobytes()).hexdigest() for name in rank.tensors}
        assert found == rank.tensors
        assert rank.root == root_digest(found)
    same = {name: digest for name, digest in manifest.ranks[0].tensors.items() if name in manifest.replicated}
    assert same.items() <= manifest.ranks[1].tensors.items()


def test_root_digest_changes_with_any_byte(tmp_path: Path) -> None:
    roots = {write(tiny_decoder(BIG, seed=seed), tmp_path / str(seed)).manifest.root for seed in range(3)}
    roots.add(write(tiny_decoder(BIG), tmp_path / "again").manifest.root)
    assert len(roots) == 3


def test_reference_outputs_keep_their_shards(tmp_path: Path) -> None:
    model = decoder(tmp_path, DecoderSpec(degree=2))
    Output(model, Origin("0.1", "tp", {})).write_reference(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "model.onnx",
        "weights.plan.json",
    ]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.ranks, manifest.root, manifest.degree) == ((), None, 2)
    assert file_weights(load_model(tmp_path / "out")) == file_weights(model)


def test_overflows_of_all_ranks_are_counted(tmp_path: Path) -> None:
    model = decoder(tmp_path, DecoderSpec(degree=2))
    value = model.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    huge = np.zeros((22, 10), np.float32)
    huge[[0, 1, 21], 4] = 1e6, -2e6, 7e5
    save_file({"w": huge}, tmp_path / "huge.safetensors")
    source = safetensors_sources(tmp_path / "huge.safetensors")["w"]
    value.const_value = LazyWeight(source.cast(DataType.FLOAT16).cast(DataType.FLOAT).shard(0, 2), value.name)
    assert write(model, tmp_path / "out").stream.overflows == {"w": 3}


class Stopping:
    """A progress that raises after so many calls."""

    def __init__(self, calls: int, error: BaseException | type[BaseException]) -> None:
        self.calls, self.error = calls, error

    def __call__(self, nbytes: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise self.error


def _write_until(folder: Path, progress: Stopping | None) -> OutputReport:
    planned = Output(decoder(folder, DecoderSpec(degree=2)), ORIGIN)
    return planned.write(folder / "deep" / "out", progress=progress, stream=StreamOptions(workers=1, arena_bytes=0))


@pytest.mark.parametrize("error", [ModelError, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_broken_write(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    with pytest.raises(UsageError if isinstance(error, OSError) else error):  # type: ignore[arg-type]
        _write_until(tmp_path, Stopping(10, error))
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupted_write_is_taken_up_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        _write_until(tmp_path, Stopping(60, KeyboardInterrupt))
    (partial,) = (tmp_path / "deep").iterdir()
    assert partial.name == ".out.partial"
    (partial / "rank7").mkdir()
    (partial / "rank7" / "stray").write_text("of another output")
    resumed = _write_until(tmp_path, None)
    assert 0 < resumed.stream.resumed < resumed.stream.resumed + resumed.stream.written
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    shutil.move(tmp_path / "deep" / "out", tmp_path / "resumed")
    whole = _write_until(tmp_path, None)
    assert whole.stream.resumed == 0
    assert resumed.manifest == whole.manifest
    for path in whole.sizes.files:
        assert (tmp_path / "resumed" / path).read_bytes() == (tmp_path / "deep" / "out" / path).read_bytes()
    found = {
        str(path.relative_to(tmp_path / "resumed")) for path in (tmp_path / "resumed").rglob("*") if path.is_file()
    }
    assert found == set(whole.sizes.files)


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UsageError, match="output exists"):
        write(tiny_decoder(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder()
    needed = Output(model, ORIGIN).sizes.nbytes
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed - 1))
    monkeypatch.setattr(output, "write_weight_files", lambda *_, **__: pytest.fail("something was written"))
    with pytest.raises(UsageError, match=f"needs {needed:,} bytes"):
        write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards_without_a_degree_are_a_defect(tmp_path: Path) -> None:
    model = decoder(tmp_path, DecoderSpec(degree=2))
    del model.metadata_props["passopt.degree"]
    with pytest.raises(VerifyError, match="of which degree"):
        write(model, tmp_path / "out")


def test_collectives_out_of_order_are_a_defect() -> None:
    model = tiny_decoder(DecoderSpec(degree=2))
    nodes = [node for node in model.graph if node.domain]
    nodes[1].metadata_props["passopt.collective"] = "3"
    with pytest.raises(VerifyError, match="is number 1 in graph order"):
        schedule_of(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"manifest": 99}', "manifest version 99"),
        ('{"manifest": 1, "degree": 2}', "not a manifest"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_manifest(tmp_path)


def test_manifests_do_not_lead_outside(tmp_path: Path) -> None:
    write(tiny_decoder(DecoderSpec(degree=2)), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"rank1"', '"../elsewhere"'))
    with pytest.raises(ModelError, match=r"names the folder '../elsewhere'"):
        read_manifest(tmp_path / "out")
    with pytest.raises(ModelError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
