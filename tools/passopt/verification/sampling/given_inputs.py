"""Read and check inputs that a user gives, in place of sampled ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import UsageError
from passopt.ir.weights.expressions import DataType
from passopt.verification.sampling.lengths import free_inputs

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def read_inputs(path: Path) -> dict[str, Array]:
    """Read the arrays of an .npz file by name.

    Raises:
        UsageError: If the file cannot be read, or holds something else than arrays of numbers.
    """
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError(f"{path}: holds one array, expected an .npz file of arrays by the names of inputs")
            with file:
                return {name: file[name] for name in file.files}
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{path}: is no .npz file of arrays: {error}. Write one with numpy.savez") from error
    except Exception as error:  # zipfile and zlib have errors of their own for damaged files
        raise UsageError(f"{path}: is damaged: {error}") from error


def check_inputs(model: onnx_ir.Model, given: Mapping[str, Array]) -> dict[str, Array]:
    """Return the given inputs in the dtypes of the model's inputs.

    Raises:
        UsageError: If a name is no input, an input has no array, or an array does not fit.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    unknown = sorted(given.keys() - inputs.keys())
    missing = sorted({value.name or "" for value in free_inputs(model)} - given.keys())
    if unknown or missing:
        parts = [f"the model has no input {', '.join(unknown)}"] if unknown else []
        parts += [f"the file has no array for {', '.join(missing)}"] if missing else []
        raise UsageError(
            f"{'; '.join(parts)}. The inputs are: {', '.join(stated_input(value) for value in inputs.values())}"
        )
    _check_symbols(inputs, given)
    return {name: _fitting(inputs[name], array) for name, array in given.items()}


def _check_symbols(inputs: Mapping[str, onnx_ir.Value], given: Mapping[str, Array]) -> None:
    """Raise UsageError if a symbol has different lengths in two arrays; arrays of other ranks are refused later."""
    known: dict[str, tuple[int, str]] = {}
    for name, array in given.items():
        shape = inputs[name].shape
        for axis, dim in enumerate(() if shape is None or len(shape) != array.ndim else shape.dims):
            symbol = None if isinstance(dim, int) else dim.value
            if symbol is None:
                continue
            length, other = known.setdefault(symbol, (array.shape[axis], name))
            if length != array.shape[axis]:
                raise UsageError(
                    f"{symbol} is {length} in the array for {other} and {array.shape[axis]} in that for {name}; "
                    f"the model gives both the same length"
                )


def stated_input(value: onnx_ir.Value) -> str:
    """Return the name, dtype and dimensions that a graph states of an input."""
    dims = "" if value.shape is None else f"[{', '.join(str(dim) for dim in value.shape.dims)}]"
    return f"{value.name} {value.dtype.name if value.dtype is not None else '?'}{dims}"


def _fitting(value: onnx_ir.Value, array: Array) -> Array:
    dims = None if value.shape is None else list(value.shape.dims)
    fits = dims is None or (
        len(dims) == array.ndim
        and all(not isinstance(dim, int) or dim == length for dim, length in zip(dims, array.shape, strict=True))
    )
    if not fits:
        raise UsageError(
            f"the array for {value.name} has the shape {list(array.shape)}, expected {stated_input(value)}"
        )
    if value.dtype is None or value.dtype == DataType.STRING or value.dtype.numpy() == array.dtype:
        return array
    kinds = {array.dtype.kind, value.dtype.numpy().kind}
    if not (kinds <= set("iu") or (value.dtype in FLOATS and array.dtype.kind == "f")):
        raise UsageError(f"the array for {value.name} is {array.dtype}, expected {stated_input(value)}")
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = np.asarray(array.astype(value.dtype.numpy()))
    if not _holds(fitted, array):
        raise UsageError(f"the array for {value.name} is {array.dtype} with numbers beyond {stated_input(value)}")
    return fitted


def _holds(fitted: Array, array: Array) -> bool:
    """Return whether an array kept its numbers in another dtype, but for the rounding of floats."""
    if array.dtype.kind in "iu":
        return bool(np.array_equal(fitted.astype(object), array.astype(object)))
    return bool(np.array_equal(np.isfinite(fitted.astype(np.float64)), np.isfinite(array.astype(np.float64))))
