"""fuse-attention: scores, mask, softmax and values in one operator, with the KV cache as past and present."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.ir.shapes import dimensions
from passopt.passes.attention_masks import alibi_mask, chosen, split_alibi, visible_mask
from passopt.passes.base import REASSOCIATED, Decline
from passopt.passes.fusing import number, require_opset
from passopt.passes.rewriting import RewritePass

#: Scores at or below this are masked, whatever number an exporter chose.
_MASKED = -1e4
#: How many operators may read the joined keys and values, such as their lengths, before a rewrite is given up.
_FURTHEST = 200


@dataclasses.dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Give targets attention as one operator: with it, a KV cache can be updated in place and scores need no memory.

    Before: ``y = MatMul(Softmax(Add(Mul(MatMul(q, Transpose(k)), scale), mask)), v)``, k, v = Concat(past, new)
    After:  ``y, k, v = Attention(q, new_k, new_v, mask, past_k, past_v, scale=scale)``; with slopes · positions in the
            mask, ``y, k, v = passopt.AlibiAttention(q, new_k, new_v, slopes, positions, mask, past_k, past_v)``
    Heads that share keys (GQA) are no longer repeated; without a cache, past and present are absent. Masked scores stay
    above the lowest number: Attention gives 0 for a row of nothing else, softmax the mean of its values.
    """

    name = "fuse-attention"
    accuracy = REASSOCIATED
    after = ("legalize", "canonicalize", "cse", "dematerialize-alibi", "dematerialize-alibi-row", "fuse-rotary")
    makes: ClassVar[tuple[str, ...]] = (
        "Attention",
        f"{DOMAIN}::{ALIBI_ATTENTION}",
        f"{DOMAIN}::{ALIBI_ATTENTION_NO_CACHE}",
    )

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [
            (self.with_cache, self.rewrite_spelled_out),
            (self.without_cache, self.rewrite_spelled_out),
            (self.exported, self.rewrite_exported),
            (self.exported_without_cache, self.rewrite_exported),
        ]

    def with_cache(self, op: Any, past_key: Any, key: Any, past_value: Any, value: Any, along: Any) -> Any:
        """What is attended to is the cache, with the keys and values of this step behind it."""
        keys = op.Concat(past_key, key, axis=along)
        values = op.Concat(past_value, value, axis=along)
        return [attention(op, keys, values), keys, values]

    def without_cache(self, op: Any, key: Any, value: Any) -> Any:
        """Prefill only, or a cache that something else joins."""
        return attention(op, key, value)

    def exported(self, op: Any, query: Any, past_key: Any, key: Any, past_value: Any, value: Any, along: Any) -> Any:
        """An Attention that an exporter wrote, with the cache joined and shared heads repeated outside of it."""
        keys = op.Concat(past_key, key, axis=along)
        values = op.Concat(past_value, value, axis=along)
        inputs = (query, _heads(op, "key", keys), _heads(op, "value", values), op.maybe(op.variable("mask")))
        return [op.Attention(*inputs, is_causal=0, bind="y"), keys, values]

    def exported_without_cache(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        """The same, where only the repetition of shared heads is left to take in."""
        inputs = (query, _repeated(op, "key", key), _repeated(op, "value", value), op.maybe(op.variable("mask")))
        return op.Attention(*inputs, is_causal=op.variable("is_causal"), bind="y")

    def rewrite_exported(self, op: Any, **found: Any) -> Any:
        parts = Parts.of(found)
        parts.check()
        attributes = {name: item.value for name, item in parts.y.producer().attributes.items()}  # type: ignore[union-attr]
        return op.Attention(
            parts.query, parts.key, parts.value, parts.mask, *parts.past, outputs=parts.outputs, **attributes
        )

    def rewrite_spelled_out(self, op: Any, **found: Any) -> Any:
        require_opset(op)
        parts = Parts.of(found)
        parts.check()
        scale, softcap = _scale(op, parts), _softcap(op, parts)
        query, key, value, outputs = parts.query, parts.plain_key(op), parts.value, parts.outputs
        alibi, terms = split_alibi(op, parts.bias_terms(op), parts.heads)
        if alibi is not None:
            if softcap:
                raise Decline("caps the scores and adds an ALiBi bias; no operator does both")
            inputs = (query, key, value, alibi.slopes, alibi.positions, alibi_mask(op, terms, query), *parts.past)
            kind = ALIBI_ATTENTION if parts.cached else ALIBI_ATTENTION_NO_CACHE
            return op.node(kind, *inputs, outputs=outputs, domain=DOMAIN, scale=scale)
        mask = visible_mask(op, terms, query, floored=parts.floor is not None)
        attributes = {"scale": scale, **({"softcap": softcap} if softcap else {})}
        if parts.widened is not None or parts.late_widened is not None:
            attributes["softmax_precision"] = onnx_ir.DataType.FLOAT.value
        return op.Attention(query, key, value, mask, *parts.past, outputs=outputs, **attributes)


def attention(op: Any, keys: Any, values: Any) -> Any:
    """The spellings of softmax(q · kᵀ · scale + mask) · v, from [b, h, q, d] to [b, h, q, d]."""
    scores = _masked(op, _widened(op, _capped(op, _scaled(op, _products(op, keys)))))
    probabilities = op.Softmax(scores, axis=op.variable("axis"))
    guarded = op.optional("guard", probabilities, lambda p: op.Where(op.IsNaN(p), 0, p))
    narrowed = op.optional("narrowing", guarded, op.Cast)
    return op.MatMul(narrowed, _heads(op, "value", values), bind="y")


def _products(op: Any, keys: Any) -> Any:
    """q · kᵀ; torch scales both sides by √scale, others the query alone."""
    query = op.variable("query")
    shared = _heads(op, "key", keys)
    turned = op.any_of(
        "key_layout", bhsd=op.Transpose(shared, perm=[0, 1, 3, 2]), bshd=op.Transpose(keys, perm=[0, 2, 3, 1])
    )
    left = op.optional("query_scaling", query, lambda x: op.Mul(x, op.scalar("query_scale")))
    right = op.optional("key_scaling", turned, lambda x: op.Mul(x, op.scalar("key_scale")))
    return op.MatMul(left, right)


def _heads(op: Any, name: str, x: Any) -> Any:
    """Keys or values, each repeated for the query heads that share them, or one for each."""
    return op.any_of(f"{name}_heads", repeated=_repeated(op, name, x), own=x)


def _repeated(op: Any, name: str, x: Any) -> Any:
    spread = op.Expand(op.Unsqueeze(x, [2]), op.anything(), bind=f"{name}_groups")
    return op.Reshape(spread, op.anything(), bind=f"{name}_repeated")


def _scaled(op: Any, x: Any) -> Any:
    factor = op.scalar("scale")
    return op.any_of("scaling", product=op.Mul(x, factor), quotient=op.Div(x, factor), none=x)


def _capped(op: Any, x: Any) -> Any:
    """A soft cap: cap · tanh(x / cap)."""
    cap = op.scalar("cap")
    inner = op.any_of("cap_spelling", quotient=op.Div(x, cap), product=op.Mul(x, cap))
    return op.optional("capping", x, lambda _: op.Mul(op.Tanh(inner), op.scalar("uncap")))


def _widened(op: Any, x: Any) -> Any:
    """A half-precision model casts its scores to fp32 before the mask or before the softmax."""
    return op.optional("widening", x, lambda y: op.Cast(y, bind="widened"))


def _masked(op: Any, x: Any) -> Any:
    """A bias (ALiBi) and a mask, added or chosen; then the lowest number as a floor."""
    biased = op.optional("biasing", x, lambda y: op.Add(y, op.variable("bias")))
    condition, low = op.variable("condition"), op.scalar("low")
    masked = op.any_of(
        "masking",
        added=op.Add(biased, op.variable("mask")),
        shown=op.Where(condition, biased, low),
        hidden=op.Where(condition, low, biased),
        none=biased,
    )
    floored = op.optional("flooring", masked, lambda y: op.Max(y, op.scalar("floor")))
    return op.optional("late_widening", floored, lambda y: op.Cast(y, bind="late_widened"))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a match found, by the names in the pattern; None for what the spelling does not have.

    query [b, h, q, d]; key and value [b, h_kv, kv, d] of this step, as [b, kv, h_kv, d] in layout "bshd"; past_key and
    past_value [b, h_kv, p, d]; mask and bias are added to scores [b, h, q, p + kv].
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
    key_scale: onnx_ir.Value | None = None
    scaling: str = "none"
    scale: onnx_ir.Value | None = None
    cap: onnx_ir.Value | None = None
    cap_spelling: str = "none"
    uncap: onnx_ir.Value | None = None
    bias: onnx_ir.Value | None = None
    masking: str = "none"
    mask: onnx_ir.Value | None = None
    condition: onnx_ir.Value | None = None
    low: onnx_ir.Value | None = None
    floor: onnx_ir.Value | None = None
    widened: onnx_ir.Value | None = None
    late_widened: onnx_ir.Value | None = None

    @classmethod
    def of(cls, found: dict[str, Any]) -> Parts:
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: item for name, item in found.items() if name in names and item is not None})

    @property
    def cached(self) -> bool:
        return self.past_key is not None

    @property
    def outputs(self) -> int:
        return 3 if self.cached else 1

    @property
    def past(self) -> tuple[onnx_ir.Value | None, ...]:
        return (self.past_key, self.past_value) if self.cached else ()

    def check(self) -> None:
        """Decline what looks like attention and is none: other axes, other shapes, heads shared in another order."""
        for name, item in (("query", self.query), ("key", self.key), ("value", self.value)):
            if len(dimensions(item) or []) != 4:
                raise Decline(
                    f"the {name} {item.name} {dimensions(item)} does not have four axes [batch, heads, seq, d]"
                )
        if self.axis % 4 != 3:
            raise Decline(f"the softmax runs over axis {self.axis}, not over the columns")
        if self.cached and self.along % 4 != 2:
            raise Decline(f"the cache is joined along axis {self.along}, not along the positions")
        if self.cached and self.key_layout == "bshd":
            raise Decline("the cached keys are [batch, seq, heads, d]")
        if self.query.dtype != self.value.dtype:
            raise Decline(f"queries are {self.query.dtype}, values {self.value.dtype}")
        self._check_groups()
        self._check_cycle()

    def _check_cycle(self) -> None:
        """The operator gives the grown cache, so nothing that it reads may depend on that."""
        needed = [self.query, self.key, self.value, self.mask, self.bias, self.condition]
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
        """The Concat of the cache and what is new."""
        past = {self.past_key, self.past_value}
        nodes = [use.node for use in new.uses() if use.node.op_type == "Concat" and use.node.inputs[0] in past]
        return nodes[0].outputs[0] if nodes else None

    def _check_groups(self) -> None:
        """Query head i must read key head i // groups: each key head stands `groups` times in a row."""
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

    def plain_key(self, op: Any) -> onnx_ir.Value:
        """The keys of this step as [b, h_kv, kv, d]."""
        if self.key_layout == "bhsd":
            return self.key
        turned: onnx_ir.Value = op.Transpose(self.key, perm=[0, 2, 1, 3])
        return turned

    @property
    def heads(self) -> int:
        heads = (dimensions(self.query) or [])[1]
        return heads if isinstance(heads, int) else 0

    def bias_terms(self, op: Any) -> list[onnx_ir.Value]:
        """What is added to the scores; a choice between scores and a low number becomes such a term."""
        for name, item in (("low", self.low), ("floor", self.floor)):
            if item is not None and not number(op, item) <= _MASKED:
                raise Decline(f"{name} scores are {number(op, item)}, which does not mask anything")
        terms = [term for term in (self.bias, self.mask) if term is not None]
        if self.condition is not None:
            terms.append(chosen(op, self.condition, number(op, self.low), shown=self.masking == "shown"))
        return terms


def _scale(op: Any, parts: Parts) -> float:
    factor = number(op, parts.scale, 1.0)
    own = 1 / factor if parts.scaling == "quotient" else factor
    return number(op, parts.query_scale, 1.0) * number(op, parts.key_scale, 1.0) * own


def _softcap(op: Any, parts: Parts) -> float:
    """0 without a cap. Declines unless the scores are divided by what the tanh is multiplied with."""
    if parts.cap is None:
        return 0.0
    inside, outside = number(op, parts.cap), number(op, parts.uncap)
    cap = inside if parts.cap_spelling == "quotient" else 1 / inside
    if abs(cap - outside) > 1e-5 * outside:
        raise Decline(f"divides the scores by {cap}, and multiplies their tanh by {outside}")
    return outside
