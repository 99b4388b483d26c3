"""Split one packed projection into query, key and value projections with a weight each (the split-packed-qkv pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

_PARTS = "qkv"


@dataclasses.dataclass(frozen=True)
class SplitPackedQkv(RewritePass):
    """Give query, key and value their own weight, so that each can be sharded by heads, fused and quantised alone.

    Before: ``p = MatMul(x, Transpose(w)); q, k, v = Gather(Squeeze(Transpose(Unsqueeze(Reshape(p)))), 0 | 1 | 2)``
            or ``q, k, v = Split(p, sizes)``, or three Slices of p that take all of it
    After:  ``q = MatMul(x, Transpose(w.q)); k = MatMul(x, Transpose(w.k)); v = MatMul(x, Transpose(w.v))``
    A weight that is stored as codes with a scale per output channel is split by codes and scales.
    """

    name = "split-packed-qkv"

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [
            (self.gathered, self.rewrite_gathered),
            (self.divided, self.rewrite_divided),
            (self.sliced, self.rewrite_sliced),
            (self.sliced_by_one, self.rewrite_sliced),
        ]

    def gathered(self, op: Any, x: Any, w: Any, shape: Any, squeezed: Any) -> Any:
        """Match Baichuan's spelling: unflatten, unsqueeze, transpose, squeeze and three selects."""
        unflattened = op.Reshape(_packed(op, x, w), shape, bind="unflattened")
        turned = op.Transpose(op.Unsqueeze(unflattened, [0]), perm=[3, 1, 2, 0, 4])
        stacked = op.Squeeze(turned, squeezed)
        return [op.Gather(stacked, index, axis=0) for index in range(3)]

    def rewrite_gathered(self, op: Rewriter, x: Any, w: Any, layout: str, unflattened: Any, squeezed: Any) -> Any:
        if op.constant(squeezed).reshape(-1).tolist() not in ([-2], [3]):
            raise Decline(f"squeezes axis {op.constant(squeezed).tolist()}, not the one that was unsqueezed")
        dims = dimensions(unflattened) or []
        if len(dims) != 4 or dims[2] != 3 or not isinstance(dims[3], int):
            raise Decline(f"{unflattened.name} of shape {dims} is not [batch, seq, 3, width]")
        return _project(op, x, w, layout, [dims[3]] * 3)

    def divided(self, op: Any, x: Any, w: Any, sizes: Any) -> Any:
        """Match one Split along the last axis."""
        return op.Split(_packed(op, x, w), sizes, axis=-1, outputs=3)

    def rewrite_divided(self, op: Rewriter, x: Any, w: Any, layout: str, sizes: Any) -> Any:
        return _project(op, x, w, layout, op.constant(sizes).tolist())

    def sliced(
        self, op: Any, x: Any, w: Any, start0: Any, end0: Any, start1: Any, end1: Any, start2: Any, end2: Any, axis: Any
    ) -> Any:
        """Match Phi-3's three slices along the last axis, in any order."""
        return _slices(op, _packed(op, x, w), ((start0, end0), (start1, end1), (start2, end2)), [axis])

    def sliced_by_one(
        self, op: Any, x: Any, w: Any, start0: Any, end0: Any, start1: Any, end1: Any, start2: Any, end2: Any, axis: Any
    ) -> Any:
        """Match the same three slices with their steps of 1 written out."""
        return _slices(op, _packed(op, x, w), ((start0, end0), (start1, end1), (start2, end2)), [axis, [1]])

    def rewrite_sliced(
        self,
        op: Any,
        x: Any,
        w: Any,
        layout: str,
        part: Any,
        start0: Any,
        end0: Any,
        start1: Any,
        end1: Any,
        start2: Any,
        end2: Any,
        axis: Any,
    ) -> Any:
        ndim = len(dimensions(part) or [])
        if op.constant(axis).reshape(-1).tolist() not in ([-1], [ndim - 1]):
            raise Decline(f"slices axis {op.constant(axis).tolist()} of {ndim}, not the channels")
        bounds = [int(op.constant(bound).reshape(-1)[0]) for bound in (start0, end0, start1, end1, start2, end2)]
        width = op.weight(w).shape[0 if layout == "out_in" else 1]
        starts, ends = bounds[0::2], [min(end, width) for end in bounds[1::2]]
        order = sorted(range(3), key=starts.__getitem__)
        if [starts[index] for index in order] != [0, *(ends[index] for index in order[:2])] or ends[order[2]] != width:
            raise Decline(f"the slices {starts} to {ends} do not take all {width} channels, each once")
        projected = _project(op, x, w, layout, [ends[index] - starts[index] for index in order])
        return [projected[order.index(index)] for index in range(3)]


def _slices(op: Any, packed: Any, bounds: Sequence[tuple[Any, Any]], rest: Sequence[Any]) -> list[Any]:
    """Return the pattern of three slices of `packed` with these bounds and the further inputs `rest`."""
    first, *others = bounds
    return [op.Slice(packed, *first, *rest, bind="part"), *(op.Slice(packed, *both, *rest) for both in others)]


def _packed(op: Any, x: Any, w: Any) -> Any:
    """Return the pattern of the packed projection; its weight is stored [out, in] behind a Transpose, or [in, out]."""
    weight = op.any_of("layout", out_in=op.Transpose(w, perm=[1, 0]), in_out=w)
    return op.MatMul(x, weight)


def _project(op: Any, x: Any, w: Any, layout: str, widths: list[int]) -> list[Any]:
    """Build the three projections, with `widths` output channels each, from pieces of the packed weight.

    Raises Decline if the weight is computed in the graph, or if the widths do not add up to its output channels.
    """
    producer = w.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and layout == "out_in":
        return _project_codes(op, x, producer, widths)
    if producer is not None:
        raise Decline(f"the weight is computed by {producer.op_type}; run split-packed-qkv before int8")
    weight = op.weight(w)
    axis = 0 if layout == "out_in" else 1
    if sum(widths) != weight.shape[axis]:
        raise Decline(f"{w.name} has {weight.shape[axis]} output channels, the pieces take {widths}")
    projected = []
    for part, piece in zip(_PARTS, weight.split(widths, axis), strict=True):
        own = op.initializer(f"{w.name}.{part}", piece)
        projected.append(op.MatMul(x, op.Transpose(own, perm=[1, 0]) if layout == "out_in" else own))
    return projected


def _project_codes(op: Any, x: Any, dequantized: onnx_ir.Node, widths: list[int]) -> list[Any]:
    """Build the three projections from pieces of int8 codes [out, in] and of their scales [out].

    Raises Decline if the scales are not of output channels, or if the widths do not add up to these.
    """
    codes, scales, *zero = dequantized.inputs
    axis = dequantized.attributes.get_int("axis", 1)
    if any(value is not None for value in zero) or axis != 0 or "block_size" in dequantized.attributes:
        raise Decline(f"{called(dequantized)} has no plain scale per output channel; run split-packed-qkv before int8")
    both = op.weight(codes), op.weight(scales)
    if both[1].shape != both[0].shape[:1] or sum(widths) != both[0].shape[0]:
        shapes = f"{list(both[0].shape)} has the scales {list(both[1].shape)}"
        raise Decline(f"{codes.name} {shapes}, the pieces take {widths} channels")
    projected, stem = [], (codes.name or "").removesuffix(".codes")
    pieces = zip(_PARTS, both[0].split(widths, 0), both[1].split(widths, 0), strict=True)
    for part, own_codes, own_scales in pieces:
        own = [
            op.initializer(f"{stem}.{part}.codes", own_codes),
            op.initializer(f"{stem}.{part}.scales", own_scales),
        ]
        projected.append(op.MatMul(x, op.Transpose(op.DequantizeLinear(*own, axis=0), perm=[1, 0])))
    return projected
