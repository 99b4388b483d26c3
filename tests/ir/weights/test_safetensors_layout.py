"""weights.safetensors: aligned for memory mapping, exact as planned, and read by the safetensors library."""

from __future__ import annotations

import itertools
import json
import struct

import blake3
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.safetensors_layout import layout_of
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import write_weight_files


def arrays():
    rng = np.random.default_rng(0)
    return {
        "odd": rng.standard_normal((3, 5)).astype(np.float32),
        "whole": rng.standard_normal((4, 8)).astype(np.float16),
        "codes": rng.integers(-127, 127, (5, 7)).astype(np.int8),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False, True]),
        "ids": np.arange(16, dtype=np.int64),
        "name with é": np.arange(3, dtype=np.int32),
    }


def written(path, weights, arena_bytes=0):
    expressions = {name: Literal.of(array) for name, array in weights.items()}
    progress = []
    options = StreamOptions(arena_bytes=arena_bytes)
    report = write_weight_files([WeightFile(path, expressions)], options, progress=progress.append)
    return layout_of(expressions), report.digests[0], progress


def test_the_library_reads_equal_bytes(tmp_path):
    path = tmp_path / "w.safetensors"
    written(path, arrays())
    with safe_open(path, "numpy") as file:
        assert {name for name in file.keys() if not name.startswith("__padding.")} == arrays().keys()  # noqa: SIM118
        for name, array in arrays().items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()


def test_bf16_keeps_its_bits(tmp_path):
    path = tmp_path / "w.safetensors"
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    layout, _, _ = written(path, {"w": array})
    assert path.read_bytes()[layout.offsets["w"] :][: array.nbytes] == array.tobytes()
    assert json.loads(layout.header[8:])["w"]["dtype"] == "BF16"


def test_data_and_every_tensor_start_at_multiples_of_64(tmp_path):
    path = tmp_path / "w.safetensors"
    layout, _, _ = written(path, arrays())
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    for name, array in arrays().items():
        assert layout.offsets[name] % 64 == 0
        assert data[layout.offsets[name] :][: array.nbytes] == array.tobytes()


def test_sizes_that_need_padding_come_last():
    layout = layout_of({name: Literal.of(array) for name, array in arrays().items()})
    padded = [arrays()[name].nbytes % 64 != 0 for name in layout.offsets]
    assert padded == sorted(padded)
    assert sum(name.startswith("__padding.") for name in json.loads(layout.header[8:])) == sum(padded)


def test_there_are_no_holes(tmp_path):
    path = tmp_path / "w.safetensors"
    layout, _, _ = written(path, arrays())
    header = json.loads(layout.header[8:])
    ranges = [tuple(entry["data_offsets"]) for entry in header.values()]
    assert ranges[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))


def test_the_plan_is_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    layout, _, progress = written(path, arrays())
    assert path.stat().st_size == layout.nbytes
    assert path.read_bytes().startswith(layout.header)
    assert sum(progress) == sum(array.nbytes for array in arrays().values())


def test_digests_are_those_of_the_bytes_whatever_the_chunks(tmp_path):
    _, digests, _ = written(tmp_path / "a", arrays(), 0)
    _, others, _ = written(tmp_path / "b", arrays(), 1 << 20)
    assert digests == others == {name: blake3.blake3(array.tobytes()).hexdigest() for name, array in arrays().items()}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_weights_are_an_empty_file_of_the_format(tmp_path):
    path = tmp_path / "w.safetensors"
    layout, _, _ = written(path, {})
    assert path.stat().st_size == layout.nbytes == 64
    with safe_open(path, "numpy") as file:
        assert not list(file.keys())


def test_a_dtype_that_the_format_lacks_is_stored_as_bytes(tmp_path):
    path, data = tmp_path / "w.safetensors", bytes(range(100))
    weights = {"w": Literal(DataType.INT4, (10, 20), data), "v": Literal(DataType.FLOAT8E5M2, (50, 2), data)}
    write_weight_files([WeightFile(path, weights)])
    with safe_open(path, "numpy") as file:
        assert file.get_tensor("w").tobytes() == file.get_tensor("v").tobytes() == data


def test_such_a_weight_cannot_be_computed():
    with pytest.raises(ModelError, match="weight 'w' is FLOAT8E4M3FN, which can be copied but not cut"):
        layout_of({"w": Literal(DataType.FLOAT8E4M3FN, (10, 20), bytes(200)).slice(0, 0, 5)})
