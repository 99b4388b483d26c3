"""Bind the initializers of a traced graph to the tensors of the checkpoint, and leave none over on either side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir

from passopt.frontends.baichuan2 import COMPUTED_SUFFIXES
from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.errors import ModelError
from passopt.ir.expressions import FLOATS, DataType, Source
from passopt.ir.weights import LazyWeight


def check_tensors(checkpoint: Checkpoint, model: Any) -> None:
    """Before the slow tracing: do names, shapes and kinds of the tensors fit the model's parameters?"""
    where = checkpoint.directory
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if missing := expected.keys() - checkpoint.tensors.keys():
        raise ModelError(f"{where}: weights are missing that {type(model).__name__} has: {_listed(missing)}")
    if unknown := _needed(checkpoint) - expected.keys():
        raise ModelError(f"{where}: weights that {type(model).__name__} does not have: {_listed(unknown)}")
    for name, shape in expected.items():
        source = checkpoint.tensors[name]
        if source.shape != shape:
            raise ModelError(
                f"{where}: weight {name!r} has shape {list(source.shape)}, by config.json it is {list(shape)}"
            )
        if source.dtype not in FLOATS:
            raise ModelError(
                f"{where}: weight {name!r} is {source.dtype.name}; export starts from floating point weights, "
                f"quantise with a pass afterwards"
            )


def bind_weights(
    model: onnx_ir.Model, checkpoint: Checkpoint, dtype: DataType, extra: Mapping[str, Source] | None = None
) -> None:
    """Give every initializer its lazy weight, cast to `dtype`; tensors of `extra` keep theirs.

    Raises ModelError for initializers without data, and for weights that tracing lost.
    """
    extra = extra or {}
    unbound: list[str] = []
    bound: set[str] = set()
    for name, value in model.graph.initializers.items():
        if name in checkpoint.tensors:
            value.const_value = LazyWeight(checkpoint.tensors[name].cast(dtype), name)
            bound.add(name)
        elif name in extra:
            value.const_value = LazyWeight(extra[name], name)
        elif value.const_value is None or _is_fake(value.const_value):
            unbound.append(name)
        else:
            # A copy in memory of our own, so that the model does not keep torch's storages alive.
            value.const_value = onnx_ir.Tensor(value.const_value.numpy().copy(), name=name)
    if unbound:
        raise ModelError(f"{checkpoint.directory}: no tensor of the checkpoint for the weights {_listed(unbound)}")
    if lost := _needed(checkpoint) - bound:
        raise ModelError(f"{checkpoint.directory}: weights that the traced graph does not use: {_listed(lost)}")


def _needed(checkpoint: Checkpoint) -> set[str]:
    return {name for name in checkpoint.tensors if not name.endswith(COMPUTED_SUFFIXES)}


def _is_fake(tensor: onnx_ir.TensorProtocol) -> bool:
    """Traced without data: such a tensor would be written as garbage."""
    return type(getattr(tensor, "raw", None)).__name__ == "FakeTensor"


def _listed(names: Iterable[str], shown: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
