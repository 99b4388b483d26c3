"""Write the tensors of a GGUF file to model.safetensors: under transformers' names, in its order of rows, dequantised.

Only some rows are in memory at a time. What is stored as fp32, fp16 or bf16 keeps its bytes; the rest becomes fp32.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.frontends.gguf.architectures import COMPUTED, ROPE_FACTORS, Architecture
from passopt.frontends.gguf.reader import GgufFile, Tensor
from passopt.ir.errors import ModelError
from passopt.ir.weights.sources import SAFETENSORS_NAMES

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 64
#: The linears whose rows llama.cpp reorders, with the key of the configuration that counts their heads.
_REORDERED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def parameters_of(model: GgufFile, architecture: Architecture) -> dict[str, Tensor]:
    """Return the tensors by the names of transformers' parameters.

    Raises:
        ModelError: If a tensor is none that the architecture has.
    """
    found, unknown = {}, []
    for name, tensor in model.tensors.items():
        if name == ROPE_FACTORS or COMPUTED.fullmatch(name):
            continue
        parameter = architecture.parameter(name)
        if parameter is None:
            unknown.append(name)
        else:
            found[parameter] = tensor
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ModelError(
            f"{model.path}: {model.architecture} with tensors {', '.join(unknown[:3])}{more} is not supported"
        )
    return found


def write_tensors(
    model: GgufFile, architecture: Architecture, config: Mapping[str, Any], path: Path, tell: Callable[[int], None]
) -> None:
    """Write all tensors to a new safetensors file; `tell` is given the numbers of bytes written.

    Raises:
        ModelError: If a tensor is unknown, or if the file cannot be read.
    """
    parameters = parameters_of(model, architecture)
    with path.open("wb") as file:
        file.write(_header(parameters))
        for name, tensor in parameters.items():
            order = _order(model, name, tensor, config) if architecture.interleaved else None
            # The values of a bias are reordered like rows.
            rows = tensor if order is None or len(tensor.shape) > 1 else _column(tensor)
            for piece in rows.pieces(model.path, order):
                file.write(piece)
                tell(len(piece))


def nbytes_of(model: GgufFile) -> int:
    """Return the bytes of all tensors as `write_tensors` writes them."""
    return sum(_nbytes(tensor) for tensor in model.tensors.values())


def _nbytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64) * tensor.dtype.itemsize)


def _header(parameters: Mapping[str, Tensor]) -> bytes:
    entries, position = {}, 0
    for name, tensor in parameters.items():
        stop = position + _nbytes(tensor)
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _order(model: GgufFile, name: str, tensor: Tensor, config: Mapping[str, Any]) -> Array | None:
    """Return for each row of transformers that of llama.cpp, where the pairs (i, half + i) of a head are neighbours."""
    key = _REORDERED.get(name.split(".")[-2])
    if key is None:
        return None
    count, heads, width = tensor.shape[0], config[key], config["head_dim"]
    if count != heads * width:
        raise ModelError(f"{model.path}: tensor {tensor.name!r} has {count} rows, expected {heads} heads of {width}")
    return np.arange(count).reshape(heads, width // 2, 2).swapaxes(1, 2).ravel()


def _column(vector: Tensor) -> Tensor:
    return dataclasses.replace(vector, shape=(*vector.shape, 1))
