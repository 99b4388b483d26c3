"""Check one pass on a small graph: idempotence, structure, ONNX checker, and the numbers before and after.

Only a text that passes all of these checks may become a golden text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir

from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.verifier import verify_model
from passopt.ir.relative_error import operator_error
from passopt.ir.serialization.model_files import MODEL_NAME, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.passes.framework.accuracy import EXACT, Accuracy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The lengths of symbolic dimensions, in order of appearance; unequal, so that a mixed-up axis shows.
_LENGTHS = (2, 3, 5, 7, 11)


def check(
    item: Pass,
    model: str | onnx_ir.Model,
    *,
    tolerance: float | None = None,
    feeds: Mapping[str, Array] | None = None,
    matches: int | None = None,
    lengths: Mapping[str, int] | None = None,
) -> tuple[onnx_ir.Model, PassResult]:
    """Run a pass over a small graph, and check all that holds for every pass.

    It checks that `modified` says whether the text changed, that a second run changes nothing, that the structure and
    ONNX's own checker accept the result, and that onnxruntime computes the same numbers before and after.

    Args:
        item: The pass with its options, such as ``FuseSilu()``.
        model: ONNX text, or a model, which is not changed. In text, ``float[6,4] w = random`` is a weight with seeded
            values; matrices become lazy weights, like those of a checkpoint.
        tolerance: The largest relative error of outputs; None for what the pass's declared accuracy allows.
        feeds: Inputs by name, in place of random ones.
        matches: How often the pass must match; None for any number.
        lengths: Lengths of symbolic dimensions, such as ``{"batch": 2}``; others get unequal small ones.

    Returns:
        The changed model, and the result of the first run.

    Raises:
        AssertionError: If anything of this does not hold.

    Example:
        ``model, result = check(FuseSilu(), TEXT, matches=1)``
    """
    original = read_model(model) if isinstance(model, str) else model
    changed = original.clone()
    before = print_model(changed)
    result = item.run(changed)
    after = print_model(changed)
    verify_model(changed)
    assert result.modified == (before != after), f"{item.name}: modified is {result.modified}, the text says otherwise"
    if matches is not None:
        assert result.matches == matches, f"{item.name}: matched {result.matches} times, declined {result.declines}"
    again = item.run(changed)
    assert not again.modified, f"{item.name}: a second run changed the graph:\n{print_model(changed)}"
    assert print_model(changed) == after, f"{item.name}: a second run changed the text without saying so"
    check_onnx(changed)
    if result.modified:
        compare_numbers(original, changed, tolerance, feeds or {}, lengths or {}, item.accuracy)
    return changed, result


def check_onnx(model: onnx_ir.Model) -> None:
    """Run ONNX's own checker on the model as it would be written for rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        save_materialized(model, Path(folder))
        onnx.checker.check_model(str(Path(folder) / MODEL_NAME), full_check=False)


def compare_numbers(
    original: onnx_ir.Model,
    changed: onnx_ir.Model,
    tolerance: float | None,
    feeds: Mapping[str, Array],
    lengths: Mapping[str, int],
    accuracy: Accuracy = EXACT,
) -> None:
    """Run both models in onnxruntime on seeded inputs, and compare their outputs.

    The ranks of a sharded model are joined.

    Args:
        original: The model before the pass.
        changed: The model after it.
        tolerance: The largest relative error; None for what `accuracy` allows.
        feeds: Inputs by name that replace the random ones.
        lengths: The lengths of symbolic dimensions by name.
        accuracy: The accuracy that the pass declares.

    Raises:
        AssertionError: If names or shapes of outputs differ, or if an error is too large.
    """
    from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
    from passopt.targets.onnxruntime.session import Session

    if degree_of(changed) > 1:
        changed = join_ranks(rank_models(changed))
    inputs = {**random_feeds(original, lengths), **feeds}
    expected, found = Session(original).run(inputs), Session(changed).run(inputs)
    assert list(expected) == list(found), f"graph outputs changed: {list(expected)} → {list(found)}"
    for name, reference in expected.items():
        got = found[name]
        assert got.shape == reference.shape, f"{name}: shape {reference.shape} became {got.shape}"
        error = operator_error(reference, got)
        allowed = tolerance if tolerance is not None else _allowed(accuracy, reference)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.0e}"


def _allowed(accuracy: Accuracy, reference: Array) -> float:
    return accuracy.budget_of(onnx_ir.DataType.from_numpy(reference.dtype))


def random_feeds(model: onnx_ir.Model, lengths: Mapping[str, int]) -> dict[str, Array]:
    """Return seeded inputs: normal floats, small non-negative integers, and random booleans.

    Symbolic dimensions that `lengths` does not name get unequal lengths.
    """
    rng = np.random.default_rng(0)
    known = dict(lengths)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None, f"input {value.name} has no shape"
        assert value.dtype is not None
        shape = [_length(dim, known) for dim in value.shape.dims]
        kind = value.dtype.numpy()
        if kind == np.bool_:
            feeds[value.name or ""] = rng.integers(0, 2, shape).astype(bool)
        elif np.issubdtype(kind, np.integer):
            feeds[value.name or ""] = rng.integers(0, 3, shape).astype(kind)
        else:
            feeds[value.name or ""] = rng.standard_normal(shape).astype(kind)
    return feeds


def _length(dim: int | onnx_ir.SymbolicDim, known: dict[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    name = dim.value or "?"
    if name not in known and "+" in name:
        known[name] = sum(_length(onnx_ir.SymbolicDim(part.strip()), known) for part in name.split("+"))
    return known.setdefault(name, _LENGTHS[len(known) % len(_LENGTHS)])
