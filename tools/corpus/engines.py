"""Run models in onnxruntime, without its own rewrites, or in ONNX's reference evaluator; compare what they compute."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import onnxruntime

from passopt.ir.relative_error import operator_error
from passopt.passes.framework.accuracy import Accuracy

Outputs = list[Any]


class Refused(Exception):
    """Say that an engine does not take a model.

    Attributes:
        lacks_kernel: Whether the model is legal for all that the engine says, but it has no code for an operator.
    """

    def __init__(self, message: str, *, lacks_kernel: bool = False) -> None:
        super().__init__(message)
        self.lacks_kernel = lacks_kernel


class Runtime:
    """A model in onnxruntime, on one thread."""

    name = "onnxruntime"

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            kind = type(error).__name__
            raise Refused(_line(error), lacks_kernel=kind == "NotImplemented") from error

    def run(self, feeds: Mapping[str, Any]) -> Outputs:
        """Return all outputs in their order; raise Refused if the model cannot be run on these inputs."""
        types = {value.name: value.type for value in self._session.get_inputs()}
        try:
            given = {name: _to_runtime(feeds[name], types[name]) for name in types if name in feeds}
            return list(self._session.run(None, given))
        except Exception as error:
            # onnxruntime hands out no numbers of dtypes that numpy does not know, such as bfloat16.
            texts = ("No corresponding Numpy type", "data type is not supported")
            lacks = type(error).__name__ == "NotImplemented" or any(text in str(error) for text in texts)
            raise Refused(_line(error), lacks_kernel=lacks) from error


def _to_runtime(value: Any, kind: str) -> Any:
    """Return a value as onnxruntime takes it: numbers of dtypes that numpy does not know need their ONNX type."""
    if not isinstance(value, np.ndarray) or (value.dtype.kind != "V" and value.dtype.isbuiltin == 1):
        return value
    dtype = onnx_ir.DataType.from_numpy(value.dtype).value
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, dtype)


_BF16 = onnx_ir.DataType.BFLOAT16.numpy()
#: Operators whose output has a dtype of its own.
_CASTS = frozenset({"Cast", "CastLike", "DequantizeLinear", "QuantizeLinear", "If", "Loop", "Scan"})


class Evaluator:
    """A model in ONNX's reference evaluator, whose operators compute bf16 in fp32 and round what comes out.

    numpy adds bf16 up in bf16, so that a sum of ones ends at 256, and MaxPool finds other places. No device does so.
    """

    name = "reference"

    def __init__(self, path: Path) -> None:
        try:
            self._evaluator = onnx.reference.ReferenceEvaluator(str(path))
        except Exception as error:  # the evaluator has no errors of its own
            raise Refused(_line(error), lacks_kernel=True) from error
        for node in _nodes(self._evaluator):
            if node.op_type not in _CASTS:
                node.run = _in_fp32(node.run)

    def run(self, feeds: Mapping[str, Any]) -> Outputs:
        """Return all outputs in their order; raise Refused if the model cannot be run on these inputs."""
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                names = set(self._evaluator.input_names)
                return list(self._evaluator.run(None, {name: feeds[name] for name in feeds if name in names}))
        except Exception as error:
            raise Refused(_line(error), lacks_kernel=isinstance(error, NotImplementedError)) from error


class RoundingEvaluator(Evaluator):
    """A model in ONNX's reference evaluator that rounds every number, in functions too, to those of another dtype."""

    def __init__(self, path: Path, dtype: Any) -> None:
        super().__init__(path)
        self._dtype = dtype
        for evaluator in _evaluators(self._evaluator):
            for name, value in evaluator.rt_inits_.items():
                evaluator.rt_inits_[name] = self._rounded(value)
        for node in _nodes(self._evaluator):
            node.run = self._rounding(node.run)

    def run(self, feeds: Mapping[str, Any]) -> Outputs:
        """Return all outputs in their order; raise Refused if the model cannot be run on these inputs."""
        return super().run({name: self._rounded(value) for name, value in feeds.items()})

    def _rounding(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs, **context: tuple(self._rounded(value) for value in run(*inputs, **context))

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return value
        with np.errstate(all="ignore"):
            return value.astype(self._dtype).astype(value.dtype)


def _evaluators(evaluator: Any) -> Iterator[Any]:
    """Yield the reference evaluator of a graph, and those of the functions that it calls."""
    yield evaluator
    for node in evaluator.rt_nodes_:
        if _is_call(node):
            yield from _evaluators(node.impl_)


def _is_call(node: Any) -> bool:
    """Return whether a node calls a function whose operators are known before it runs, as those of Gelu are not."""
    return hasattr(getattr(node, "impl_", None), "rt_nodes_")


def _nodes(evaluator: Any) -> Iterator[Any]:
    """Yield the operators of a reference evaluator and of the functions that it calls, but no call itself."""
    for found in _evaluators(evaluator):
        yield from (node for node in found.rt_nodes_ if not _is_call(node))


def _in_fp32(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call of an operator that takes bf16 and returns what it computes of the same numbers in fp32."""

    def computed(*inputs: Any, **context: Any) -> Any:
        if not any(isinstance(value, np.ndarray) and value.dtype == _BF16 for value in inputs):
            return run(*inputs, **context)
        outputs = run(*(_exchanged(value, _BF16, np.float32) for value in inputs), **context)
        return tuple(_exchanged(value, np.float32, _BF16) for value in outputs)

    return computed


def _exchanged(value: Any, old: Any, new: Any) -> Any:
    return value.astype(new) if isinstance(value, np.ndarray) and value.dtype == old else value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def difference(
    expected: Sequence[Any], found: Sequence[Any], accuracy: Accuracy, *, is_random: bool, moved: float = 0.0
) -> str:
    """Return how outputs differ beyond what a declared accuracy allows, or an empty text if they do not.

    `moved` is an error that is allowed in any case.
    """
    if len(expected) != len(found):
        return f"{len(expected)} outputs became {len(found)}"
    texts = (_differs(*pair, accuracy, is_random=is_random, moved=moved) for pair in zip(expected, found, strict=True))
    return next((f"output {index}: {text}" for index, text in enumerate(texts) if text), "")


def movement(session: Any, feeds: Mapping[str, Any], outputs: Sequence[Any]) -> float:
    """Return how far a model's outputs move where its inputs change by one rounding, as a relative error."""
    moved = 0.0
    for sign in (1, -1):
        near = {name: _rounded_by_one(value, sign) for name, value in feeds.items()}
        moved = max(moved, largest_error(outputs, session.run(near)))
    return moved


def largest_error(outputs: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the largest relative error of all outputs that are arrays of floats of equal shapes."""
    pairs = zip(outputs, others, strict=True)
    return max((operator_error(one, other) for one, other in pairs if _comparable(one, other)), default=0.0)


def _rounded_by_one(value: Any, sign: int) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    return (value * (1 + sign * np.finfo(value.dtype).eps)).astype(value.dtype)


def _comparable(one: Any, other: Any) -> bool:
    return all(isinstance(item, np.ndarray) and item.dtype.kind == "f" for item in (one, other)) and (
        one.shape == other.shape
    )


def _differs(one: Any, other: Any, accuracy: Accuracy, *, is_random: bool, moved: float) -> str:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return difference(one, other, accuracy, is_random=is_random, moved=moved)
    if one is None or other is None:
        return "" if one is other else f"{type(one).__name__} became {type(other).__name__}"
    first, second = np.asarray(one), np.asarray(other)
    if first.dtype.kind in "OUS" and second.dtype.kind in "OUS":
        equal = first.shape == second.shape and first.astype(str).tolist() == second.astype(str).tolist()
        return "" if equal else f"texts {first.tolist()!r:.60} became {second.tolist()!r:.60}"
    if first.dtype != second.dtype:
        return f"dtype {first.dtype} became {second.dtype}"
    if first.shape != second.shape:
        return f"shape {first.shape} became {second.shape}"
    if is_random:
        return ""
    error = operator_error(first, second)
    allowed = max(accuracy.budget_of(onnx_ir.DataType.from_numpy(first.dtype)), moved)
    return "" if error <= allowed and not math.isnan(error) else f"error {error:.1e}, allowed {allowed:.0e}"
