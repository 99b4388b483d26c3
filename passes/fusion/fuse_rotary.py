"""Fuse rotary position embedding into one operator, with tables of half the width (the fuse-rotary pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.shapes.dimensions import dimensions, same
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.fusion.not_negative import is_not_negative
from passopt.passes.fusion.rotary_tables import first_half, keeps_last_axis
from passopt.passes.patterns.rewrite_pass import RewritePass


@dataclasses.dataclass(frozen=True)
class FuseRotary(RewritePass):
    """Rotate queries and keys in one operator, from angles that are stored once, not once for each half of a head.

    Before: ``y = Add(Mul(x, cos), Mul(Concat(Neg(x[h:]), x[:h]), sin))``, x [b, heads, s, 2h], cos, sin [b, 1, s, 2h]
    After:  ``y = RotaryEmbedding(x, cos.half, sin.half, position_ids)``, tables [positions, h];
            where angles are computed from the positions, ``y = RotaryEmbedding(x, cos[..., :h], sin[..., :h])``
    Ids that are known to be 0 or more, as position_ids of an exported decoder are, go into the operator, and a table
    that was cut to the length of the sequence is taken whole. A negative id counts from the end of the table for Gather
    only, so by other ids the angles are looked up before: ``y = RotaryEmbedding(x, Gather(cos.half, ids), …)``.
    A head that is rotated in part becomes one operator as well (rotary_embedding_dim).
    """

    name = "fuse-rotary"
    accuracy = REASSOCIATED
    after = ("legalize", "canonicalize", "cse")
    makes: ClassVar[tuple[str, ...]] = ("RotaryEmbedding",)

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [(self.pattern, self.rewrite), (self.partial, self.rewrite_partial)]

    def pattern(
        self, op: Any, x: Any, cos: Any, sin: Any, start: Any, middle: Any, end: Any, axis: Any, sizes: Any
    ) -> Any:
        """Match heads that are rotated whole, with their halves taken by two Slices or by one Split."""
        lower, upper = op.Split(x, sizes, axis=-1, outputs=2)
        halves = op.any_of(
            "halves",
            slices=op.Concat(op.Neg(op.Slice(x, middle, end, axis)), op.Slice(x, start, middle, axis), axis=-1),
            split=op.Concat(op.Neg(upper), lower, axis=-1),
        )
        return op.Add(op.Mul(x, cos), op.Mul(halves, sin))

    def rewrite(
        self,
        op: Any,
        x: Any,
        cos: Any,
        sin: Any,
        start: Any = None,
        middle: Any = None,
        end: Any = None,
        axis: Any = None,
        sizes: Any = None,
    ) -> Any:
        op.require_opset()
        dims = dimensions(x) or []
        if len(dims) != 4 or not isinstance(dims[3], int):
            raise Decline(f"{x.name} {dims} is not [batch, heads, seq, channels]")
        if sizes is not None:
            _check_equal_parts(op, sizes, dims[3])
        else:
            _check_halves(op, (start, middle, end, axis), dims[3])
        (cos_table, ids), (sin_table, others) = (_table(op, value, x) for value in (cos, sin))
        if ids is not others:
            raise Decline(f"cos is looked up at {ids}, sin at {others}")
        return op.RotaryEmbedding(
            x, cos_table, sin_table, _for_every_batch(op, ids, x) if ids is not None else None, interleaved=0
        )

    def partial(
        self, op: Any, x: Any, cos: Any, sin: Any, ids: Any, start: Any, middle: Any, end: Any, axis: Any
    ) -> Any:
        """Match heads of which only the first channels are rotated, already in one operator."""
        turned = op.RotaryEmbedding(
            op.Slice(x, start, middle, axis), cos, sin, op.maybe(ids), interleaved=0, rotary_embedding_dim=0
        )
        return op.Concat(turned, op.Slice(x, middle, end, axis), axis=-1)

    def rewrite_partial(
        self, op: Any, x: Any, cos: Any, sin: Any, ids: Any, start: Any, middle: Any, end: Any, axis: Any
    ) -> Any:
        dims = dimensions(x) or []
        if len(dims) != 4 or not isinstance(dims[3], int):
            raise Decline(f"{x.name} {dims} is not [batch, heads, seq, channels]")
        first, width, last, along = (int(op.number(value)) for value in (start, middle, end, axis))
        if first != 0 or not 0 < width < dims[3] <= last or along % 4 != 3:
            raise Decline(f"the parts {first}:{width}:{last} along axis {along} are not all of the {dims[3]} channels")
        return op.RotaryEmbedding(x, cos, sin, ids, interleaved=0, rotary_embedding_dim=width)


def _check_halves(op: Any, bounds: Sequence[onnx_ir.Value], width: int) -> None:
    """Raise Decline unless the bounds of the slices cut the channels into two halves."""
    first, middle, last, axis = (int(op.number(value)) for value in bounds)
    if axis % 4 != 3 or first != 0 or 2 * middle != width or last < width:
        raise Decline(f"{first}:{middle}:{last} along axis {axis} are not the two halves of {width} channels")


def _check_equal_parts(op: Any, sizes: onnx_ir.Value, width: int) -> None:
    """Raise Decline unless the sizes of the Split are two halves of the channels."""
    found = op.constant(sizes).reshape(-1).tolist()
    if found != [width // 2, width // 2]:
        raise Decline(f"splits {width} channels into {found}, not into halves")


def _table(op: Any, value: onnx_ir.Value, x: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value | None]:
    """Return the cos or sin input of the operator for `value` [b, 1, s, 2h], and the position ids.

    That is a table [positions, h] with ids [b, s]; or angles [b, s, h] and None, if they are not looked up in a table,
    or by ids that may be negative.
    Raises Decline if the shape is another, or if the halves are not known to be equal.
    """
    dims, wanted = dimensions(value) or [], dimensions(x) or []
    if len(dims) != 4 or dims[1] != 1 or not same(dims[2:], wanted[2:]):
        raise Decline(f"{value.name} {dims} is not known to be {[wanted[0], 1, *wanted[2:]]}")
    if dims[0] != 1 and not same(dims[:1], wanted[:1]):
        raise Decline(f"{value.name} {dims} may be of another batch than {x.name} {wanted}")
    angles = _before_unsqueeze(op, value)
    looked_up = angles.producer() if angles is not None else None
    if looked_up is not None and looked_up.op_type == "Gather" and _takes_rows(looked_up):
        table, ids = looked_up.inputs
        if table is not None and is_not_negative(ids) and len(dimensions(table) or []) == 2:
            return first_half(op, _whole_table(op, table)), ids
    half = first_half(op, angles) if angles is not None else op.Squeeze(first_half(op, value), [1])
    return _for_every_batch(op, half, x), None


def _takes_rows(gather: onnx_ir.Node) -> bool:
    return "axis" not in gather.attributes or gather.attributes["axis"].as_int() == 0


def _for_every_batch(op: Any, value: onnx_ir.Value, x: onnx_ir.Value) -> onnx_ir.Value:
    """Expand angles [b, s, h] or ids [b, s] to the batch of x, as the operator does not broadcast; ids become int64."""
    dims, batch = dimensions(value) or [None], (dimensions(x) or [])[0]
    if dims[0] != 1 and not same(dims[:1], [batch]):
        raise Decline(f"{value.name} {dims} may be of another batch than {x.name} {dimensions(x)}")
    if value.dtype == onnx_ir.DataType.INT32:
        value = op.Cast(value, to=onnx_ir.DataType.INT64.value)
    if dims[0] == 1 and batch != 1:
        value = op.Expand(value, op.Concat(op.Shape(x, start=0, end=1), *([[1]] * (len(dims) - 1)), axis=0))
    return value


def _before_unsqueeze(op: Any, value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return the angles [b, s, 2h] before they got an axis for the heads; None if that was not by Unsqueeze."""
    node = value.producer()
    if (
        node is None
        or node.op_type != "Unsqueeze"
        or op.constant(node.inputs[1]).reshape(-1).tolist() not in ([1], [-3])
    ):
        return None
    return node.inputs[0]


def _whole_table(op: Any, table: onnx_ir.Value) -> onnx_ir.Value:
    """Return the table as it was before it was cut to the length of the sequence.

    The rows that ids name are the same in both.
    """
    node = table.producer()
    if node is None or node.op_type not in {"Slice", "Squeeze"} or not keeps_last_axis(node):
        return table
    source = node.inputs[0]
    assert source is not None
    whole = _whole_table(op, source)
    if node.op_type == "Squeeze":
        return op.Squeeze(whole, node.inputs[1]) if _can_squeeze(op, whole, node.inputs[1], source) else table
    starts, steps = (small_constant(node.inputs[index]) if len(node.inputs) > index else None for index in (1, 4))
    begins = starts is not None and not starts.any()
    return whole if begins and (len(node.inputs) < 5 or (steps is not None and (steps == 1).all())) else table


def _can_squeeze(op: Any, whole: onnx_ir.Value, axes: onnx_ir.Value | None, source: onnx_ir.Value) -> bool:
    """Return True if the table, before it was cut, already had length 1 where axes are squeezed."""
    dims = dimensions(whole) or []
    return whole is not source and all(dims[axis] == 1 for axis in op.constant(axes).reshape(-1).tolist())
