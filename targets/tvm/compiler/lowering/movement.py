"""Lower operators that move data or make it from lengths: shapes, views, slices, concatenations and gathers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import (
    Delegated,
    Length,
    Numbers,
    Tvm,
    Unsupported,
    Values,
    dtype_name,
    product,
)

#: The permutation between [b, h, s, d] and [b, s, h, d]. The kernels that work on heads use the latter order, so most
#: of these transposes vanish.
HEADS_FIRST = (0, 2, 1, 3)


@lowers("Shape")
def shape(at: Values, node: onnx_ir.Node) -> None:
    """Lower Shape to lengths."""
    dims = at.shape(node.inputs[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", len(dims))
    at.set_numbers(node.outputs[0], dims[start:end], scalar=False)


@lowers("Size")
def size(at: Values, node: onnx_ir.Node) -> None:
    """Lower Size to a length."""
    at.set_numbers(node.outputs[0], [product(at.shape(node.inputs[0]))], scalar=True)


@lowers("Squeeze", "Unsqueeze")
def squeeze(at: Values, node: onnx_ir.Node) -> None:
    """Lower Squeeze and Unsqueeze to views, or keep lengths as lengths."""
    axes = given_axes(at, node, 1)
    numbers = at.numbers(node.inputs[0])
    if numbers is not None and (node.op_type == "Squeeze" or numbers.scalar) and len(axes or (0,)) == 1:
        at.set_numbers(node.outputs[0], numbers.items, scalar=node.op_type == "Squeeze" and len(numbers.items) == 1)
        return
    found = at.tensor(node.inputs[0])
    dims = at.shape_of(found)
    if node.op_type == "Squeeze":
        gone = (
            {axis % len(dims) for axis in axes}
            if axes
            else {place for place, dim in enumerate(dims) if isinstance(dim, int) and dim == 1}
        )
        at.set(node.outputs[0], at.view(found, [dim for place, dim in enumerate(dims) if place not in gone]))
        return
    rank = len(dims) + len(axes or ())
    new, old = {axis % rank for axis in axes or ()}, iter(dims)
    at.set(node.outputs[0], at.view(found, [1 if place in new else next(old) for place in range(rank)]))


def given_axes(at: Values, node: onnx_ir.Node, position: int) -> tuple[int, ...] | None:
    """Return the axes from the attribute or from input `position`, or None if there are none.

    Raises Unsupported if they are computed.
    """
    given = attribute(node, "axes", None)
    if given is not None:
        return tuple(int(axis) for axis in given)
    if len(node.inputs) <= position or node.inputs[position] is None:
        return None
    found = at.constant(node.inputs[position])
    if found is None:
        raise Unsupported("the axes are computed")
    return tuple(int(axis) for axis in found.reshape(-1))


@lowers("Reshape", "Flatten")
def reshape(at: Values, node: onnx_ir.Node) -> None:
    """Lower Reshape and Flatten to views, or keep lengths as lengths."""
    numbers = at.numbers(node.inputs[0])
    if node.op_type == "Reshape":
        target = at.integers(node.inputs[1], "the target shape")
        if numbers is not None and (len(target) == 0 or (len(target) == 1 and target[0] in (-1, len(numbers.items)))):
            at.set_numbers(node.outputs[0], numbers.items, scalar=len(target) == 0)
            return
    found = at.tensor(node.inputs[0])
    before = at.shape_of(found)
    if node.op_type == "Flatten":
        axis = attribute(node, "axis", 1)
        target = (product(before[:axis]), product(before[axis:]))
    at.set(node.outputs[0], at.view(found, resolved(at, before, target, attribute(node, "allowzero", 0) == 1)))


def resolved(at: Values, before: Sequence[Length], target: Sequence[Length], keeps_zero: bool) -> list[Length]:
    """Return the target shape of a Reshape with 0 (the length before) and -1 (what is left) replaced.

    With `keeps_zero`, 0 stays a length of 0.
    """
    after = [
        before[index] if isinstance(item, int) and item == 0 and not keeps_zero else item
        for index, item in enumerate(target)
    ]
    if -1 in [item for item in after if isinstance(item, int)]:
        index = next(place for place, item in enumerate(after) if isinstance(item, int) and item == -1)
        after[index] = _left(at, before, [*after[:index], *after[index + 1 :]])
    return after


def _left(at: Values, before: Sequence[Length], known: Sequence[Length]) -> Length:
    """Return product(before) / product(known), after removing lengths that occur in both."""
    above, below = list(before), list(known)
    for item in known:
        match = next((place for place, other in enumerate(above) if at.equal(item, other)), None)
        if match is not None:
            above.pop(match)
            below.remove(item)
    over, under = at.simplified(product(above)), at.simplified(product(below))
    return at.simplified(over if isinstance(under, int) and under == 1 else over // under)


@lowers("Transpose")
def transpose(at: Values, node: onnx_ir.Node) -> None:
    """Lower Transpose; one between [b, h, s, d] and [b, s, h, d] moves no data if its readers can avoid it."""
    from tvm import relax

    source, permutation = node.inputs[0], tuple(attribute(node, "perm", ()))
    if source is None:
        raise Unsupported("an input is missing")
    if permutation == HEADS_FIRST:
        if at.has_heads(source):
            at.set(node.outputs[0], at.heads(source))
        else:
            at.set_heads(node.outputs[0], at.tensor(source))
        return
    found = at.tensor(source)
    axes = permutation or tuple(reversed(range(len(found.ty.shape.values))))
    at.set(node.outputs[0], relax.op.permute_dims(found, list(axes)))


@lowers("Expand")
def expand(at: Values, node: onnx_ir.Node) -> None:
    """Lower Expand to a broadcast, or to nothing if the shape stays the same."""
    from tvm import relax

    found, target = at.tensor(node.inputs[0]), list(at.integers(node.inputs[1], "the target shape"))
    before = at.shape_of(found)
    rank = max(len(before), len(target))
    before, target = [1] * (rank - len(before)) + before, [1] * (rank - len(target)) + target
    after = [_broadcast(first, second) for first, second in zip(before, target, strict=True)]
    if all(at.equal(first, second) for first, second in zip(before, after, strict=True)) and rank == len(
        at.shape_of(found)
    ):
        at.set(node.outputs[0], found)
        return
    at.set(node.outputs[0], relax.op.broadcast_to(found, after))


def _broadcast(length: Length, target: Length) -> Length:
    """Return the length that comes out of a broadcast; of two symbols it is the target, as exporters mean it."""
    return length if isinstance(target, int) and target == 1 else target


@lowers("ConstantOfShape")
def constant_of_shape(at: Values, node: onnx_ir.Node) -> None:
    """Lower ConstantOfShape; a short vector of integers becomes lengths."""
    from tvm import relax

    target = at.integers(node.inputs[0], "the shape")
    tensor = attribute(node, "value", None)
    array = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    if array.dtype.kind == "i" and len(target) == 1 and isinstance(target[0], int) and target[0] <= 16:
        at.set_numbers(node.outputs[0], [int(array.reshape(-1)[0])] * target[0], scalar=False)
        return
    scalar = at.literal(array.reshape(()))
    at.set(node.outputs[0], relax.op.full(list(target), scalar, str(scalar.ty.dtype)))


@lowers("Range")
def range_(at: Values, node: onnx_ir.Node) -> None:
    """Lower Range of integers; a range of floats is left to TVM's importer."""
    from tvm import relax

    if node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point():
        raise Delegated("a range of floats")
    start, limit, delta = (at.integers(value, "a bound of the range")[0] for value in node.inputs)
    kind = dtype_name(node.outputs[0].dtype or onnx_ir.DataType.INT64)
    at.set(node.outputs[0], relax.op.arange(start, limit, delta, kind))


@lowers("Concat")
def concat(at: Values, node: onnx_ir.Node) -> None:
    """Lower Concat; vectors of lengths stay lengths."""
    from tvm import relax

    parts = [at.numbers(value) for value in node.inputs]
    known = [part for part in parts if part is not None and not part.scalar]
    if len(known) == len(parts):
        at.set_numbers(node.outputs[0], [item for part in known for item in part.items], scalar=False)
        return
    at.set(node.outputs[0], relax.op.concat([at.tensor(value) for value in node.inputs], attribute(node, "axis", 0)))


@lowers("Split")
def split(at: Values, node: onnx_ir.Node) -> None:
    """Lower Split to one slice per output."""
    from tvm import relax

    found, axis = at.tensor(node.inputs[0]), attribute(node, "axis", 0)
    dims = at.shape_of(found)
    axis %= len(dims)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        widths = list(at.integers(node.inputs[1], "a width"))
    else:
        if not isinstance(dims[axis], int):
            raise Unsupported(f"axis {axis} has no known length to split evenly")
        width = math.ceil(dims[axis] / len(node.outputs))
        widths = [min(width, dims[axis] - width * part) for part in range(len(node.outputs))]
    start: Length = 0
    for width, output in zip(widths, node.outputs, strict=True):
        at.set(output, relax.op.strided_slice(found, [axis], [start], [start + width], [1], assume_inbound=True))
        start = at.simplified(start + width)


@lowers("SplitToSequence")
def split_to_sequence(at: Values, node: onnx_ir.Node) -> None:
    """Lower SplitToSequence to a list of slices, whose widths must be known."""
    from tvm import relax

    found, axis = at.tensor(node.inputs[0]), attribute(node, "axis", 0)
    dims, given = at.shape_of(found), at.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axis %= len(dims)
    if given is None or not isinstance(dims[axis], int):
        raise Unsupported("a sequence of parts whose widths are not known")
    whole, width = dims[axis], int(given.reshape(-1)[0])
    widths = given.tolist() if given.ndim else [min(width, whole - start) for start in range(0, whole, width)]
    ends = np.cumsum(widths).tolist()
    at.sequences[node.outputs[0]] = [
        at.emit(relax.op.strided_slice(found, [axis], [end - width], [end], [1], assume_inbound=True))
        for end, width in zip(ends, widths, strict=True)
    ]


@lowers("SequenceAt")
def sequence_at(at: Values, node: onnx_ir.Node) -> None:
    """Lower SequenceAt, which takes a known element of a sequence that SplitToSequence made."""
    sequence, place = at.sequences.get(node.inputs[0]) if node.inputs[0] else None, at.constant(node.inputs[1])
    if sequence is None or place is None or not -len(sequence) <= int(place) < len(sequence):
        raise Unsupported("an element of a sequence that is not known")
    at.set(node.outputs[0], sequence[int(place)])


@lowers("Slice")
def slice_(at: Values, node: onnx_ir.Node) -> None:
    """Lower Slice with positive constant steps; other slices are left to TVM's importer."""
    from tvm import relax

    starts, ends = (at.integers(value, "a bound") for value in node.inputs[1:3])
    axes = given_axes(at, node, 3)
    given = node.inputs[4] if len(node.inputs) > 4 else None
    steps = [1] * len(starts) if given is None else at.integers(given, "a step")
    if any(not isinstance(step, int) or step < 1 for step in steps):
        raise Delegated("a slice that runs backwards, or whose step is computed")
    numbers = at.numbers(node.inputs[0])
    if numbers is not None and all(isinstance(item, int) for item in (*starts, *ends)):
        at.set_numbers(node.outputs[0], numbers.items[starts[0] : ends[0] : steps[0]], scalar=False)
        return
    found = at.tensor(node.inputs[0])
    dims = at.shape_of(found)
    axes = tuple(axis % len(dims) for axis in (axes if axes is not None else range(len(starts))))
    begin = [_bound(at, item, dims[axis]) for item, axis in zip(starts, axes, strict=True)]
    end = [_bound(at, item, dims[axis]) for item, axis in zip(ends, axes, strict=True)]
    at.set(
        node.outputs[0],
        relax.op.strided_slice(found, list(axes), begin, end, list(steps), assume_inbound=True),
    )


def _bound(at: Values, position: Length, length: Length) -> Length:
    """Return a bound of a slice, clamped to 0 … length.

    A bound that is itself a length is taken to lie inside, as exporters mean it.
    """
    from tvm import tirx

    if not isinstance(position, int):
        return position
    if isinstance(length, int):
        return max(0, min(length, position + length if position < 0 else position))
    if position < 0:
        return at.simplified(tirx.max(length + position, 0)) if position < -1 else at.simplified(length + position)
    return length if position >= 2**31 - 1 else 0 if position == 0 else at.simplified(tirx.min(length, position))


@lowers("Gather")
def gather(at: Values, node: onnx_ir.Node) -> None:
    """Lower Gather: of lengths, of int8 codes with their scales, at one constant index, or of any rows."""
    from tvm import relax

    table, index = node.inputs
    axis, where = attribute(node, "axis", 0), at.constant(index)
    numbers = at.numbers(table)
    if numbers is not None and where is not None and not numbers.scalar:
        items = [numbers.items[int(item)] for item in where.reshape(-1)]
        at.set_numbers(node.outputs[0], items, scalar=where.ndim == 0)
        return
    if _rows_of_codes(at, node, axis):
        return
    found = at.stored(table)
    dims = at.shape_of(found)
    axis %= len(dims)
    if where is not None and where.ndim == 0:
        start = int(where) if int(where) >= 0 else at.simplified(dims[axis] + int(where))
        part = at.emit(relax.op.strided_slice(found, [axis], [start], [start + 1], [1], assume_inbound=True))
        at.set(node.outputs[0], at.widened(at.emit(relax.op.squeeze(part, [axis]))))
        return
    # Rows are taken before they are widened, so that a table of embeddings is never converted to fp32 as a whole.
    places = _from_front(at, index, [dims[axis]])
    at.set(node.outputs[0], at.widened(at.emit(relax.op.take(found, places, axis, mode="clip"))))


def _from_front(at: Values, index: onnx_ir.Value | None, lengths: Sequence[Length]) -> Tvm:
    """Return indices counted from the front, where negative ones counted from the end of an axis.

    `lengths` are those of the axes: one for all indices, or one for each along the last axis of `index`.
    """
    from tvm import relax

    where = at.constant(index)
    if where is not None and (not (where < 0).any() or all(isinstance(length, int) for length in lengths)):
        ends = np.asarray(lengths if (where < 0).any() else 0)
        return at.literal(np.where(where < 0, where + ends, where))
    found = at.tensor(index)
    kind = str(found.ty.dtype)
    ends = at.emit(relax.op.astype(at.spelled(Numbers(tuple(lengths), scalar=len(lengths) == 1)), kind))
    wrapped = at.emit(relax.op.add(found, ends))
    return at.emit(relax.op.where(at.emit(relax.op.less(found, at.literal(np.zeros((), kind)))), wrapped, found))


def _rows_of_codes(at: Values, node: onnx_ir.Node, axis: int) -> bool:
    """Lower an embedding of int8 codes by taking rows and their scales and multiplying them; False for other nodes."""
    from tvm import relax

    table, index = node.inputs
    dequantize = table.producer() if table is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or axis != 0:
        return False
    codes, scales = at.stored(dequantize.inputs[0]), at.stored(dequantize.inputs[1])
    if len(scales.ty.shape.values) != 1 or attribute(dequantize, "axis", 1) != 0:
        raise Unsupported("a table of codes whose scales are not per row")
    where = _from_front(at, index, at.shape_of(codes)[:1])
    rows = at.emit(relax.op.astype(at.emit(relax.op.take(codes, where, 0, mode="clip")), "float32"))
    factors = at.widened(at.emit(relax.op.take(scales, where, 0, mode="clip")))
    at.set(node.outputs[0], relax.op.multiply(rows, at.emit(relax.op.expand_dims(factors, [-1]))))
    return True


@lowers("DequantizeLinear")
def dequantize_linear(at: Values, node: onnx_ir.Node) -> None:
    """Lower DequantizeLinear to nothing, since linears and gathers read the codes themselves.

    Any other reader would turn weights back into floats as a whole, so it raises Unsupported.
    """

    def refuse() -> None:
        raise Unsupported(f"{node.outputs[0].name!r} would be codes turned back into floats as a whole")

    at.defer(node.outputs[0], refuse)


@lowers("GatherND")
def gather_nd(at: Values, node: onnx_ir.Node) -> None:
    """Lower GatherND with indices of known width."""
    from tvm import relax

    data, first = at.tensor(node.inputs[0]), attribute(node, "batch_dims", 0)
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    if shape is None or not isinstance(shape[-1], int):
        raise Unsupported("a gather by indices of unknown width")
    places = _from_front(at, node.inputs[1], at.shape_of(data)[first : first + shape[-1]])
    at.set(node.outputs[0], relax.op.gather_nd(data, places, first))


@lowers("Trilu")
def trilu(at: Values, node: onnx_ir.Node) -> None:
    """Lower Trilu to the upper or lower triangle."""
    from tvm import relax

    found = at.tensor(node.inputs[0])
    k = at.integers(node.inputs[1], "the diagonal")[0] if len(node.inputs) > 1 and node.inputs[1] is not None else 0
    at.set(node.outputs[0], relax.op.triu(found, k) if attribute(node, "upper", 1) else relax.op.tril(found, k))
