"""Outputs written in one pass: the same bytes whatever workers, memory and route to the disk."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Fill
from passopt.ir.weights.safetensors_layout import layout_of
from passopt.ir.weights.sources import external_source, safetensors_sources, torch_sources
from passopt.ir.weights.streaming import budget, direct_io, write_weights
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.write_weights import write_safetensors, write_weight_files
from passopt.testing.layers import SHAPES, contents, rank_files, sharded, write_layers


@pytest.fixture
def weights(tmp_path):
    return write_layers(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_rank_gets_what_the_evaluator_gives(tmp_path, weights, degree):
    files = rank_files(tmp_path / "out", sharded(weights, degree), degree)
    report = write_weight_files(files)
    for file, data in zip(files, contents(files), strict=True):
        assert len(data) == file.layout.nbytes
        assert data.startswith(file.layout.header)
        with Evaluator(file.rank) as evaluator:
            for name, offset in file.layout.offsets.items():
                expected = evaluator.array(file.weights[name])
                assert data[offset : offset + expected.nbytes] == expected.tobytes(), name
    assert report.read == sum(weight.operand.nbytes for weight in weights.values())  # each byte once, for all ranks
    assert report.written == degree * sum(weight.nbytes for weight in files[0].weights.values())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("arena_bytes", [0, 1 << 16, 1 << 22])
def test_bytes_do_not_depend_on_how(tmp_path, weights, monkeypatch, direct, workers, arena_bytes):
    expected = rank_files(tmp_path / "expected", sharded(weights, 3 - 1), 2)
    digests = write_weight_files(expected).digests
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0 if direct else 1 << 60)
    monkeypatch.setattr(write_weights, "_THREADS_FROM", 0)
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files, StreamOptions(workers=workers, arena_bytes=arena_bytes))
    assert contents(files) == contents(expected)
    assert report.digests == digests
    assert report.workers == workers


def test_shards_of_all_degrees_are_parts_of_the_same_codes(tmp_path, weights):
    def joined(degree, name, axis):
        files = rank_files(tmp_path / f"tp{degree}", sharded(weights, degree), degree)
        write_weight_files(files)
        parts = [safetensors_sources(file.path)[name] for file in files]
        return np.concatenate([Evaluator().array(part) for part in parts], axis)

    for name, axis in (("q.codes", 0), ("q.scales", 0), ("down.codes", 1)):
        whole = joined(1, name, axis)
        assert all(np.array_equal(joined(degree, name, axis), whole) for degree in (2, 4)), name


def test_both_orders_of_sharding_and_quantising_are_the_same_bytes(tmp_path, weights):
    codes, scales = weights["down"].quantize()
    other = {"down.codes": codes.shard(1, 2), "down.scales": scales}
    mine = {name: weight for name, weight in sharded(weights, 2).items() if name in other}
    first, second = rank_files(tmp_path / "a", mine, 2), rank_files(tmp_path / "b", other, 2)
    write_weight_files(first)
    write_weight_files(second)
    assert contents(first) == contents(second)


def test_nan_is_named_with_its_row_in_the_file(tmp_path):
    array = np.ones((12, 4), np.float32)
    array[7, 2] = np.nan
    save_file({"w": array}, tmp_path / "s")
    codes, _ = safetensors_sources(tmp_path / "s")["w"].slice(0, 3, 12).quantize()
    with pytest.raises(ModelError, match="w: NaN or Inf in row 7"):
        write_safetensors(tmp_path / "out", {"codes": codes})


def test_too_little_memory_says_how_much_it_takes(tmp_path, weights):
    with pytest.raises(UsageError, match=r"`memory=0MiB` is too little: .* Give `memory=\d+MiB`"):
        write_weight_files(rank_files(tmp_path / "out", sharded(weights, 2), 2), StreamOptions(memory=1000))


def test_a_process_that_is_large_already_writes_in_the_least_memory(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(budget, "resident_bytes", lambda: 1 << 40)
    monkeypatch.setattr(write_weights, "_THREADS_FROM", 0)
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files)
    assert report.workers == 1
    with pytest.raises(UsageError, match="is too little"):
        write_weight_files(files, StreamOptions(memory=1 << 30))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_zip_entries_of_torch_are_streamed_in_place(tmp_path, kind, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0)
    state = {name: torch.randn(shape).to(getattr(torch, kind)) for name, shape in SHAPES.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    sources = torch_sources(tmp_path / "pytorch_model.bin")
    files = rank_files(tmp_path / "out", sharded({n: s.cast(DataType.FLOAT16) for n, s in sources.items()}, 2), 2)
    write_weight_files(files)
    with Evaluator(1) as evaluator:
        for name, offset in files[1].layout.offsets.items():
            expected = evaluator.array(files[1].weights[name]).tobytes()
            assert files[1].path.read_bytes()[offset : offset + len(expected)] == expected, name


def test_external_data_at_odd_places_is_streamed(tmp_path):
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    (tmp_path / "data").write_bytes(b"x" + array.tobytes())
    source = external_source(tmp_path / "data", "w", DataType.FLOAT, (5, 7), 1)
    codes, scales = source.quantize()
    write_safetensors(tmp_path / "out", {"w": source, "codes": codes, "scales": scales})
    found = safetensors_sources(tmp_path / "out")
    assert np.array_equal(Evaluator().array(found["w"]), array)
    assert np.array_equal(Evaluator().array(found["codes"]), Evaluator().array(codes))


def test_fills_alone_are_written(tmp_path):
    weights = {"w": Fill(DataType.FLOAT16, (5, 3), 2.0), "empty": Fill(DataType.FLOAT, (0, 4), 1.0)}
    write_safetensors(tmp_path / "out", weights)
    layout = layout_of(weights)
    data = (tmp_path / "out").read_bytes()
    assert np.frombuffer(data, np.float16, 15, layout.offsets["w"]).tolist() == [2.0] * 15
