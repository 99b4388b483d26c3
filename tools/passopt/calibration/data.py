"""Turn calibration sets into windows of token ids, with the tokenizer and the chat format of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.frontends.calibration.documents import parse_source
from passopt.frontends.calibration.windows import choose_windows
from passopt.generation.documents import DocumentEncoder, begin_ids
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import INPUT_IDS, positions_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The tokens of a window where a model takes so many.
DEFAULT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Data:
    """What a model is calibrated on.

    Attributes:
        ids: The token ids [windows, length].
        identity: What the manifest says of it.
    """

    ids: Array
    identity: dict[str, Any]


def read_data(
    sets: Sequence[str], tokenizer: Path, model: onnx_ir.Model, *, count: int, length: int | None, seed: int
) -> Data:
    """Return windows of token ids of calibration sets.

    Args:
        sets: The sets, such as `c4:c4-train.00000-of-01024.json.gz*2`.
        tokenizer: The folder of the tokenizer, or its file.
        model: The model, which says how many positions and tokens there are.
        count: The number of windows.
        length: The tokens of a window; None for 512, or what the model takes if that is less.
        seed: Decides which windows are chosen.

    Raises:
        UsageError: If a set, a weight or a length is wrong.
        ModelError: If a file is damaged or holds too little, or the tokenizer does not fit the model.
    """
    most = positions_of(model)
    if length is not None and most is not None and length > most:
        raise UsageError(f"`seqlen={length}`: this model takes at most {most} positions")
    length = length if length is not None else min(DEFAULT_LENGTH, most or DEFAULT_LENGTH)
    sources = [parse_source(text) for text in sets]
    words = load_tokenizer(tokenizer)
    encode = DocumentEncoder(words, tokenizer if tokenizer.is_dir() else tokenizer.parent)
    chosen = choose_windows(sources, encode, count=count, length=length, seed=seed, begin=begin_ids(words))
    _check_tokens(chosen.ids, model, tokenizer)
    shares = zip(sources, chosen.counts, strict=True)
    listed = [
        {"format": item.format, "file": item.path.name, "weight": item.weight, "windows": share}
        for item, share in shares
    ]
    identity = {"digest": chosen.digest, "nsamples": count, "seqlen": length, "seed": seed, "sets": listed}
    return Data(chosen.ids, identity)


def _check_tokens(ids: Array, model: onnx_ir.Model, tokenizer: Path) -> None:
    """Raise ModelError if the embedding of the model has no row for some token."""
    rows = _vocabulary(model)
    if rows is not None and int(ids.max()) >= rows:
        raise ModelError(
            f"{tokenizer}: gives the token {int(ids.max())}, and the embedding of the model has {rows} rows: it is the "
            f"tokenizer of another model. Name the right one (`tokenizer`)"
        )


def _vocabulary(model: onnx_ir.Model) -> int | None:
    tokens = next((value for value in model.graph.inputs if value.name == INPUT_IDS), None)
    for node, index in tokens.uses() if tokens is not None else ():
        table = node.inputs[0]
        if node.op_type == "Gather" and index == 1 and table is not None and table.shape is not None:
            rows = table.shape[0]
            return rows if isinstance(rows, int) else None
    return None
