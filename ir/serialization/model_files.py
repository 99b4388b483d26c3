"""Load and save models: model.onnx with its weights beside it, or with a plan that says where they come from.

Data outside of the model's folder is read only through a plan, never through `..`, absolute paths or links.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from passopt.ir.errors import ModelError
from passopt.ir.graph.completion import complete_outputs
from passopt.ir.serialization.domains import normalize_domains
from passopt.ir.serialization.external_tensors import ExternalTensors
from passopt.ir.serialization.proto_check import check_proto
from passopt.ir.serialization.sparse_tensors import make_dense
from passopt.ir.serialization.text_files import TEXT_SUFFIX, load_text_model
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import SMALL_BYTES, expression_of, is_large
from passopt.ir.weights.plan_file import PLAN_NAME, write_plan
from passopt.ir.weights.safetensors_layout import layout_of
from passopt.ir.weights.streaming.write_weights import write_safetensors

MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "weights.safetensors"

#: The ONNX IR versions that are written: 10 has all that passopt needs, 13 is the newest that current runtimes read.
_OLDEST_IR, _NEWEST_IR = 10, 13


def model_path(path: Path) -> Path:
    """Return the model file for `path`, which is a file or an output folder.

    Raises:
        ModelError: If there is no such model, or if the folder holds one model per rank; the message says what to do.
    """
    if path.is_dir():
        inside = path / MODEL_NAME
        if not inside.exists() and (path / "rank0" / MODEL_NAME).exists():
            raise ModelError(f"{path}: holds one model per rank; name one of them, e.g. {path / 'rank0'}")
        path = inside
    if not path.exists():
        raise ModelError(f"{path}: no such model. Make one with: passopt export CHECKPOINT -o DIR")
    if not path.is_file():
        raise ModelError(f"{path}: no model, but a folder, a pipe or a device. Name a model file, or its folder.")
    return path


def load_model(path: Path | str) -> onnx_ir.Model:
    """Read a model; every external tensor becomes a lazy weight, so no byte of the weights is read.

    Args:
        path: A model.onnx, a folder that contains one, or a file `*.onnxtxt` with ONNX text.

    Returns:
        The model, with the types of its graph outputs completed.

    Raises:
        ModelError: If there is no such model, it cannot be read, or its weights do not fit it.

    Example:
        ::

            model = load_model("exported/model.onnx")
            print(print_model(model))
    """
    path = model_path(Path(path))
    if path.suffix == TEXT_SUFFIX:
        return load_text_model(path)
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        check_proto(proto)
        make_dense(proto)
        model = onnx_ir.from_proto(proto)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (DecodeError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not an ONNX model, or truncated: {_first_cause(error)}") from error
    if not len(model.graph) and not model.graph.outputs:
        raise ModelError(f"{path}: not an ONNX model: the graph has neither nodes nor outputs")
    if not model.graph.opset_imports:
        raise ModelError(f"{path}: not an ONNX model, or truncated: it names no opset")
    try:
        normalize_domains(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    ExternalTensors(model, path).replace()
    for value in model.graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            value.shape = onnx_ir.Shape(value.const_value.shape.numpy())  # A declared symbol would say less.
    complete_outputs(model)
    return model


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that the others of a chain were raised for, which says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def file_weights(model: onnx_ir.Model) -> dict[str, ex.Expression]:
    """Return the weights that go to the weight file, by name: checkpoint weights and constants above `SMALL_BYTES`."""
    return {name: weight for name, weight in _lazy_weights(model).items() if not _is_inline(weight)}


def _lazy_weights(model: onnx_ir.Model) -> dict[str, ex.Expression]:
    """Return every initializer that is unevaluated or too large to stay inside model.onnx, by name."""
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"initializer {name!r} has no data")
        if is_large(tensor):
            expression = expression_of(value)
            assert expression is not None
            weights[name] = expression
    return weights


def _is_inline(weight: ex.Expression) -> bool:
    """Return whether a weight is small and made of literals only, such as a rank's ALiBi slopes.

    Other tools expect such constants inside model.onnx.
    """
    return weight.nbytes <= SMALL_BYTES and next(weight.sources(), None) is None


@contextlib.contextmanager
def _standing_in(model: onnx_ir.Model, tensors: Mapping[str, onnx_ir.TensorProtocol]) -> Iterator[None]:
    """Let `tensors` replace the initializers of the same names within the block, for a serialisation."""
    initializers = model.graph.initializers
    saved = {name: initializers[name].const_value for name in tensors}
    try:
        for name, tensor in tensors.items():
            initializers[name].const_value = tensor
        yield
    finally:
        for name, original in saved.items():
            initializers[name].const_value = original


def _reference(location: str, name: str, weight: ex.Expression, offset: int) -> onnx_ir.ExternalTensor:
    shape = onnx_ir.Shape(weight.shape)
    return onnx_ir.ExternalTensor(location, offset, weight.nbytes, weight.dtype, shape=shape, name=name)


def _serialized(model: onnx_ir.Model) -> bytes:
    proto = onnx_ir.to_proto(model)
    proto.ir_version = _ir_version(model)
    return bytes(proto.SerializeToString(deterministic=True))


def _ir_version(model: onnx_ir.Model) -> int:
    """Return the lowest IR version that the opsets allow, because runtimes refuse versions newer than theirs."""
    imports = [model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())]
    opsets = [onnx.helper.make_opsetid("", versions[""]) for versions in imports if "" in versions]
    needed = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return int(min(_NEWEST_IR, max(_OLDEST_IR, needed)))


def model_bytes(model: onnx_ir.Model, weights: Mapping[str, ex.Expression], rank: int = 0) -> bytes:
    """Return the bytes of the model.onnx of a rank that refers to weights.safetensors beside it.

    The number of bytes is the same for every rank.
    """
    tensors: dict[str, onnx_ir.TensorProtocol] = {}
    for name, offset in layout_of(weights).offsets.items():
        tensors[name] = _reference(WEIGHTS_NAME, name, weights[name], offset)
    with Evaluator(rank) as evaluator:
        for name, weight in _lazy_weights(model).items():
            if name not in tensors:
                tensors[name] = onnx_ir.Tensor(evaluator.array(weight), dtype=weight.dtype, name=name)
    with _standing_in(model, tensors):
        return _serialized(model)


def save_materialized(model: onnx_ir.Model, directory: Path, rank: int = 0) -> dict[str, str]:
    """Write model.onnx and weights.safetensors of a rank into an existing folder, and return each weight's digest."""
    weights = file_weights(model)
    (directory / MODEL_NAME).write_bytes(model_bytes(model, weights, rank))
    return write_safetensors(directory / WEIGHTS_NAME, weights, rank)


def save_reference(model: onnx_ir.Model, directory: Path) -> None:
    """Write model.onnx and weights.plan.json into an existing folder; no weight is copied."""
    weights = _lazy_weights(model)
    with _standing_in(model, {name: _reference(PLAN_NAME, name, weight, 0) for name, weight in weights.items()}):
        data = _serialized(model)
    (directory / MODEL_NAME).write_bytes(data)
    write_plan(directory / PLAN_NAME, weights)
