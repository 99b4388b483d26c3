"""Join all ranks of a tensor-parallel model into one graph that stock onnxruntime can run.

`verify` compares this graph with the unsplit model. AllReduce becomes a Sum and AllGather a Concat over the ranks. What
every rank computes alike is computed once and keeps its name; the names of the rest get the prefix `rank{r}/`. Inputs
and outputs are those of the unsplit model, so the KV cache holds the heads of all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.collectives import check_schedules, schedule_of
from passopt.ir.graph.decoder import KV_HEADS, LOGITS, degree_of
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.model_files import MODEL_NAME, load_model
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import Concat, concat
from passopt.ir.weights.evaluator import weight_digest
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.targets.folders.manifest import MANIFEST_NAME, rank_folders, read_manifest, refuse_single_rank
from passopt.targets.onnxruntime.graph_joiner import Joiner


def load_any(path: Path | str, *, heads: int | None = None) -> onnx_ir.Model:
    """Load a model so that it runs as a single graph, joining the ranks of a tensor-parallel model.

    Args:
        path: A model file, a folder with one model, or a folder of ranks.
        heads: The number of key-value heads without those that padding added; by default what the model's metadata
            says.

    Raises:
        ModelError: If the model cannot be read or its ranks do not fit together. For ranks of different outputs, the
            message names the first collective that differs.
    """
    path = Path(path)
    if path.is_dir() and not (path / MODEL_NAME).exists() and (path / MANIFEST_NAME).exists():
        return _joined_folders(path, heads)
    model = load_model(path)
    if degree_of(model) == 1:
        return model
    refuse_single_rank(model)
    return join_ranks(rank_models(model), heads=heads)


def _joined_folders(path: Path, heads: int | None) -> onnx_ir.Model:
    manifest = read_manifest(path)
    ranks = [load_model(path / folder) for folder in rank_folders(manifest.degree)]
    schedules = [(f"rank{rank}", schedule_of(model)) for rank, model in enumerate(ranks)]
    check_schedules([(MANIFEST_NAME, manifest.collectives), *schedules])
    return join_ranks(ranks, heads=heads, replicated=_truly_replicated(ranks, manifest.replicated))


def _truly_replicated(ranks: Sequence[onnx_ir.Model], names: Collection[str]) -> set[str]:
    """Return those of `names` whose bytes are the same on every rank.

    The bytes are read and compared. If the manifest were believed instead, rank 0's copy would stand for all, and a
    wrong copy on another rank would go unnoticed.
    """
    same = set()
    for name in names:
        values = [model.graph.initializers.get(name) for model in ranks]
        weights = [None if value is None else expression_of(value) for value in values]
        if len({None if weight is None else weight_digest(weight) for weight in weights}) == 1:
            same.add(name)
    return same


def rank_models(model: onnx_ir.Model) -> list[onnx_ir.Model]:
    """Return one model per rank of an SPMD graph, in which shards are slices of the full weights.

    No weight is read.
    """
    models = []
    for rank in range(degree_of(model)):
        clone = model.clone()
        for name, value in clone.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, LazyWeight) and tensor.expression.depends_on_rank:
                value.const_value = LazyWeight(at_rank(tensor.expression, rank), name)
        models.append(clone)
    return models


def at_rank(expression: ex.Expression, rank: int) -> ex.Expression:
    """Return what a weight expression means on one rank: every `Shard` in it becomes a slice of the full weight."""
    if not expression.depends_on_rank:
        return expression
    if isinstance(expression, Concat):
        parts = tuple(at_rank(part, rank) for part in expression.parts)
        return dataclasses.replace(expression, parts=parts)
    assert isinstance(expression, ex._Unary), f"no operand to look for shards in: {expression.text()}"
    operand = at_rank(expression.operand, rank)
    if not isinstance(expression, ex.Shard):
        return expression.with_operand(operand)
    local = expression.shape[expression.along] // expression.segments
    starts = [(segment * expression.degree + rank) * local for segment in range(expression.segments)]
    pieces = [operand.slice(expression.along, start, start + local) for start in starts]
    return concat(pieces, expression.along)


def join_ranks(
    ranks: Sequence[onnx_ir.Model],
    *,
    heads: int | None = None,
    replicated: Collection[str] = (),
    rank_logits: bool = False,
) -> onnx_ir.Model:
    """Join all ranks into one model that has the inputs and outputs of the unsplit model.

    Past and present have the shape `[batch, heads, past, head_dim]` and hold the heads of all ranks one after another.

    Args:
        ranks: The model of each rank.
        heads: The number of key-value heads without padding. Where the ranks hold more, zeros are added to the past
            inside the graph, and cut off the present again. By default what the metadata of rank 0 says.
        replicated: The names of weights that are the same on every rank; one copy of them is kept. Other weights are
            kept once if their expressions are equal.
        rank_logits: If true, the logits of each rank are additional outputs `rank{r}/logits`, for
            `check_rank_logits`.

    Returns:
        The joined model, which has passed `verify_model`.

    Raises:
        ModelError: If the ranks' graphs do not fit together.
    """
    check_schedules((f"rank{rank}", schedule_of(model)) for rank, model in enumerate(ranks))
    joiner = Joiner(ranks, heads if heads is not None else _true_heads(ranks[0]), set(replicated))
    model = joiner.joined(rank_logits)
    verify_model(model)
    return model


def _true_heads(model: onnx_ir.Model) -> int | None:
    found = model.metadata_props.get(KV_HEADS)
    return int(found) if found is not None else None


def check_rank_logits(outputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> None:
    """Raise ModelError unless all `rank{r}/logits` of one run hold the same bits."""
    names = [name for name in outputs if name.startswith("rank") and name.endswith(f"/{LOGITS}")]
    for name in names[1:]:
        if not np.array_equal(outputs[names[0]], outputs[name]):
            raise ModelError(
                f"{name} differs from {names[0]}: a weight or constant that all ranks share does not agree"
            )
