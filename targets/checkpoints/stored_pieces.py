"""Collect the codes of a checkpoint's weights from where they were made: a calibration folder, or a graph.

Both may know a weight in pieces, such as a packed projection of q, k and v that a pass has split.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.calibration.calibration import Calibration
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.concat import concat
from passopt.ir.weights.dequantized import Dequantized, dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.lazy_weight import expression_of

_KEY = re.compile(r"(?P<name>[^():]+):\w+\[\d+, \d+\]")
_SLICE = re.compile(rf"slice\({_KEY.pattern}, axis=0, (?P<start>\d+):(?P<stop>\d+)\)")
_CODES, _SCALES, _PARTS = ".codes", ".scales", ("q", "k", "v")
#: How far codes may be from the weight that they stand for, as a part of its norm. Rounding to 8 bits makes 0.01, to 4
#: bits in groups 0.12.
_LARGEST_ERROR, _LARGEST_OF_GROUPS = 0.1, 0.4
#: The rows of a weight that are compared with their codes.
_COMPARED = 8


@dataclasses.dataclass(frozen=True)
class Piece:
    """The codes of some rows of a weight, from `start` on."""

    start: int
    weight: Dequantized


def pieces_of_calibration(calibration: Calibration) -> dict[str, list[Piece]]:
    """Return the codes of a calibration folder by the name of the tensor of which each of them is a part.

    Args:
        calibration: The folder.

    Raises:
        UsageError: If codes are of several kinds, or of something else than rows of a weight: of a smoothed one, say.
    """
    found: dict[str, list[Piece]] = {}
    kinds = {(item.bits, item.group) for entry in calibration.weights.values() for item in entry.codes}
    if len(kinds) > 1:
        raise UsageError(f"{calibration.folder}: holds codes of several kinds (bits, group): {sorted(kinds)}")
    bits, group = next(iter(kinds), (8, 0))
    for key in calibration.weights:
        stored = calibration.codes(key, bits=bits, group=group)
        if stored is None:
            continue
        whole = _KEY.fullmatch(key)
        match = whole or _SLICE.fullmatch(key)
        if match is None or stored.entry.along != 0:
            raise UsageError(
                f"{calibration.folder}: holds codes of {key}, which is no weight [out, in] of a checkpoint, nor rows "
                f"of one. Calibrate the exported model without passes that change weights"
            )
        start = 0 if whole else int(match["start"])
        weight = dequantized(stored.codes, stored.scales)
        found.setdefault(match["name"], []).append(Piece(start, weight))
    return found


def pieces_of_graph(model: onnx_ir.Model) -> dict[str, list[Piece]]:
    """Return the codes of a quantised graph by the name of the weight of which each of them is a part.

    Args:
        model: A graph that the pass int8 or int4 has quantised.
    """
    found: dict[str, list[Piece]] = {}
    values = model.graph.initializers
    for name, value in values.items():
        scales = values.get(f"{name.removesuffix(_CODES)}{_SCALES}")
        if not name.endswith(_CODES) or scales is None or value.dtype not in (DataType.INT8, DataType.INT4):
            continue
        both = expression_of(value), expression_of(scales)
        if both[0] is None or both[1] is None or both[1].shape[:1] != both[0].shape[:1]:
            continue
        weight = dequantized(both[0].cast(DataType.INT8), both[1])
        found.setdefault(name.removesuffix(_CODES), []).append(Piece(0, weight))
    return dict(_with_parts(found))


def _with_parts(found: Mapping[str, list[Piece]]) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the codes by weight, those of W.q, W.k and W.v as the rows of W."""
    for name, pieces in found.items():
        stem, _, part = name.rpartition(".")
        family = [found.get(f"{stem}.{each}") for each in _PARTS]
        if part not in _PARTS or not all(family):
            yield name, pieces
        elif part == _PARTS[0]:
            weights = [each[0].weight for each in family if each]
            starts = itertools.accumulate((weight.shape[0] for weight in weights), initial=0)
            yield stem, [Piece(start, weight) for start, weight in zip(starts, weights, strict=False)]


def joined(name: str, pieces: Iterable[Piece], weight: Expression, where: Path) -> Dequantized:
    """Return the codes of a whole weight.

    Args:
        name: The name of the weight.
        pieces: The codes of its rows.
        weight: The weight in the checkpoint.
        where: Where the codes come from, for messages.

    Raises:
        UsageError: If there are not codes of all rows, or if they stand for other numbers.
    """
    ordered = sorted(pieces, key=lambda piece: piece.start)
    bounds = [0, *itertools.accumulate(piece.weight.shape[0] for piece in ordered)]
    shape = (bounds[-1], *ordered[0].weight.shape[1:])
    if [piece.start for piece in ordered] != bounds[:-1] or shape != weight.shape:
        rows = ", ".join(f"{piece.start}+{piece.weight.shape[0]}" for piece in ordered)
        raise UsageError(f"{where}: has codes {list(shape)} of {name} (rows {rows}), which is {list(weight.shape)}")
    codes = concat([piece.weight.codes for piece in ordered], 0)
    found = dequantized(codes, concat([piece.weight.scales for piece in ordered], 0))
    if not (error := _error(found, weight)) <= (_LARGEST_OF_GROUPS if found.group else _LARGEST_ERROR):
        raise UsageError(
            f"{where}: the codes of {name} are {error:.1%} off the weight in the checkpoint. They are of another "
            f"model, or of weights that were smoothed or rotated; take those that were made without such passes"
        )
    return found


def _error(codes: Dequantized, weight: Expression) -> float:
    """Return the distance of some rows from their codes, as a part of their norm."""
    rows = sorted({weight.shape[0] * index // _COMPARED for index in range(_COMPARED)})
    difference = norm = 0.0
    with Evaluator() as evaluator:
        for row in rows:
            box = ((row, row + 1), (0, weight.shape[1]))
            expected = evaluator.read(weight, box).astype(np.float64)
            difference += float(np.square(evaluator.read(codes, box).astype(np.float64) - expected).sum())
            norm += float(np.square(expected).sum())
    if not np.isfinite(difference) or not np.isfinite(norm):
        raise ModelError(f"NaN or infinity among {codes.text()} or {weight.text()}; the checkpoint is damaged")
    return float(np.sqrt(difference / norm)) if norm else float(np.sqrt(difference))
