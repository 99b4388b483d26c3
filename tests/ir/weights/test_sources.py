"""Headers of weight files: byte ranges are right, and what is damaged or dangerous is refused with a reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.sources import check_unchanged, external_source, identify, safetensors_sources, torch_sources

torch = pytest.importorskip("torch")


def read(source):
    with Evaluator() as evaluator:
        return evaluator.array(source)


def raw_safetensors(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_safetensors_tensors_are_found_by_name(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.float16),
        "c": np.array([[True], [False]]),
    }
    save_file(arrays, tmp_path / "w.safetensors", metadata={"format": "pt"})
    sources = safetensors_sources(tmp_path / "w.safetensors")
    assert sources.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(read(sources[name]), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 3, "not a safetensors file, or truncated"),
        (struct.pack("<Q", 2**40) + b"{}", "truncated"),
        (struct.pack("<Q", 0) + b"{}", "header of 0 bytes"),
        (struct.pack("<Q", 30) + b'{"w": {"dtype": "F32"', "truncated"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        safetensors_sources(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "header is not JSON"),
        (b'{"\xff": 1}', "header is not JSON"),
        ([], "does not describe tensors"),
        ({"w": 3}, "does not describe tensors"),
        ({"w": {"dtype": "F32"}}, "does not describe tensors"),
        (entry(dtype=["F32"]), "does not describe tensors"),
        (entry(shape=("2",)), r"tensor 'w': shape \['2'\], expected a list of whole numbers, none negative"),
        (entry(shape=(2.0,)), r"tensor 'w': shape \[2\.0\], expected a list"),
        (entry(shape=(0.5, 4)), r"tensor 'w': shape \[0\.5, 4\], expected a list"),
        (entry(shape=(True, 2)), r"tensor 'w': shape \[True, 2\], expected a list"),
        ({"w": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "tensor 'w': shape '2', expected a list"),
        (entry(offsets=(0.0, 8.0)), r"tensor 'w': data_offsets \[0\.0, 8\.0\], expected a list"),
        (entry(offsets=("0", "8")), r"tensor 'w': data_offsets \['0', '8'\], expected a list"),
        (entry(offsets=(0,)), "does not describe tensors"),
        (entry(dtype="F8_E4M3"), "'w' has dtype F8_E4M3, which is not supported"),
        (entry(offsets=(0, 12)), "'w' takes bytes 0 to 12, its shape 8"),
        (entry(offsets=(-8, 0)), r"'w': data_offsets \[-8, 0\], expected .* none negative"),
        (entry(shape=(-1, -2)), "'w': shape"),
        (entry(shape=(20,), offsets=(0, 80)), "truncated: tensor 'w' ends at byte"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header, message):
    with pytest.raises(ModelError, match=message):
        safetensors_sources(raw_safetensors(tmp_path / "w.safetensors", header))


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": np.arange(100.0)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"truncated: tensor 'w' ends at byte (\d+), the file at"):
        safetensors_sources(path)


def saved(path: Path, state: object, **options: object) -> Path:
    torch.save(state, path, **options)
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float32", DataType.FLOAT), ("float16", DataType.FLOAT16), ("bfloat16", DataType.BFLOAT16)]
    + [("int64", DataType.INT64), ("int8", DataType.INT8), ("bool", DataType.BOOL), ("float64", DataType.DOUBLE)],
)
def test_torch_tensors_of_every_dtype(tmp_path, kind, dtype):
    tensor = torch.arange(-3, 3).reshape(2, 3).to(getattr(torch, kind))
    source = torch_sources(saved(tmp_path / "w.bin", {"w": tensor}))["w"]
    assert (source.dtype, source.shape) == (dtype, (2, 3))
    assert read(source).astype(np.float64).tolist() == tensor.double().tolist()


def test_torch_views_start_inside_a_shared_storage(tmp_path):
    whole = torch.arange(20.0).reshape(5, 4)
    state = {"whole": whole, "rows": whole[2:4], "tail": whole.reshape(-1)[13:], "scalar": whole[3, 1]}
    sources = torch_sources(saved(tmp_path / "w.bin", state))
    assert len({source.file for source in sources.values()}) == 1
    assert sources["rows"].offset - sources["whole"].offset == 2 * 4 * 4
    for name, tensor in state.items():
        assert np.array_equal(read(sources[name]), tensor.numpy())


def test_torch_parameters_state_dicts_and_buffers(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    sources = torch_sources(saved(tmp_path / "w.bin", module.state_dict()))
    for name, tensor in module.state_dict().items():
        assert np.array_equal(read(sources[name]), tensor.numpy())
    parameters = dict(module.named_parameters())
    assert torch_sources(saved(tmp_path / "p.bin", parameters)).keys() == parameters.keys()


def test_strides_of_single_and_empty_axes_do_not_matter(tmp_path):
    column = torch.arange(3.0).reshape(1, 3).t()
    sources = torch_sources(saved(tmp_path / "w.bin", {"column": column, "empty": torch.zeros(3, 0)}))
    assert read(sources["column"]).tolist() == [[0], [1], [2]]
    assert read(sources["empty"]).shape == (3, 0)


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    sources = torch_sources(saved(tmp_path / "w.bin", {"w": torch.ones(2), "step": 3, "name": "x"}))
    assert sources.keys() == {"w"}


def test_a_tensor_that_is_not_contiguous_is_refused(tmp_path):
    path = saved(tmp_path / "w.bin", {"w": torch.arange(6.0).reshape(2, 3).t()})
    with pytest.raises(ModelError, match=r"'w' has strides \(1, 3\)"):
        torch_sources(path)


def test_a_legacy_pickle_is_refused_with_what_to_do(tmp_path):
    path = saved(tmp_path / "w.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="not a zip file.*save it again"):
        torch_sources(path)


def test_a_state_that_is_no_dict_is_refused(tmp_path):
    with pytest.raises(ModelError, match="expected a state dict"):
        torch_sources(saved(tmp_path / "w.bin", torch.ones(2)))


class Runs:
    """Makes a file if it is unpickled as pickle usually does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(path: Path, content: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", content)
        for name, data in entries.items():
            file.writestr(f"w/{name}", data)
    return path


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    proof = tmp_path / "proof"
    path = archive(tmp_path / "w.bin", pickle.dumps({"w": Runs(proof)}))
    with pytest.raises(ModelError, match="wants posix.mkdir, .* a pickle can run code"):
        torch_sources(path)
    assert not proof.exists()


@pytest.mark.parametrize("module", [("builtins", "eval"), ("torch", "load"), ("torch.storage", "_load_from_bytes")])
def test_only_tensor_classes_are_known(tmp_path, module):
    code = b"c" + "\n".join(module).encode() + b"\n."
    with pytest.raises(ModelError, match=f"wants {module[0]}.{module[1]}"):
        torch_sources(archive(tmp_path / "w.bin", code))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02}q\x00", pickle.dumps([1])])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    with pytest.raises(ModelError, match="does not describe tensors|expected a state dict"):
        torch_sources(archive(tmp_path / "w.bin", content))


class Described:
    """A tensor of six floats as torch pickles it, with anything for its place, shape and strides."""

    def __init__(self, start: object, shape: object, stride: object) -> None:
        self.arguments = (start, shape, stride)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.arguments, False, None)


class Storage:
    pass


class TensorPickler(pickle.Pickler):
    def persistent_id(self, item):
        return ("storage", torch.FloatStorage, "0", "cpu", 6) if isinstance(item, Storage) else None


def described(path: Path, start: object = 0, shape: object = (2, 3), stride: object = (3, 1)) -> Path:
    stream = io.BytesIO()
    TensorPickler(stream, protocol=2).dump({"w": Described(start, shape, stride)})
    return archive(path, stream.getvalue(), **{"data/0": np.arange(6, dtype=np.float32).tobytes()})


def test_a_described_tensor_is_read(tmp_path):
    assert read(torch_sources(described(tmp_path / "w.bin"))["w"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1, "shape": (2,), "stride": (1,)}, r"'w': first element \[-1\], expected a list"),
        ({"start": "0"}, r"'w': first element \['0'\], expected a list"),
        ({"start": 0.5}, r"'w': first element \[0\.5\], expected a list"),
        ({"shape": ("2", 3)}, r"'w': shape \('2', 3\), expected a list"),
        ({"shape": "23"}, "'w': shape '23', expected a list"),
        ({"shape": 6}, "'w': shape 6, expected a list"),
        ({"shape": (2.0, 3)}, r"'w': shape \(2\.0, 3\), expected a list"),
        ({"shape": (True, 6)}, r"'w': shape \(True, 6\), expected a list"),
        ({"shape": (-2, -3)}, r"'w': shape \(-2, -3\), expected a list"),
        ({"stride": (1,)}, r"'w': 1 strides \(1,\) for shape \(2, 3\)"),
        ({"stride": (6, 3, 1)}, r"'w': 3 strides \(6, 3, 1\) for shape \(2, 3\)"),
        ({"stride": (3.0, 1)}, r"'w': strides \(3\.0, 1\), expected a list"),
    ],
)
def test_a_described_tensor_that_makes_no_sense_is_refused(tmp_path, fields, message):
    with pytest.raises(ModelError, match=message):
        torch_sources(described(tmp_path / "w.bin", **fields))


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as file:
        file.writestr("readme", "x")
    with pytest.raises(ModelError, match=r"no data\.pkl inside"):
        torch_sources(tmp_path / "w.bin")


def repacked(path: Path, target: Path, change) -> Path:
    """The same archive, with every entry passed through `change(name, data)` → (data or None, compression)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data, how = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data, how)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: (data, zipfile.ZIP_DEFLATED), "'w' is compressed"),
        (lambda name, data: (None if "/data/" in name else data, zipfile.ZIP_STORED), "storage 0, which is not in"),
        (lambda name, data: (data[:8] if "/data/" in name else data, zipfile.ZIP_STORED), "needs 24 bytes of 8"),
        (lambda name, data: (b"big" if "byteorder" in name else data, zipfile.ZIP_STORED), "only little is supported"),
    ],
)
def test_an_archive_that_does_not_fit_its_index_is_refused(tmp_path, change, message):
    path = saved(tmp_path / "w.bin", {"w": torch.arange(6.0)})
    with pytest.raises(ModelError, match=message):
        torch_sources(repacked(path, tmp_path / "changed.bin", change))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path / "w.bin", {"w": torch.arange(600.0)})
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ModelError, match="not a zip file"):
        torch_sources(path)


def test_external_data_must_hold_the_tensor(tmp_path):
    path = tmp_path / "w.data"
    path.write_bytes(np.arange(6, dtype=np.float32).tobytes())
    assert read(external_source(path, "w", DataType.FLOAT, (2, 2), 8)).tolist() == [[2, 3], [4, 5]]
    with pytest.raises(ModelError, match="truncated: tensor 'w' ends at byte 28, the file at 24"):
        external_source(path, "w", DataType.FLOAT, (2, 2), 12)
    with pytest.raises(ModelError, match="external data is missing"):
        external_source(tmp_path / "none", "w", DataType.FLOAT, (2, 2), 0)


def test_a_changed_file_is_told_from_the_identified_one(tmp_path):
    path = tmp_path / "w.data"
    path.write_bytes(b"12345678")
    file = identify(path)
    check_unchanged(file)
    os.utime(path, ns=(file.mtime_ns, file.mtime_ns + 1))
    with pytest.raises(ModelError, match="modification time changed since the plan was made"):
        check_unchanged(file)
    path.write_bytes(b"12345670")
    os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    with pytest.raises(ModelError, match="header changed"):
        check_unchanged(file)
    path.write_bytes(b"123456789")
    with pytest.raises(ModelError, match="size changed.*expected 8, found 9"):
        check_unchanged(file)
    path.unlink()
    with pytest.raises(ModelError, match="weight file is missing"):
        check_unchanged(file)
