"""library.json: what a compiled folder holds, how its function is called, and which CPU it needs.

A folder is one library, or (`degree` > 1) a folder of ranks, each a library. Reading checks names, types and that the
parts agree; the bytes of lib.so and weights.safetensors are checked by what loads them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import blake3

from passopt.ir.errors import ModelError
from passopt.ir.weights.safetensors_header import read_header
from passopt.targets.folders.digests import root_digest

LIBRARY_NAME = "library.json"
CODE_NAME = "lib.so"
#: The kernels of a library for cuda, to be read.
SOURCE_NAME = "lib.cu"
#: Positions per block of keys; a cache holds whole blocks, and so a capacity is rounded up to them.
BLOCK = 16
#: Global functions that a library of ranks calls, and that whoever runs it registers.
ALL_REDUCE = "passopt.all_reduce"
ALL_GATHER = "passopt.all_gather"
#: What a function may take besides the past; input_ids always.
INPUTS = ("input_ids", "attention_mask", "position_ids")

CacheDtype: TypeAlias = Literal["fp32", "fp16", "bf16"]
#: What of the linears is int8: nothing, weights, or activations too.
Quantized: TypeAlias = Literal["none", "weights", "dynamic"]
_CACHE_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
_VERSION = 2
_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """The shared library; `blake3` is the digest of all its bytes."""

    file: str
    blake3: str

    @classmethod
    def of(cls, path: Path) -> CodeFile:
        """The entry of a file as it lies on disk."""
        return cls(path.name, str(blake3.blake3(path.read_bytes()).hexdigest()))


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The weights: bytes of the file, blake3 of its header (with the length before it), of each tensor, of all."""

    file: str
    nbytes: int
    header: str
    root: str
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, str]) -> WeightsFile:
        """The entry of a file as it lies on disk; `tensors` is what `write_safetensors` returned."""
        header = str(blake3.blake3(read_header(path)).hexdigest())
        return cls(path.name, path.stat().st_size, header, root_digest(tensors), tensors)


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Keys and values of one sequence.

    in-place: the function writes into `cache.N.key [batch, kv_heads, blocks, head_dim, block]` and
    `cache.N.value [batch, kv_heads, blocks · block, head_dim]`. functional: it takes `past.N.key`, `past.N.value`
    `[batch, kv_heads, past, head_dim]` and returns them grown, after the logits.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: CacheDtype
    block: int = BLOCK
    kind: Literal["in-place", "functional"] = "in-place"

    def rounded(self, positions: int) -> int:
        """The positions that `positions` take: whole blocks of an in-place cache, as they are of a functional one."""
        return -(-positions // self.block) * self.block if self.kind == "in-place" else positions

    def nbytes(self, batch: int, positions: int) -> int:
        """Bytes of the caches of all layers: 2 · layers · batch · kv_heads · positions · head_dim · size."""
        numbers = 2 * self.layers * batch * self.kv_heads * self.rounded(positions) * self.head_dim
        return numbers * _CACHE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Logits:
    """`[batch, seq, vocab]`, or of the last position only: `[batch, 1, vocab]`."""

    positions: Literal["all", "last"]
    vocab: int


@dataclasses.dataclass(frozen=True)
class Library:
    """One compiled model. The function takes `inputs`, the number of cached positions as a shape, caches, `parameters`.

    `passopt` is the version that wrote it, `isa` the level of its kernels (for cuda the architecture; `mcpu` is of the
    host), `features` (LLVM's names) must be there at load, `passes` is the resolved pipeline; `max_positions` is None
    where the model has no bound.
    """

    passopt: str
    target: str
    mcpu: str
    isa: str
    features: tuple[str, ...]
    library: CodeFile
    weights: WeightsFile
    function: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    cache: CacheLayout
    logits: Logits
    max_positions: int | None
    rank: int
    degree: int
    passes: str
    quantized: Quantized = "none"

    def text(self) -> str:
        return _text(self)

    def write(self, directory: Path) -> None:
        (directory / LIBRARY_NAME).write_text(self.text(), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class RankFolders:
    """The outer folder under tensor parallelism: a library of its own in each of `ranks`, in the order of ranks.

    `roots` are the root digests of their weights: what ties together ranks whose code is the same.
    """

    degree: int
    ranks: tuple[str, ...]
    roots: tuple[str, ...]

    def text(self) -> str:
        return _text(self)

    def write(self, directory: Path) -> None:
        (directory / LIBRARY_NAME).write_text(self.text(), encoding="utf-8")


def read_library(directory: Path) -> Library | RankFolders:
    """library.json in `directory`. Raises ModelError if it is missing, damaged or of another version."""
    path = directory / LIBRARY_NAME
    if not path.is_file():
        raise ModelError(f"{directory}: has no {LIBRARY_NAME}; name a folder that `passopt compile` has written")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("digest", None)
        version = body["version"]
        if version != _VERSION:
            raise ModelError(f"{path}: version {version}, this passopt reads {_VERSION}; compile the model again")
        content = _digest(body)
        del body["version"]
        found = _decoded(RankFolders, body) if "ranks" in body else _decoded(Library, body)
        _check(found)
        _demand(digest == content, "its digest is not that of its content")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is damaged: {error}. Compile the model again.") from error
    return found


def _text(entry: Library | RankFolders) -> str:
    _check(entry)
    body = {"version": _VERSION, **dataclasses.asdict(entry)}
    return json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n"


def _digest(body: Mapping[str, object]) -> str:
    """Of the whole description: lib.so would run on inputs in another order without a word."""
    return str(blake3.blake3(json.dumps(body, sort_keys=True).encode()).hexdigest())


def _check(entry: Library | RankFolders) -> None:
    """Raise ValueError if the parts of an entry do not agree."""
    if isinstance(entry, RankFolders):
        _demand(len(entry.ranks) == entry.degree > 1, f"{len(entry.ranks)} ranks at degree {entry.degree}")
        _demand(len(entry.roots) == entry.degree, f"{len(entry.roots)} digests of weights at degree {entry.degree}")
        for folder in entry.ranks:
            _demand(_is_name(folder), f"folder {folder!r} is not beside {LIBRARY_NAME}")
        return
    for file in (entry.library.file, entry.weights.file):
        _demand(_is_name(file), f"file {file!r} is not beside {LIBRARY_NAME}")
    unknown = [name for name in entry.parameters if name not in entry.weights.tensors]
    _demand(not unknown, f"parameter {unknown[0] if unknown else ''!r} is not among the tensors")
    _demand(entry.weights.root == root_digest(entry.weights.tensors), "the root digest is not that of the tensors")
    sizes = dataclasses.asdict(entry.cache) | {"vocab": entry.logits.vocab, "max_positions": entry.max_positions or 1}
    for name, size in sizes.items():
        _demand(not isinstance(size, int) or size > 0, f"{name} is {size}")
    known = entry.inputs and len(set(entry.inputs)) == len(entry.inputs) and set(entry.inputs) <= set(INPUTS)
    _demand(known and "input_ids" in entry.inputs, f"inputs are {list(entry.inputs)}, expected some of {list(INPUTS)}")
    _demand(0 <= entry.rank < entry.degree, f"rank {entry.rank} of {entry.degree}")


def _demand(holds: object, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _is_name(text: str) -> bool:
    return text == Path(text).name and text not in ("", ".", "..")


def _decoded(entry: type[_Entry], body: object, where: str = "") -> _Entry:
    """`body` as the dataclass `entry`, every field there and of its declared type."""
    if not isinstance(body, dict):
        raise ValueError(f"{where.rstrip('.') or 'its content'} is no object")
    hints = typing.get_type_hints(entry)
    unlike = set(hints) ^ set(body)
    _demand(not unlike, f"{'lacks' if unlike - set(body) else 'has an unknown'} {where}{min(unlike, default='')}")
    return entry(**{name: _value(kind, body[name], f"{where}{name}") for name, kind in hints.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decoded(typing.cast("type[Any]", kind), value, f"{where}.")
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _value(options[0], value, where)
    if origin is Literal:
        _demand(value in options, f"{where} is {value!r}, expected one of {', '.join(map(repr, options))}")
        return value
    if origin is tuple:
        _demand(isinstance(value, list), f"{where} is no list")
        return tuple(_value(options[0], item, where) for item in value)
    if origin is not None:
        _demand(isinstance(value, dict), f"{where} is no object")
        return {name: _value(str, item, f"{where}.{name}") for name, item in value.items()}
    _demand(type(value) is kind, f"{where} is {value!r}, expected {kind.__name__}")
    return value
