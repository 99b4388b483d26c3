"""Compare the codes of a quantised model with the weights that they stand for, channel by channel.

On an untrained or tiny model a wrong scale hardly moves the predictions; the weights show it, and where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.groups import FOUR_BITS
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.sources import external_source

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The largest root mean square error of a channel, in steps of absmax / 127, or absmax / 7 for codes of 4 bits.
#: Rounding to the nearest makes 0.3.
LARGEST = 1.0
#: The same for 4 bits, where GPTQ moves the weights of inputs that are hardly used by more than rounding does: in a
#: trained model of 135M parameters the worst channel of a weight is off by 0.4 in the median, and by 1.04 at most.
LARGEST_OF_FOUR_BITS = 1.5
#: Where half of the channels differ by more steps than this, the codes are those of another weight.
_OTHER = 16.0
#: The comparison of a quantised model with the original on the numbers of its codes.
ON_CODES = "against the original on the candidate's own codes"
#: What the names of codes, scales and zero points of a weight end with. Where activations are quantised in a graph of
#: 16 bits, its scales are widened.
CODES, SCALES, ZEROS, WIDENED = ".codes", ".scales", ".zeros", ".fp32"


@dataclasses.dataclass(frozen=True)
class ChannelError:
    """The output channel of a weight whose codes differ most from it: root mean square, in steps of its codes.

    A step is absmax / 127, or absmax / 7 for codes of 4 bits. `common` is the error of its median channel, always in
    the former, and `allowed` is how many steps are no defect.
    """

    weight: str
    channel: int
    steps: float
    common: float
    allowed: float = LARGEST


def channel_errors(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> list[ChannelError]:
    """Return the worst channel of every weight whose codes the candidate holds under the name that the reference has.

    The result is empty if most weights differ: then the candidate quantised other weights, as after a rotation.
    """
    found = list(_errors(reference, candidate))
    others = sum(item.common > _OTHER for item in found)
    return [] if 2 * others > len(found) else found


def _errors(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> Iterator[ChannelError]:
    given = candidate.graph.initializers
    for name, codes in given.items():
        weight = reference.graph.initializers.get(name.removesuffix(CODES))
        scales = _scales_of(candidate, name.removesuffix(CODES))
        if not name.endswith(CODES) or weight is None or scales is None or weight.dtype not in FLOATS:
            continue
        parts = [expression_of(value) for value in (weight, codes, scales)]
        zeros = _zeros_of(candidate, name.removesuffix(CODES))
        if all(part is not None and not part.depends_on_rank for part in parts):
            error = _error(name.removesuffix(CODES), *parts, zeros=zeros)  # type: ignore[arg-type]
            if error is not None:
                yield error


def _scales_of(candidate: onnx_ir.Model, name: str) -> onnx_ir.Value | None:
    given = candidate.graph.initializers
    return given.get(name + SCALES) or given.get(name + SCALES + WIDENED)


def _zeros_of(candidate: onnx_ir.Model, name: str) -> Expression | None:
    value = candidate.graph.initializers.get(name + ZEROS)
    return None if value is None else expression_of(value)


def rounding_errors(reference: onnx_ir.Model, candidate: onnx_ir.Model, *, bf16: bool = False) -> dict[str, float]:
    """Return how far weights of the same name differ beyond rounding to the narrower dtype, relative to each number.

    `bf16` says that one of the two stands for a model in bf16, as fp32. Weights that both read from the same bytes are
    left out. The result is empty if more than half of the weights differ: then a pass has folded something into them.
    """
    found: dict[str, float] = {}
    same = 0
    for name, value in candidate.graph.initializers.items():
        other = reference.graph.initializers.get(name)
        parts = [None if item is None else expression_of(item) for item in (other, value)]
        if other is None or not {other.dtype, value.dtype} <= FLOATS or any(part is None for part in parts):
            continue
        one, two = parts
        assert one is not None
        assert two is not None
        if one.shape != two.shape or one.depends_on_rank or two.depends_on_rank:
            continue
        error = 0.0 if one == two else _beyond_rounding(one, two, DataType.BFLOAT16 if bf16 else None)
        same += error == 0.0
        if error:
            found[name] = error
    return found if len(found) <= same else {}


def _beyond_rounding(one: Expression, two: Expression, dtype: DataType | None) -> float:
    narrow = dtype or min((one.dtype, two.dtype), key=lambda dtype: dtype.bitwidth)
    limits: Any = ml_dtypes.finfo(narrow.numpy())  # type: ignore[no-untyped-call]
    with Evaluator() as evaluator:
        first, second = (evaluator.array(part).astype(np.float64) for part in (one, two))
    first = np.clip(first, float(limits.min), float(limits.max))
    second = np.clip(second, float(limits.min), float(limits.max))
    room = 0.51 * np.abs(first) * float(limits.eps) + float(limits.smallest_normal)  # rounded to the nearest
    with np.errstate(invalid="ignore", divide="ignore"):
        beyond = np.where(np.abs(first - second) > room, np.abs(first - second) / np.maximum(np.abs(first), room), 0.0)
    return float(beyond.max(initial=0.0))


def numbers_of_codes(
    weight: Expression, codes: Expression, scales: Expression, *, zeros: Expression | None = None
) -> Array | None:
    """Return codes times scales, in the orientation of the weight that they stand for; None if they do not fit it."""
    original, candidates = _dequantised(weight, codes, scales, zeros)
    best: Array | None = None
    apart = float("inf")
    for made, _ in candidates:
        rounded = made.astype(scales.dtype.numpy()).astype(np.float32)
        for one in (rounded, rounded.T):
            if one.shape == original.shape and (distance := float(np.abs(one - original).mean())) < apart:
                best, apart = one, distance
    return best if best is not None and apart <= _OTHER / 127 * float(np.abs(original).max(initial=0.0)) else None


def _error(
    name: str, weight: Expression, codes: Expression, scales: Expression, *, zeros: Expression | None
) -> ChannelError | None:
    original, candidates = _dequantised(weight, codes, scales, zeros)
    largest = 7 if codes.dtype in FOUR_BITS else 127
    best: ChannelError | None = None
    for made, axis in candidates:
        for one in (original, original.T):
            if one.shape == made.shape:
                found = _worst_channel(name, one, made, axis, largest)
                best = found if best is None or found.steps < best.steps else best
    return best


def _dequantised(
    weight: Expression, codes: Expression, scales: Expression, zeros: Expression | None
) -> tuple[Array, list[tuple[Array, int]]]:
    """Return a weight, and codes times scales for each axis that the scales may belong to, all in fp32.

    There are none if the codes are no matrix of as many rows and columns, in either order.
    """
    fits = len(weight.shape) == 2 and sorted(weight.shape) == sorted(codes.shape)
    if not fits or len(scales.shape) not in {1, 2}:
        return np.empty((0, 0), np.float32), []
    with Evaluator() as evaluator:
        numbers, factors = (evaluator.array(part).astype(np.float32) for part in (codes, scales))
        original = evaluator.array(weight).astype(np.float32)
        offsets = np.float32(0) if zeros is None else evaluator.array(zeros).astype(np.float32)
    if len(scales.shape) == 2:
        return original, list(_of_groups(numbers, factors, offsets))
    axes = [axis for axis in (0, 1) if numbers.shape[axis] == len(factors)]
    return original, [(numbers * (factors[:, None] if axis == 0 else factors), axis) for axis in axes]


def _of_groups(numbers: Array, factors: Array, offsets: Any) -> Iterator[tuple[Array, int]]:
    """Yield codes times scales that groups of inputs share, and the axis of the output channels."""
    for axis in (0, 1):
        groups = factors.shape[1 - axis]
        if numbers.shape[axis] == factors.shape[axis] and groups and numbers.shape[1 - axis] % groups == 0:
            block = numbers.shape[1 - axis] // groups
            shift = np.repeat(offsets, block, 1 - axis) if np.ndim(offsets) else offsets
            yield (numbers - shift) * np.repeat(factors, block, 1 - axis), axis


def _worst_channel(name: str, original: Array, made: Array, axis: int, largest: int) -> ChannelError:
    difference = np.sqrt(np.mean(np.square(original - made), axis=1 - axis))
    step = np.abs(original).max(axis=1 - axis) / 127
    # A channel of zeros has no step; it must have stayed zero.
    steps = np.where(step > 0, difference / np.where(step > 0, step, 1), np.where(difference > 0, np.inf, 0))
    channel = int(steps.argmax())
    allowed = LARGEST if largest == 127 else LARGEST_OF_FOUR_BITS
    return ChannelError(name, channel, float(steps[channel]) * largest / 127, float(np.median(steps)), allowed)


def quantised_names(candidate: onnx_ir.Model) -> list[str]:
    """Return the names of the weights whose codes a model holds."""
    given = candidate.graph.initializers
    return [name.removesuffix(CODES) for name, value in given.items() if name.endswith(CODES) and value.uses()]


def on_codes(reference: onnx_ir.Model, candidate: onnx_ir.Model, folder: Path) -> onnx_ir.Model | None:
    """Return a clone of the original that reads the numbers of the candidate's codes, or None if they do not fit.

    They do not if some codes stand for no weight of the original, as after its weights were split or rotated. The
    numbers are written to files in `folder`, which must stay as long as the clone is used.
    """
    names = quantised_names(candidate)
    if not names or not all(name in reference.graph.initializers for name in names):
        return None
    original = reference.clone()
    graph = original.graph
    for index, name in enumerate(names):
        weight, kept = graph.initializers[name], candidate.graph.initializers.get(name)
        codes, scales = candidate.graph.initializers.get(name + CODES), _scales_of(candidate, name)
        parts = [None if value is None else expression_of(value) for value in (weight, codes, scales)]
        if any(part is None or part.depends_on_rank for part in parts):
            return None
        made = numbers_of_codes(*parts, zeros=_zeros_of(candidate, name))  # type: ignore[arg-type]
        if made is None:
            return None
        source = folder / f"codes-{index}.bin"
        dtype = parts[0].dtype  # type: ignore[union-attr]
        source.write_bytes(made.astype(dtype.numpy()).tobytes())
        expression = external_source(source, f"{name}.numbers", dtype, made.shape, 0)
        value = onnx_ir.Value(
            name=f"{name}.numbers",
            type=onnx_ir.TensorType(dtype),
            shape=onnx_ir.Shape(made.shape),
            const_value=LazyWeight(expression, f"{name}.numbers"),
        )
        graph.register_initializer(value)
        plain = set() if kept is None else {use.node.op_type for use in kept.uses()}
        for use in list(weight.uses()):  # a table that is the head, too, may be quantised in one of its places only
            if use.node.op_type not in plain:
                use.node.replace_input_with(use.idx, value)
        if not weight.uses():
            del graph.initializers[name]
    return original
