"""Hold the parts of an attention that fuse-attention found, and check that the fused operator means the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.shapes.dimensions import dimensions, may_be_same, same
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.framework.base import Decline
from passopt.passes.fusion.attention_masks import AlibiBias, Extent, chosen, lowest, split_alibi, summed
from passopt.passes.fusion.same_length import same_length
from passopt.passes.patterns.rules import Rewriter

#: Scores at or below this are masked, whatever number an exporter chose.
_MASKED = -1e4
#: How many operators may depend on the joined keys and values, such as on their lengths, before a match is declined.
_FURTHEST = 200
#: How the axes of keys in each layout are turned to [batch, heads, seq, d].
_TO_BHSD = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "bhds": (0, 1, 3, 2)}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that a match found, by their names in the pattern; None for what the spelling does not have.

    query is [b, h, q, d]. key and value of this step are [b, h_kv, kv, d], but [b, kv, h_kv, d] in layout "bshd".
    and [b, h_kv, d, kv] in layout "bhds". past_key and past_value are [b, h_kv, p, d]. mask and bias are added to
    scores [b, h, q, p + kv].
    """

    query: onnx_ir.Value
    key: onnx_ir.Value
    value: onnx_ir.Value
    y: onnx_ir.Value
    key_layout: str = "bhsd"
    axis: int = -1
    past_key: onnx_ir.Value | None = None
    past_value: onnx_ir.Value | None = None
    along: int = 2
    key_groups: onnx_ir.Value | None = None
    value_groups: onnx_ir.Value | None = None
    key_repeated: onnx_ir.Value | None = None
    value_repeated: onnx_ir.Value | None = None
    query_scale: onnx_ir.Value | None = None
    query_scaling: str = "absent"
    key_scale: onnx_ir.Value | None = None
    key_scaling: str = "absent"
    turned_scale: onnx_ir.Value | None = None
    turned_scaling: str = "absent"
    score_scale: onnx_ir.Value | None = None
    score_scaling: str = "absent"
    cap: onnx_ir.Value | None = None
    cap_spelling: str = "none"
    uncap: onnx_ir.Value | None = None
    early_bias: onnx_ir.Value | None = None
    bias: onnx_ir.Value | None = None
    masking: str = "absent"
    mask: onnx_ir.Value | None = None
    condition: onnx_ir.Value | None = None
    low: onnx_ir.Value | None = None
    floor: onnx_ir.Value | None = None
    widened: onnx_ir.Value | None = None
    late_widened: onnx_ir.Value | None = None

    @classmethod
    def of(cls, found: dict[str, Any]) -> Parts:
        """Return the parts among what a match bound, by name."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: item for name, item in found.items() if name in names and item is not None})

    @property
    def cached(self) -> bool:
        """Return True if there is a KV cache."""
        return self.past_key is not None

    @property
    def outputs(self) -> int:
        """Return the number of outputs of the fused operator: with a cache, also present keys and values."""
        return 3 if self.cached else 1

    @property
    def narrows(self) -> bool:
        """Return True if a model computes scores in fp32, and only weighs 16-bit values by shares cast to 16 bits."""
        halves = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
        return not self.cached and self.query.dtype == onnx_ir.DataType.FLOAT and self.value.dtype in halves

    @property
    def past(self) -> tuple[onnx_ir.Value | None, ...]:
        """Return the cached keys and values, or nothing without a cache."""
        return (self.past_key, self.past_value) if self.cached else ()

    def check(self) -> None:
        """Raise Decline for what looks like attention and is not.

        That is: other axes, other shapes, heads shared in another order, inputs that depend on the grown cache.
        """
        for name, item in (("query", self.query), ("key", self.key), ("value", self.value)):
            if len(dimensions(item) or []) != 4:
                raise Decline(
                    f"the {name} {item.name} {dimensions(item)} does not have four axes [batch, heads, seq, d]"
                )
        if self.axis % 4 != 3:
            raise Decline(f"the softmax runs over axis {self.axis}, not over the columns")
        if self.cached and self.along % 4 != 2:
            raise Decline(f"the cache is joined along axis {self.along}, not along the positions")
        if self.cached and self.key_layout != "bhsd":
            raise Decline(f"the cached keys are in the order {self.key_layout}, not [batch, heads, seq, d]")
        if self.query.dtype != self.value.dtype and not self.narrows:
            raise Decline(f"queries are {self.query.dtype}, values {self.value.dtype}")
        self._check_groups()
        self._check_lengths()
        self._check_cycle()

    def _check_lengths(self) -> None:
        """Raise Decline where the spelled-out form broadcasts, or may do so, and the operator would not.

        Products and sums broadcast on any axis. The operator broadcasts heads only, and a mask over batch and heads. So
        lengths must be known to be equal, except for the width, over which a product sums up.
        """
        query, key, value, y = (dimensions(item) or [] for item in (self.query, self.key, self.value, self.y))
        key = [key[axis] for axis in _TO_BHSD[self.key_layout]]
        seq = _TO_BHSD[self.key_layout][2]
        batches = all(same_length(self.key, 0, item, 0) for item in (self.query, self.value))
        if not batches or not same(key[1:2], value[1:2]) or not may_be_same(key[3:], query[3:]):
            raise Decline(f"queries {query}, keys {key} and values {value} are not known to be of one batch and width")
        if not same_length(self.key, seq, self.value, 2):
            raise Decline(f"keys {key} and values {value} are not known to be of one length")
        if not may_be_same(y, [*query[:3], value[3]]):
            raise Decline(f"{self.y.name} is {y}, broadcast from queries {query} and values {value}")
        if self.key_groups is None and key[1] not in (1, query[1]):
            raise Decline(f"{query[1]} query heads read {key[1]} key heads")
        pasts = [item for item in self.past if item is not None]
        if self.cached and not same_length(pasts[0], 2, pasts[1], 2):
            keys, values = map(dimensions, pasts)
            raise Decline(f"the cached keys are {keys}, the cached values {values}, perhaps of other lengths")

    def _check_cycle(self) -> None:
        """Raise Decline if something that the operator reads depends on the grown cache.

        The operator itself gives the grown cache, so this would be a cycle.
        """
        needed = [self.query, self.key, self.value, self.mask, self.bias, self.early_bias, self.condition, *self.past]
        targets = {item.producer() for item in needed if item is not None} - {None}
        joined = [item for item in (self._joined(self.key), self._joined(self.value)) if item is not None]
        work, seen = [use.node for item in joined for use in item.uses()], {self.y.producer()}
        while work and self.cached:
            node = work.pop()
            if node in targets:
                raise Decline(f"{node.name} is read, and depends on the cache as this step leaves it")
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > _FURTHEST:
                raise Decline(f"more than {_FURTHEST} operators depend on the cache as this step leaves it")
            work += [use.node for output in node.outputs for use in output.uses()]

    def _joined(self, new: onnx_ir.Value) -> onnx_ir.Value | None:
        """Return the Concat of the cache with the new keys or values; None if there is none."""
        past = {self.past_key, self.past_value}
        nodes = [use.node for use in new.uses() if use.node.op_type == "Concat" and use.node.inputs[0] in past]
        return nodes[0].outputs[0] if nodes else None

    def _check_groups(self) -> None:
        """Raise Decline unless query head i reads key head i // groups.

        That is so if each key head stands `groups` times in a row.
        """
        if (self.key_groups is None) != (self.value_groups is None):
            raise Decline("only one of keys and values is repeated for the heads that share it")
        for spread, repeated in ((self.key_groups, self.key_repeated), (self.value_groups, self.value_repeated)):
            if spread is None or repeated is None:
                continue
            wide, flat = dimensions(spread) or [], dimensions(repeated) or []
            if len(wide) != 5 or len(flat) != 4 or not all(isinstance(dim, int) for dim in (wide[1], wide[2], flat[1])):
                raise Decline(f"{repeated.name} {flat} does not come from repeated heads {wide}")
            if wide[1] * wide[2] != flat[1] or flat[1] != (dimensions(self.query) or [])[1]:  # type: ignore[operator]
                raise Decline(f"{wide[1]} heads, each {wide[2]} times, are not the heads of {self.query.name}")
            once = dimensions(spread.producer().inputs[0]) or []  # type: ignore[union-attr, arg-type]
            if not same([once[0], *once[3:]], [wide[0], *wide[3:]]) or not same(
                [flat[0], *flat[2:]], [wide[0], *wide[3:]]
            ):
                raise Decline(f"{repeated.name} {flat} may have other axes than the repeated heads {wide} of {once}")

    def plain_key(self, op: Rewriter) -> onnx_ir.Value:
        """Return the keys of this step as [b, h_kv, kv, d]."""
        if self.key_layout == "bhsd":
            return self.key
        turned: onnx_ir.Value = op.Transpose(self.key, perm=_TO_BHSD[self.key_layout])
        return turned

    def wide_query(self, op: Rewriter) -> onnx_ir.Value:
        """Return the queries, repeated where a mask of several rows makes several rows of one query.

        Sums broadcast, and the operator does not. Raises Decline if a mask may make more batches or heads.
        """
        wide = self.query
        for term in (self.mask, self.bias, self.early_bias, self.condition):
            grown = self._grown_axes(term) if term is not None else []
            if {0, 1} & set(grown):
                raise Decline(
                    f"the mask {term.name} {dimensions(term)} may make more batches or heads than "  # type: ignore[arg-type, union-attr]
                    f"{self.query.name} {dimensions(self.query)} has"
                )
            if grown:
                wide = op.Expand(wide, op.Concat([1, 1], op.Shape(term, start=-2, end=-1), [1], axis=0))
        return wide

    def _grown_axes(self, term: onnx_ir.Value) -> list[int]:
        """Return the axes of batch, heads and rows that are longer in the sum with a mask than in the queries.

        That is possible where a length of the queries may be 1, and neither the mask nor the stated result denies it.
        """
        dims, query, y = dimensions(term), dimensions(self.query) or [], dimensions(self.y) or []
        if dims is None:
            raise Decline(f"the axes of the mask {term.name} are unknown")
        dims = [*[1] * (4 - len(dims)), *dims]
        may_be_one = [not isinstance(length, int) or length == 1 for length in query[:3]]
        denied = [known is not None and known in (1, here) for known, here in zip(dims, query)]
        stated = [here is not None and here == there for here, there in zip(query, y)]
        return [axis for axis in range(3) if may_be_one[axis] and not denied[axis] and not stated[axis]]

    def rows_and_columns(self, op: Rewriter, query: onnx_ir.Value) -> Extent:
        """Return the lengths that the mask must have for these queries."""
        seq = _TO_BHSD[self.key_layout][2]
        rows, new = (dimensions(query) or [None] * 4)[2], (dimensions(self.key) or [])[seq]
        joined = self._joined(self.key) if self.cached else None

        def lengths() -> onnx_ir.Value:
            columns = op.Shape(self.key, start=seq, end=seq + 1)
            if self.past_key is not None:
                columns = op.Add(op.Shape(self.past_key, start=2, end=3), columns)
            made: onnx_ir.Value = op.Concat(op.Shape(query, start=2, end=3), columns, axis=0)
            return made

        return Extent(rows, (dimensions(joined) or [None] * 4)[2] if joined is not None else new, lengths)

    def check_hidden_rows(self, op: Rewriter, hidden_rows: str) -> None:
        """Raise Decline if a number takes the place of scores, and rows that see nothing would get other values.

        Put in place of scores, -1e4 hides them, and a row of nothing else is the mean of its values. But if something
        is added beside, which may hide what was left, such a row depends on scores that the operator does not have.
        The lowest number and -inf are exact, because they swallow what is added.
        """
        others = [item for item in (self.early_bias, self.bias, self.mask) if item is not None]
        if self.condition is None or not others or hidden_rows == "any":
            return
        low = op.number(self.low)
        assert self.low is not None
        if np.isneginf(low) or low <= lowest(self.low) or self._sees_something(low, others):
            return
        raise Decline(
            f"{op.number(self.low):g} takes the place of scores beside the mask {others[-1].name}; a row that sees "
            f"nothing would change, which hidden_rows=any accepts"
        )

    def _sees_something(self, low: float, others: Sequence[onnx_ir.Value]) -> bool:
        """Return True if the masks are constants by which every row sees a column that outweighs all hidden ones."""
        arrays = [small_constant(item) for item in (self.condition, *others) if item is not None]
        known = [array for array in arrays if array is not None]
        if len(known) != len(arrays) or any(array.size == 0 for array in known):
            return False
        shown = known[0] if self.masking.startswith("shown") else ~known[0]
        added = sum(array.astype(np.float64) for array in known[1:])
        shown, added = np.broadcast_arrays(shown, added)
        seen = np.where(shown, added, -np.inf).max(-1, keepdims=True)
        hidden = np.where(shown, -np.inf, low + added).max(-1, keepdims=True)
        return bool((seen + low / 2 >= hidden).all())

    @property
    def heads(self) -> int:
        """Return the number of query heads, or 0 if it is unknown."""
        heads = (dimensions(self.query) or [])[1]
        return heads if isinstance(heads, int) else 0

    def added(self, op: Rewriter) -> tuple[AlibiBias | None, list[onnx_ir.Value], list[onnx_ir.Value]]:
        """Return what is added to the scores: an ALiBi bias, the terms beside it, and all terms.

        A choice between scores and a low number becomes such a term. What is added before the choice is chosen with the
        scores, because a number in place of a score forgets it: -inf would come through a sum. ALiBi is finite, and
        stays apart. Raises Decline if the low number is too high to mask.
        """
        for name, item in (("low", self.low), ("floor", self.floor)):
            if item is not None and not op.number(item) <= _MASKED:
                raise Decline(f"{name} scores are {op.number(item)}, which does not mask anything")
        before = [self._scaled_bias(op)] if self.early_bias is not None else []
        before += [self.bias] if self.bias is not None else []
        after = [self.mask] if self.mask is not None else []
        if self.condition is None:
            terms = before + after
            return *split_alibi(op, terms, self.heads), terms
        alibi, inner = split_alibi(op, before, self.heads)
        shown = self.masking.startswith("shown")
        choice = chosen(op, self.condition, op.number(self.low), summed(op, inner), shown=shown, query=self.query)
        terms = [choice, *after]
        if alibi is None:
            return *split_alibi(op, terms, self.heads), terms
        if after:
            raise Decline("adds an ALiBi bias, chooses scores by one mask, and adds another")
        return alibi, terms, []

    def _scaled_bias(self, op: Rewriter) -> onnx_ir.Value:
        """Return the bias that is added before the scores are scaled, scaled like them."""
        if self.cap is not None:
            raise Decline("adds a bias before the scores are capped; the operator adds it after")
        if self.widened is not None:
            raise Decline("adds a bias before the scores are widened")
        if self.score_scaling == "absent":
            assert self.early_bias is not None
            return self.early_bias
        scale = op.Mul if self.score_scaling == "product" else op.Div
        made: onnx_ir.Value = scale(self.early_bias, op.number(self.score_scale))
        return made

    def total_scale(self, op: Rewriter) -> float:
        """Return the number by which the scores are multiplied, on all sides together.

        Raises Decline unless it is above 0 and finite.
        """
        scale = 1.0
        for factor, spelling in (
            (self.query_scale, self.query_scaling),
            (self.key_scale, self.key_scaling),
            (self.turned_scale, self.turned_scaling),
            (self.score_scale, self.score_scaling),
        ):
            number = op.number(factor, 1.0)
            if spelling == "quotient":
                number = 1 / number if number else math.inf
            scale *= number
        if not 0 < scale < math.inf:
            raise Decline(f"the scores are scaled by {scale:g}; the operator takes what is above 0")
        return scale

    def softcap(self, op: Rewriter) -> float:
        """Return the soft cap of the scores, or 0 without one.

        Raises Decline unless the scores are divided by the same number that their tanh is multiplied by.
        """
        if self.cap is None:
            return 0.0
        inside, outside = op.number(self.cap), op.number(self.uncap)
        if self.cap_spelling == "product":
            inside = 1 / inside if inside else math.inf
        if not 0 < inside < math.inf or abs(inside - outside) > 1e-5 * outside:
            raise Decline(f"divides the scores by {inside:g}, and multiplies their tanh by {outside:g}")
        return outside
