"""Find the tensors in safetensors files, PyTorch .bin files (zip archives) and plain files, reading only the headers.

No tensor data is read and no pickle is executed: the index of a .bin file goes through an unpickler that knows only
tensors.
"""

from __future__ import annotations

import collections
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.json_text import parse_json
from passopt.ir.regular_files import open_regular
from passopt.ir.safetensors_header import read_header
from passopt.ir.weights.expressions import DataType, Source
from passopt.ir.weights.source_file import SourceFile

_HEADER_BYTES = 64 << 10

_SAFETENSORS_DTYPES = {
    "F64": DataType.DOUBLE,
    "F32": DataType.FLOAT,
    "F16": DataType.FLOAT16,
    "BF16": DataType.BFLOAT16,
    "I64": DataType.INT64,
    "I32": DataType.INT32,
    "I16": DataType.INT16,
    "I8": DataType.INT8,
    "U8": DataType.UINT8,
    "BOOL": DataType.BOOL,
}
SAFETENSORS_NAMES: Mapping[DataType, str] = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}

_TORCH_STORAGES = {
    "DoubleStorage": DataType.DOUBLE,
    "FloatStorage": DataType.FLOAT,
    "HalfStorage": DataType.FLOAT16,
    "BFloat16Storage": DataType.BFLOAT16,
    "LongStorage": DataType.INT64,
    "IntStorage": DataType.INT32,
    "ShortStorage": DataType.INT16,
    "CharStorage": DataType.INT8,
    "ByteStorage": DataType.UINT8,
    "BoolStorage": DataType.BOOL,
}


def identify(path: Path) -> SourceFile:
    """Return the file's identity: resolved path, size in bytes, modification time and a digest of its first 64 KiB.

    Raises:
        ModelError: If the file cannot be read.
    """
    path = Path(os.path.realpath(path))  # which, unlike `resolve`, takes links that lead in circles as they are
    try:
        with open_regular(path) as file:
            head = file.read(_HEADER_BYTES)
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    digest = hashlib.blake2b(head, digest_size=16).hexdigest()
    return SourceFile(str(path), stat.st_size, stat.st_mtime_ns, digest)


def check_unchanged(file: SourceFile) -> None:
    """Raise ModelError if the file is missing or is no longer the one that was identified."""
    path = Path(file.path)
    if not path.exists():
        raise ModelError(f"{path}: weight file is missing. Put it back, or export again.")
    found = identify(path)
    for what, expected, actual in (
        ("size", file.size, found.size),
        ("modification time", file.mtime_ns, found.mtime_ns),
        ("header", file.header_digest, found.header_digest),
    ):
        if expected != actual:
            raise ModelError(
                f"{path}: {what} changed since the plan was made (expected {expected}, found {actual}). "
                f"Restore the file, or export again."
            )


def safetensors_sources(path: Path) -> dict[str, Source]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ModelError: If the file cannot be read, or if its header does not describe it.
    """
    file = identify(path)
    text = read_header(path)
    try:
        header = parse_json(text[8:])
    except ValueError as error:
        raise ModelError(f"{path}: the safetensors header is not JSON: {error}") from error
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _safetensors_source(file, name, entry, len(text)) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the safetensors header does not describe tensors: {error!r}") from error


def _safetensors_source(file: SourceFile, name: str, entry: Mapping[str, Any], data: int) -> Source:
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelError(f"{file.path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported")
    shape = _whole_numbers(file, name, "shape", entry["shape"])
    start, stop = _whole_numbers(file, name, "data_offsets", entry["data_offsets"])
    source = Source(dtype, shape, name, file, data + start)
    if stop - start != source.nbytes:
        raise ModelError(f"{file.path}: tensor {name!r} takes bytes {start} to {stop}, its shape {source.nbytes}")
    return _checked(source)


def external_source(path: Path, name: str, dtype: DataType, shape: tuple[int, ...], offset: int) -> Source:
    """Return a tensor of ONNX external data.

    Args:
        path: The file with the data.
        name: The tensor's name.
        dtype: Its dtype.
        shape: Its shape in elements.
        offset: Its first byte in the file.

    Raises:
        ModelError: If the file is missing or ends before the tensor does.
    """
    return _checked(Source(dtype, shape, name, identify_cached(path), offset))


_identified: dict[tuple[str, int, int], SourceFile] = {}


def identify_cached(path: Path) -> SourceFile:
    """Return `identify(path)`, computed once per version of a file: a model names the same file for each tensor."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: external data is missing: {error.strerror}") from error
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _identified:
        _identified[key] = identify(path)
    return _identified[key]


def _whole_numbers(file: SourceFile, name: str, what: str, numbers: object) -> tuple[int, ...]:
    """Return numbers that a file states, or raise ModelError unless all are integers and none is negative.

    `True` and `4.0` are refused too, because a plan that contains them could not be read back.
    """
    listed = isinstance(numbers, (list, tuple))
    if not listed or not all(type(number) is int and number >= 0 for number in numbers):  # type: ignore[attr-defined]
        raise ModelError(
            f"{file.path}: tensor {name!r}: {what} {numbers!r}, expected a list of whole numbers, none negative"
        )
    return tuple(numbers)  # type: ignore[arg-type]


def _checked(source: Source) -> Source:
    _whole_numbers(source.file, source.name, "shape", source.shape)
    _whole_numbers(source.file, source.name, "first byte", [source.offset])
    end = source.offset + source.nbytes
    if end > source.file.size:
        raise ModelError(
            f"{source.file.path}: truncated: tensor {source.name!r} ends at byte {end}, the file at {source.file.size}"
        )
    return source


def torch_sources(path: Path) -> dict[str, Source]:
    """Return the tensors of a PyTorch .bin or .pt zip file by name, as byte ranges of its uncompressed entries.

    Raises:
        ModelError: If the file is not such a zip file, is damaged, or needs other code than that of tensors to load; or
            if its tensors are compressed, not contiguous or not little-endian.
    """
    file = identify(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            index = next((name for name in entries if name.endswith("/data.pkl")), None)
            if index is None:
                raise ModelError(f"{path}: no data.pkl inside; not a PyTorch checkpoint")
            root = index[: -len("data.pkl")]
            order = archive.read(root + "byteorder") if root + "byteorder" in entries else b"little"
            if order.strip() != b"little":
                raise ModelError(f"{path}: byte order {order!r}, only little is supported")
            state = _unpickled(archive.read(index), path)
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"{path}: not a zip file. Checkpoints written by torch < 1.6 are pickles, which are not opened; "
            f"save it again with a current torch or as safetensors."
        ) from error
    if not isinstance(state, dict):
        raise ModelError(f"{path}: holds a {type(state).__name__}, expected a state dict of tensors")
    with path.open("rb") as stream:
        return {
            name: _torch_source(path, file, stream, entries, root, name, tensor)
            for name, tensor in state.items()
            if isinstance(tensor, _Tensor)
        }


def _torch_source(
    path: Path,
    file: SourceFile,
    stream: io.BufferedReader,
    entries: Mapping[str, zipfile.ZipInfo],
    root: str,
    name: str,
    tensor: _Tensor,
) -> Source:
    shape = _whole_numbers(file, name, "shape", tensor.shape)
    stride = _whole_numbers(file, name, "strides", tensor.stride)
    (first,) = _whole_numbers(file, name, "first element", [tensor.start])
    if len(stride) != len(shape):
        raise ModelError(f"{path}: tensor {name!r}: {len(stride)} strides {stride} for shape {shape}")
    info = entries.get(f"{root}data/{tensor.key}")
    if info is None:
        raise ModelError(f"{path}: tensor {name!r} names storage {tensor.key}, which is not in the file")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ModelError(f"{path}: tensor {name!r} is compressed; only stored zip entries can be read in place")
    if not _is_contiguous(shape, stride):
        raise ModelError(f"{path}: tensor {name!r} has strides {stride}; only contiguous tensors are supported")
    stream.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    data = info.header_offset + 30 + name_length + extra_length
    start = int(first * tensor.dtype.itemsize)
    source = Source(tensor.dtype, shape, name, file, data + start)
    if start + source.nbytes > info.file_size:
        raise ModelError(f"{path}: tensor {name!r} needs {start + source.nbytes} bytes of {info.file_size}")
    return _checked(source)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the tensor is row-major; strides of axes of one element, and of empty tensors, do not matter."""
    expected = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    axes = zip(shape, stride, expected, strict=True)
    return 0 in shape or all(length == 1 or stride == wanted for length, stride, wanted in axes)


class _Tensor:
    """A tensor as the pickle describes it: storage key, first element, shape and strides in elements."""

    def __init__(self, storage: tuple[str, DataType], start: int, shape: tuple[int, ...], stride: tuple[int, ...]):
        self.key, self.dtype = storage
        if not isinstance(self.dtype, DataType):
            raise TypeError(f"{storage!r} is not a storage")
        self.start, self.shape, self.stride = start, shape, stride


def _rebuild_tensor(
    storage: tuple[str, DataType], start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, start, shape, stride)


def _unpickled(data: bytes, path: Path) -> object:
    try:
        return _TensorUnpickler(io.BytesIO(data), str(path)).load()
    except ModelError:
        raise
    except Exception as error:  # A damaged pickle may raise any error.
        raise ModelError(f"{path}: its data.pkl does not describe tensors: {error!r}") from error


class _TensorUnpickler(pickle.Unpickler):
    """Loads state dicts of tensors and refuses everything else, so that no code in the file can run."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in {"torch", "torch.storage"} and name in _TORCH_STORAGES:
            return _TORCH_STORAGES[name]
        raise ModelError(
            f"{self._where}: the pickle wants {module}.{name}, which is not part of a state dict of tensors. "
            f"It is not loaded, since a pickle can run code; convert the checkpoint to safetensors."
        )

    def persistent_load(self, token: Any) -> tuple[str, DataType]:
        kind, dtype, key, *_ = token
        if kind != "storage" or not isinstance(dtype, DataType):
            raise ModelError(f"{self._where}: unknown storage {token!r}")
        return str(key), dtype
