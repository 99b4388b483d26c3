"""Open a GGUF file: its metadata by key, and its tensors by name, each with its place in the file.

No tensor is read. A file that is damaged, in parts, or of another byte order is refused before anything else happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import gguf
import numpy as np

from passopt.frontends.checkpoint import LFS_POINTER
from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.source_file import SourceFile
from passopt.ir.weights.sources import identify

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"GGUF"

#: The storage types that safetensors holds as they are; all others are dequantised to fp32.
_PLAIN = {
    gguf.GGMLQuantizationType.F32: DataType.FLOAT,
    gguf.GGMLQuantizationType.F16: DataType.FLOAT16,
    gguf.GGMLQuantizationType.BF16: DataType.BFLOAT16,
}

#: The longest list in metadata that is read. The longest ones are merges of vocabularies, of some 500,000 entries.
_LONGEST = 1 << 21

#: Rows are read and dequantised in pieces of about so many elements, so that memory does not grow with a tensor.
_PIECE = 2 << 20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a GGUF file: `shape` is in the order of torch, and `rows` are those of all axes but the last."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> DataType:
        """Return the dtype that `pieces` give."""
        return _PLAIN.get(self.kind, DataType.FLOAT)

    @property
    def rows(self) -> int:
        """Return the number of rows; a vector has one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def pieces(self, path: Path, order: Sequence[int] | Array | None = None) -> Iterator[bytes]:
        """Yield the bytes of the tensor in `dtype`, some rows at a time.

        Args:
            path: The file.
            order: The row to read at each place, not far from it; or None for the order of the file.

        Raises:
            ModelError: If the file cannot be read.
        """
        width = self.nbytes // self.rows
        step = max(1, _PIECE // self.shape[-1])
        wanted = np.arange(self.rows) if order is None else np.asarray(order)
        try:
            with path.open("rb") as file:
                for start in range(0, self.rows, step):
                    yield self._values(_read_rows(file, self.offset, width, wanted[start : start + step]))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error

    def _values(self, rows: Array) -> bytes:
        if self.kind in _PLAIN:
            return rows.tobytes()
        with np.errstate(all="ignore"):  # Blocks of a damaged file may hold infinite scales.
            return gguf.dequantize(rows, self.kind).astype("<f4", copy=False).tobytes()


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: metadata and tensors; `file` identifies it, and `architecture` is llama.cpp's name."""

    path: Path
    file: SourceFile
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: str

    def values(self, name: str) -> Array:
        """Return all values of a small tensor, in fp32.

        Raises:
            ModelError: If the file cannot be read.
        """
        tensor = self.tensors[name]
        data = b"".join(tensor.pieces(self.path))
        return np.frombuffer(data, tensor.dtype.numpy()).astype(np.float32).reshape(tensor.shape)


def open_gguf(path: Path) -> GgufFile:
    """Return the file's metadata and tensors.

    Raises:
        ModelError: If it cannot be read, is damaged or truncated, is one part of several, or is no model.
    """
    file = identify(path)
    try:
        _check_start(path)
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [_tensor(entry) for entry in reader.tensors]
    except Exception as error:  # The package raises whatever a damaged file makes numpy raise.
        raise ModelError(f"{path}: is not a GGUF file, or is damaged or truncated: {_reason(error)}") from error
    _check_whole(path, metadata, len(tensors))
    _check_dequantisable(path, tensors)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: its metadata names no architecture (general.architecture)")
    return GgufFile(path.absolute(), file, metadata, {tensor.name: tensor for tensor in tensors}, architecture)


class _Reader(gguf.GGUFReader):
    """A reader that ends at the end of the file, where the package would go on with empty arrays."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Array:
        kind = np.dtype(dtype).newbyteorder("<")
        if offset + kind.itemsize * int(count) > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and something in it ends behind that")
        # Plain arrays, since views of memmap objects take ten times as long to make.
        return np.ndarray(int(count), kind, self.data, int(offset))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Array], list[int], list[Any]]:
        if raw_type == gguf.GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > _LONGEST:
                raise ValueError(f"it has a list of {length} entries")
        return super()._get_field_parts(orig_offs, raw_type)


def _check_start(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise ValueError("it is a git-lfs pointer instead of the file; fetch it with: git lfs pull")
    if head[:4] == MAGIC and head[4:6] == b"\0\0":
        raise ValueError("it is big-endian, and only little-endian files are supported")


def _tensor(entry: gguf.gguf_reader.ReaderTensor) -> Tensor:
    shape = tuple(int(length) for length in reversed(entry.shape.tolist()))
    if not shape or 0 in shape:
        raise ValueError(f"tensor {entry.name!r} has shape {list(shape)}")
    return Tensor(entry.name, entry.tensor_type, shape, int(entry.data_offset), int(entry.n_bytes))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_whole(path: Path, metadata: Mapping[str, Any], tensors: int) -> None:
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"{path}: is one of {parts} parts; join them with: llama-gguf-split --merge FIRST OUTPUT")
    kind = metadata.get("general.type", "model")
    if kind != "model" or not tensors:
        raise ModelError(f"{path}: holds {f'the {kind}' if tensors else 'no tensors'}, expected a model with weights")


def _check_dequantisable(path: Path, tensors: Sequence[Tensor]) -> None:
    examples = {tensor.kind: tensor.name for tensor in reversed(tensors) if tensor.kind not in _PLAIN}
    for kind, name in examples.items():
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{path}: tensor {name!r} is stored as {kind.name}, which the package gguf cannot dequantise; "
                f"convert the file to another type, such as Q8_0"
            ) from error


def _read_rows(file: BinaryIO, offset: int, width: int, rows: Array) -> Array:
    """Return rows of `width` bytes, after reading all from the first to the last in the file."""
    first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
    file.seek(offset + first * width)
    data = file.read(count * width)
    if len(data) != count * width:
        raise OSError(0, "it ended early")
    found: Array = np.frombuffer(data, np.uint8).reshape(count, width)[rows - first]
    return found
