"""Read models that are written by hand as ONNX text: tests and samples, and the files of `passopt run graph.onnxtxt`.

`float[6,4] w = random` declares a weight with seeded random values. Matrices of floats become lazy weights, as in a
model that was exported from a checkpoint.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal

TEXT_SUFFIX = ".onnxtxt"
#: Text is for small models, whose weights are printed digit by digit.
_MOST_RANDOM = 1 << 24
_RANDOM = re.compile(r'(float16|float)\[([\d,\s]+)\]\s*("[^"]+"|\w+)\s*=\s*random')


def load_text_model(path: Path) -> onnx_ir.Model:
    """Return the model in a text file.

    Raises:
        ModelError: If the file cannot be read or parsed; the message names the file and the parser's position.
    """
    try:
        return read_model(path.read_text(encoding="utf-8"))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_model(text: str) -> onnx_ir.Model:
    """Parse ONNX text, fill in `random` weights, and turn matrices of floats into lazy weights."""
    model = parse_model(_RANDOM.sub(_random_values, text))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        floating = tensor is not None and tensor.dtype in {onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16}
        if floating and tensor is not None and len(tensor.shape) == 2:
            value.const_value = LazyWeight(Literal.of(tensor.numpy()), name)
    return model


def _random_values(found: re.Match[str]) -> str:
    kind, dims, name = found.groups()
    shape = [int(dim) for dim in dims.split(",") if dim.strip()]
    if math.prod(shape) > _MOST_RANDOM:
        raise ModelError(f"{name}: {math.prod(shape):,} random values; a text may have {_MOST_RANDOM:,} at most")
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if kind == "float16":
        listed = ", ".join(str(bits) for bits in values.astype(np.float16).view(np.uint16).reshape(-1))
    else:
        listed = ", ".join(repr(float(value)) for value in values.reshape(-1))
    return f"{kind}[{dims}] {name} = {{{listed}}}"
