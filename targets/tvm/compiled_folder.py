"""Define, write and read library.json, which describes a compiled folder.

It says what the folder holds, how its function is called and which CPU features it needs. A folder holds one library,
or (`degree` > 1) a folder with a library for each rank. Reading checks the names, the types and that the parts agree;
the bytes of lib.so and weights.safetensors are checked by the code that loads them.
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
from passopt.ir.json_text import read_json
from passopt.ir.weights.safetensors_header import read_header
from passopt.targets.folders.digests import root_digest

LIBRARY_NAME = "library.json"
CODE_NAME = "lib.so"
#: The source of the kernels of a library for cuda, for people to read.
SOURCE_NAME = "lib.cu"
#: The number of positions per block of keys. A cache holds whole blocks, so capacities are rounded up to a multiple of
#: this.
BLOCK = 16
#: The names of the global functions that a library of one rank calls. The process that runs it registers them.
ALL_REDUCE = "passopt.all_reduce"
ALL_GATHER = "passopt.all_gather"
#: The inputs that a compiled function may take besides the past. It always takes input_ids.
INPUTS = ("input_ids", "attention_mask", "position_ids")

#: The dtypes of a model's numbers, and those of its cache, which may hold codes instead.
Numbers: TypeAlias = Literal["fp32", "fp16", "bf16"]
CacheDtype: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
#: The parts of the linear layers that are int8: nothing, the weights, or the weights and the activations ("dynamic").
Quantized: TypeAlias = Literal["none", "weights", "groups", "dynamic"]
_CACHE_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
#: The bytes of the scale, in fp32, that each row of codes has: one position of one head.
_SCALE_BYTES = 4
_VERSION = 3
_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """The name of the shared library in the folder, and the blake3 digest of all its bytes."""

    file: str
    blake3: str

    @classmethod
    def of(cls, path: Path) -> CodeFile:
        """Return the entry for the file at `path`, which is read whole."""
        return cls(path.name, str(blake3.blake3(path.read_bytes()).hexdigest()))


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """The weights file of a library, with its size and digests (blake3, in hexadecimal).

    Attributes:
        file: The name of the file in the folder.
        nbytes: The size of the file in bytes.
        header: The digest of the safetensors header, including the length in front of it.
        root: The digest of all tensors together (see `root_digest`).
        tensors: The digest of each tensor, by name.
    """

    file: str
    nbytes: int
    header: str
    root: str
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, str]) -> WeightsFile:
        """Return the entry for the file at `path`; `tensors` are the digests that `write_safetensors` returned."""
        header = str(blake3.blake3(read_header(path)).hexdigest())
        return cls(path.name, path.stat().st_size, header, root_digest(tensors), tensors)


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The layout of the KV cache, which has one of two kinds.

    in-place: the function writes into `cache.N.key [batch, kv_heads, blocks, head_dim, block]` and
    `cache.N.value [batch, kv_heads, blocks · block, head_dim]` of layer N. functional: it takes `past.N.key` and
    `past.N.value` `[batch, kv_heads, past, head_dim]` and returns longer ones after the logits. `block` is the number
    of positions per block. In `dtype` int8, which is in-place, the scales `cache.N.key.scales` and
    `cache.N.value.scales` `f32[batch, kv_heads, blocks · block]` follow the codes of a layer. `codes_of` is the
    dtype of the numbers that codes stand for in the model.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: CacheDtype
    codes_of: Numbers = "fp32"
    block: int = BLOCK
    kind: Literal["in-place", "functional"] = "in-place"

    def rounded(self, positions: int) -> int:
        """Return for how many positions memory is needed to hold `positions` of them.

        An in-place cache holds whole blocks, so the number is rounded up; a functional cache holds exactly as many.
        """
        return -(-positions // self.block) * self.block if self.kind == "in-place" else positions

    def nbytes(self, batch: int, positions: int) -> int:
        """Return the bytes of all caches: 2 · layers · batch · kv_heads · positions (rounded) · bytes of a row.

        A row has head_dim · size bytes, and 4 more for its scale if it is codes.
        """
        rows = 2 * self.layers * batch * self.kv_heads * self.rounded(positions)
        return rows * (self.head_dim * _CACHE_BYTES[self.dtype] + (_SCALE_BYTES if self.dtype == "int8" else 0))


@dataclasses.dataclass(frozen=True)
class Logits:
    """The shape of the logits: `[batch, seq, vocab]`, or `[batch, 1, vocab]` for the last position only."""

    positions: Literal["all", "last"]
    vocab: int


@dataclasses.dataclass(frozen=True)
class Library:
    """One compiled model, or one rank of it.

    Its function takes, in this order: the `inputs`, the number of cached positions (as a shape), the caches and the
    `parameters`.

    Attributes:
        passopt: The version of passopt that wrote the library.
        target: The target that it was compiled for, as TVM calls it (llvm or cuda).
        mcpu: LLVM's name of the CPU; for cuda that of the host.
        isa: The instruction level of the kernels; for cuda the architecture.
        features: The CPU features (LLVM's names) without which the library must not be loaded.
        library: The shared library.
        weights: The weights file.
        function: The name of the function to call.
        inputs: The inputs that the function takes, some of `INPUTS`.
        parameters: The names of the weights in the order in which the function takes them.
        cache: The layout of the KV cache.
        logits: The shape of the logits.
        max_positions: The number of positions that the model has; None if it sets no bound.
        rank: The number of this rank, from 0.
        degree: The number of ranks.
        passes: The resolved pipeline that was run before.
        quantized: The parts of the linear layers that are int8.
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
        """Return the entry as the text of library.json; raise ValueError if its parts do not agree."""
        return _text(self)

    def write(self, directory: Path) -> None:
        """Write library.json into `directory`."""
        (directory / LIBRARY_NAME).write_text(self.text(), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class RankFolders:
    """The outer folder of a tensor-parallel model, which holds one folder with a library for each rank.

    `ranks` names these folders in the order of ranks. `roots` are the root digests of their weights; they tie the ranks
    together, since the code of all ranks is the same.
    """

    degree: int
    ranks: tuple[str, ...]
    roots: tuple[str, ...]

    def text(self) -> str:
        """Return the entry as the text of library.json; raise ValueError if its parts do not agree."""
        return _text(self)

    def write(self, directory: Path) -> None:
        """Write library.json into `directory`."""
        (directory / LIBRARY_NAME).write_text(self.text(), encoding="utf-8")


def read_library(directory: Path) -> Library | RankFolders:
    """Return the content of library.json in `directory`.

    Raises ModelError if the file is missing, damaged or of another version.
    """
    path = directory / LIBRARY_NAME
    if not path.is_file():
        raise ModelError(f"{directory}: has no {LIBRARY_NAME}; name a folder that `passopt compile` has written")
    try:
        body = read_json(path)
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
    """Return the digest of a whole description, which library.json stores to reveal edits.

    Otherwise an edit could go unnoticed: lib.so would run without complaint on inputs in a wrong order, for example.
    """
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
    in_codes = entry.cache.dtype == "int8"
    _demand(not in_codes or entry.cache.kind == "in-place", "a cache in int8 is not in-place")
    _demand(0 <= entry.rank < entry.degree, f"rank {entry.rank} of {entry.degree}")


def _demand(holds: object, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _is_name(text: str) -> bool:
    return text == Path(text).name and text not in ("", ".", "..")


def _decoded(entry: type[_Entry], body: object, where: str = "") -> _Entry:
    """Convert JSON to the dataclass `entry`; raise ValueError unless it has every field with its declared type."""
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
