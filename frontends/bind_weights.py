"""Bind the initializers of a traced graph to the tensors of the checkpoint, and check that none is left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir

from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.evaluator import Evaluator, weight_digest
from passopt.ir.weights.expressions import DataType, Expression, Source
from passopt.ir.weights.lazy_weight import LazyWeight


def check_tensors(checkpoint: Checkpoint, model: Any) -> None:
    """Check that the checkpoint's tensors fit the model's parameters, before the slow tracing starts.

    Raises:
        ModelError: If tensors are missing or unknown, or if a shape or dtype does not fit.
    """
    where = checkpoint.directory
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if missing := expected.keys() - checkpoint.tensors.keys():
        raise ModelError(
            f"{where}: weights are missing that {type(model).__name__} has: {_listed(missing)}. Look whether all "
            f"weight files of the checkpoint are there; if the head is the embedding, config.json must say "
            f"tie_word_embeddings = true."
        )
    if unknown := checkpoint.tensors.keys() - expected.keys():
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


def without_zero_biases(tensors: Mapping[str, Expression], model: Any) -> dict[str, Expression]:
    """Return the tensors without biases of zeros that GPTQ tools give to quantised linears which have no bias.

    Args:
        tensors: The tensors of the checkpoint by name of the model's parameters.
        model: The model.
    """
    expected = {name for name, _ in model.named_parameters()}
    kept = dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".bias")
        is_extra = name != module and name not in expected
        if is_extra and isinstance(tensors.get(f"{module}.weight"), Dequantized) and _is_zero(tensor):
            del kept[name]
    return kept


def _is_zero(tensor: Expression) -> bool:
    with Evaluator() as evaluator:
        return not any(chunk.any() for chunk in evaluator.chunks(tensor))


def untied(tensors: Mapping[str, Expression], ties: Mapping[str, str], directory: Path) -> dict[str, Expression]:
    """Return the tensors without those that repeat a parameter under another name.

    Args:
        tensors: The tensors of the checkpoint by name.
        ties: Maps each such other name to the parameter's own name.
        directory: The checkpoint's directory, for error messages.

    Raises:
        ModelError: If a repeated tensor holds other values, so that the configuration is wrong to tie them.
    """
    kept = {name: source for name, source in tensors.items() if name not in ties}
    for name in tensors.keys() & ties.keys():
        own = ties[name]
        if kept.setdefault(own, tensors[name]) is not tensors[name] and not _equal(kept[own], tensors[name]):
            raise ModelError(
                f"{directory}: weights {name!r} and {own!r} differ, though config.json ties them; "
                f"set tie_word_embeddings to false"
            )
    return kept


def _equal(one: Expression, other: Expression) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return weight_digest(one) == weight_digest(other)


def merge_tied(graph: onnx_ir.Graph, ties: Mapping[str, str]) -> None:
    """Merge initializers of the same parameter, since torch may trace a tied parameter under each of its names."""
    for name in ties.keys() & graph.initializers.keys():
        repeated, own = graph.initializers[name], graph.initializers.get(ties[name])
        if own is None:
            repeated.name = ties[name]
            continue
        repeated.replace_all_uses_with(own)
        del graph.initializers[name]


def bind_weights(
    model: onnx_ir.Model, checkpoint: Checkpoint, dtype: DataType, extra: Mapping[str, Source] | None = None
) -> None:
    """Give every initializer its lazy weight, cast to `dtype`; tensors in `extra` keep their dtype.

    Args:
        model: The traced model, whose initializers are changed in place.
        checkpoint: The checkpoint whose tensors have the names of the initializers.
        dtype: The dtype of the graph's weights.
        extra: More tensors by initializer name, such as a baked ALiBi mask.

    Raises:
        ModelError: If an initializer has no data, or if the graph does not use a tensor of the checkpoint.
    """
    extra = extra or {}
    unbound: list[str] = []
    bound: set[str] = set()
    for name, value in model.graph.initializers.items():
        if name in checkpoint.tensors:
            weight = checkpoint.tensors[name]
            computed = weight.computed_in(dtype) if isinstance(weight, Dequantized) else weight.cast(dtype)
            value.const_value = LazyWeight(computed, name)
            bound.add(name)
        elif name in extra:
            value.const_value = LazyWeight(extra[name], name)
        elif value.const_value is None or _is_fake(value.const_value):
            unbound.append(name)
        else:
            # Copy, so that the model does not keep the memory of torch's tensors alive.
            value.const_value = onnx_ir.Tensor(value.const_value.numpy().copy(), name=name)
    if unbound:
        raise ModelError(f"{checkpoint.directory}: no tensor of the checkpoint for the weights {_listed(unbound)}")
    if lost := checkpoint.tensors.keys() - bound:
        raise ModelError(f"{checkpoint.directory}: weights that the traced graph does not use: {_listed(lost)}")


def _is_fake(tensor: onnx_ir.TensorProtocol) -> bool:
    """Return whether the tensor was traced without data, so that it would be written as garbage."""
    return type(getattr(tensor, "raw", None)).__name__ == "FakeTensor"


def _listed(names: Iterable[str], shown: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
