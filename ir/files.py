"""Models on disk: model.onnx with weights beside it, or with a plan that says where they come from.

Data outside the model's folder is read only through a plan, never through `..`, absolute paths or links.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx_ir
from google.protobuf.message import DecodeError

from passopt.ir import expressions as ex
from passopt.ir.errors import ModelError
from passopt.ir.evaluate import Evaluator
from passopt.ir.layout import plan_layout, write_safetensors
from passopt.ir.plan import PLAN_NAME, read_plan, write_plan
from passopt.ir.sources import external_source
from passopt.ir.weights import SMALL_BYTES, LazyWeight, expression_of

MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "weights.safetensors"


def model_path(path: Path) -> Path:
    """The model file that `path` (a file or an output folder) means. Raises ModelError with what to do."""
    if path.is_dir():
        inside = path / MODEL_NAME
        if not inside.exists() and (path / "rank0" / MODEL_NAME).exists():
            raise ModelError(f"{path}: holds one model per rank; name one of them, e.g. {path / 'rank0'}")
        path = inside
    if not path.exists():
        raise ModelError(f"{path}: no such model. Make one with: passopt export CHECKPOINT -o DIR")
    return path


def load_model(path: Path | str) -> onnx_ir.Model:
    """Read model.onnx; every external tensor becomes a lazy weight and no weight byte is read."""
    path = model_path(Path(path))
    try:
        model = onnx_ir.load(path)
    except (DecodeError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not an ONNX model, or truncated: {error}") from error
    if not len(model.graph) and not model.graph.outputs:
        raise ModelError(f"{path}: not an ONNX model: the graph has neither nodes nor outputs")
    plan: dict[str, ex.Expression] | None = None
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, onnx_ir.ExternalTensor):
                continue
            if tensor.location == PLAN_NAME:
                plan = plan if plan is not None else read_plan(path.parent / PLAN_NAME)
                value.const_value = LazyWeight(_planned(plan, value, path), value.name)
            else:
                value.const_value = LazyWeight(_external(path, value, tensor), value.name)
    return model


def _planned(plan: Mapping[str, ex.Expression], value: onnx_ir.Value, path: Path) -> ex.Expression:
    expression = plan.get(value.name or "")
    if expression is None:
        raise ModelError(f"{path.parent / PLAN_NAME}: has no weight {value.name!r}, which {path.name} needs")
    if value.shape is not None and tuple(value.shape.numpy()) != expression.shape:
        raise ModelError(
            f"{path.parent / PLAN_NAME}: weight {value.name!r} has shape {list(expression.shape)}, "
            f"{path.name} expects {list(value.shape.numpy())}"
        )
    return expression


def _external(path: Path, value: onnx_ir.Value, tensor: onnx_ir.ExternalTensor) -> ex.Source:
    location = Path(tensor.location)
    where = f"{path}: weight {value.name!r}"
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(f"{where}: data at {location}, outside of the model's folder; refused")
    file = path.parent
    for part in location.parts:
        file = file / part
        if file.is_symlink():
            raise ModelError(f"{where}: data at {location}, behind the link {file}; refused. Copy the file instead.")
    shape = tuple(tensor.shape.numpy())
    source = external_source(file, value.name or "", tensor.dtype, shape, tensor.offset or 0)
    if tensor.length is not None and tensor.length != source.nbytes:
        raise ModelError(f"{where}: {tensor.length} bytes of data, shape {list(shape)} needs {source.nbytes}")
    return source


def file_weights(model: onnx_ir.Model) -> dict[str, ex.Expression]:
    """What goes to the weight file, by name: every lazy weight and every constant above `SMALL_BYTES`."""
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {name!r} has no data")
        if isinstance(tensor, LazyWeight) or tensor.nbytes > SMALL_BYTES:
            expression = expression_of(value)
            assert expression is not None
            weights[name] = expression
    return weights


@contextlib.contextmanager
def _referring(model: onnx_ir.Model, location: str, offsets: Mapping[str, int]) -> Iterator[None]:
    """For the time of a serialisation, weights are references into the file `location`."""
    saved = {}
    try:
        for name, offset in offsets.items():
            value = model.graph.initializers[name]
            tensor = saved[name] = value.const_value
            assert tensor is not None
            value.const_value = onnx_ir.ExternalTensor(
                location, offset, tensor.nbytes, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name
            )
        yield
    finally:
        for name, tensor in saved.items():
            model.graph.initializers[name].const_value = tensor


def model_bytes(model: onnx_ir.Model, weights: Mapping[str, ex.Expression]) -> bytes:
    """model.onnx as it lies beside weights.safetensors."""
    with _referring(model, WEIGHTS_NAME, plan_layout(weights).offsets):
        return bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))


def save_materialized(
    model: onnx_ir.Model,
    directory: Path,
    evaluator: Evaluator,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write model.onnx and weights.safetensors into an existing folder; returns the digest of each weight."""
    weights = file_weights(model)
    (directory / MODEL_NAME).write_bytes(model_bytes(model, weights))
    return write_safetensors(directory / WEIGHTS_NAME, weights, evaluator, progress)


def save_reference(model: onnx_ir.Model, directory: Path) -> None:
    """Write model.onnx and weights.plan.json into an existing folder; no weight is copied."""
    weights = file_weights(model)
    with _referring(model, PLAN_NAME, dict.fromkeys(weights, 0)):
        data = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    (directory / MODEL_NAME).write_bytes(data)
    write_plan(directory / PLAN_NAME, weights)
