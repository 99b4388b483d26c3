"""Find ONNX files in installed packages, such as those of the extra `corpus`, and make inputs for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cases import Case

#: For each import name: the package that has it, and where its files lie.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "magika": ("magika", "models/*/*.onnx"),
    "rapidocr_onnxruntime": ("rapidocr-onnxruntime", "models/*.onnx"),
    "silero_vad": ("silero-vad", "data/*.onnx"),
}
#: The lengths of axes that a file leaves open, by input name; others are 1 for the first axis and 64 for the rest.
_LENGTHS: Mapping[str, tuple[int, ...]] = {"state": (2, 1, 128), "sr": (), "input": (1, 576), "x": (1, 3, 64, 320)}
_RATE = 16000


def absent_packages() -> list[str]:
    """Return the names of the packages that are not installed, whose files the corpus therefore lacks."""
    return [package for name, (package, _) in PACKAGES.items() if importlib.util.find_spec(name) is None]


def wheel_cases() -> list[Case]:
    """Return a case for every ONNX file of the packages that are installed; the packages are not imported."""
    return [_case(f"{name}/{path.stem}", path) for name, path in _files()]


def _files() -> Iterator[tuple[str, Path]]:
    for name, (_, pattern) in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from ((name, path) for path in sorted(Path(place).glob(pattern)))


def _case(name: str, path: Path) -> Case:
    model = onnx.load(path)
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in given]
    return Case(name, model, {value.name: _input(value) for value in inputs}, ("plain", "external", "alias"))


def _input(value: onnx.ValueInfoProto) -> Any:
    dims = value.type.tensor_type.shape.dim
    known = _LENGTHS.get(value.name, ())
    guess = known if len(known) == len(dims) else tuple(64 if axis else 1 for axis in range(len(dims)))
    shape = [dim.dim_value if dim.dim_value > 0 else length for dim, length in zip(dims, guess, strict=True)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    rng = np.random.default_rng(0)
    if value.name == "x" and len(shape) == 4:
        return _page(shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return np.full(shape, _RATE, dtype) if value.name == "sr" else rng.integers(0, 200, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _page(shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a white image with black strokes: on noise, a model that looks for text answers with rounding errors."""
    page = np.ones(shape, np.float32)
    for left in range(20, shape[-1] - 20, 12):
        page[..., shape[-2] // 4 : 3 * shape[-2] // 4, left : left + 5] = -1
    return page
