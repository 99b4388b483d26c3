"""Decompose rotary position embedding into products with cos and sin (the decompose-rotary pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.dtypes import SLICE_END
from passopt.ir.graph.attributes import attribute
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.concat import concat
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.decomposition.decompose_pass import DecomposePass, operand, required
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class DecomposeRotary(DecomposePass):
    """Give targets without RotaryEmbedding (any opset below 23) the operators it is made of.

    Before: ``y = RotaryEmbedding(x, cos, sin, position_ids)``, x [b, heads, s, 2h], tables [positions, h]
    After:  ``y = Add(Mul(x, cos2), Mul(Concat(Neg(x[h:]), x[:h]), sin2))``, where ``cos2 = Gather(Concat(cos, cos),
            position_ids)``, and sin2 alike
    A table that is a weight is doubled in the weight, once for all layers that read it. Channels rotated in pairs
    (interleaved), heads rotated in part and inputs [b, s, heads · channels] are decomposed as well.
    """

    name = "decompose-rotary"
    accuracy = REASSOCIATED
    after = ("fuse-rotary",)
    decomposes = ("RotaryEmbedding",)

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        given = required(node, 0)
        heads = attribute(node, "num_heads", 0)
        dims = dimensions(given)
        if dims is None:
            raise Decline(f"the number of axes of {given.name} is unknown")
        flat = len(dims) == 3
        x: Any = given
        if flat:
            x = op.Transpose(op.Reshape(given, [0, 0, heads, -1]), perm=[0, 2, 1, 3])
        width = _width(x, given, heads)
        turned = attribute(node, "rotary_embedding_dim", 0) or width
        part = x if turned == width else op.Slice(x, [0], [turned], [3])
        rotate = _rotate_pairs if attribute(node, "interleaved", 0) else _rotate_halves
        result = rotate(op, node, part, turned // 2)
        if turned != width:
            result = op.Concat(result, op.Slice(x, [turned], [SLICE_END], [3]), axis=-1)
        if flat:
            result = op.Reshape(op.Transpose(result, perm=[0, 2, 1, 3]), [0, 0, -1])
        return [result]


def _width(x: onnx_ir.Value, given: onnx_ir.Value, heads: int) -> int:
    """Return the number of channels of a head. Raises Decline if it is unknown."""
    last = (dimensions(given) or [None])[-1]
    if not isinstance(last, int):
        raise Decline(f"the number of channels of {given.name} is unknown")
    return last if x is given else last // heads


def _rotate_halves(op: Any, node: onnx_ir.Node, x: onnx_ir.Value, half: int) -> Any:
    """Rotate every channel of the lower half with the one at the same place in the upper half."""
    cos, sin = (_angles(op, node, index, doubled=True) for index in (1, 2))
    lower, upper = op.Slice(x, [0], [half], [3]), op.Slice(x, [half], [SLICE_END], [3])
    return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(upper), lower, axis=-1), sin))


def _rotate_pairs(op: Any, node: onnx_ir.Node, x: onnx_ir.Value, half: int) -> Any:
    """Rotate neighbouring channels as pairs (interleaved)."""
    cos, sin = (_angles(op, node, index, doubled=False) for index in (1, 2))
    even, odd = (op.Slice(x, [start], [SLICE_END], [3], [2]) for start in (0, 1))
    real = op.Sub(op.Mul(even, cos), op.Mul(odd, sin))
    imaginary = op.Add(op.Mul(even, sin), op.Mul(odd, cos))
    pairs = op.Concat(op.Unsqueeze(real, [-1]), op.Unsqueeze(imaginary, [-1]), axis=-1)
    return op.Reshape(pairs, [0, 0, 0, 2 * half])


def _angles(op: Any, node: onnx_ir.Node, index: int, *, doubled: bool) -> Any:
    """Return cos or sin at this step's positions: [b, 1, s, h], or [b, 1, s, 2h] if `doubled`.

    With `doubled`, every angle is there for both halves of a head.
    """
    table, positions = required(node, index), operand(node, 3)
    weight = None if table.is_graph_input() else expression_of(table)
    if doubled and weight is not None:
        name = f"{table.name}.doubled"
        double = concat([weight, weight], axis=len(weight.shape) - 1)
        table = op.shared(("doubled", table.name), lambda: op.initializer(name, double))
        doubled = False
    angles = table if positions is None else op.Gather(table, positions, axis=0)
    if doubled:
        angles = op.Concat(angles, angles, axis=-1)
    return op.Unsqueeze(angles, [1])
