"""Fuse scores, mask, softmax and values into one operator, with the KV cache as past and present (fuse-attention)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import onnx_ir

from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.fusion.attention_masks import alibi_mask, visible_mask
from passopt.passes.fusion.attention_parts import Parts
from passopt.passes.fusion.cache_lengths import lengths_of_parts, shape_of_joined
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Give targets attention as one operator: with it, a KV cache can be updated in place and scores need no memory.

    Before: ``y = MatMul(Softmax(Add(Mul(MatMul(q, Transpose(k)), scale), mask)), v)``, k, v = Concat(past, new)
    After:  ``y, k, v = Attention(q, new_k, new_v, mask, past_k, past_v, scale=scale)``; with slopes · positions in the
            mask, ``y, k, v = passopt.AlibiAttention(q, new_k, new_v, slopes, positions, mask, past_k, past_v)``
    Heads that share keys (GQA) are no longer repeated; without a cache, past and present are absent. Masked scores stay
    above the lowest number: for a row of nothing else, Attention gives 0, but softmax the mean of its values. A row
    of nothing but -inf, where softmax gives NaN, becomes 0.

    Where a number such as -1e4 takes the place of scores, and another mask is added, as in GPT-2, a row that sees
    nothing, such as one of padding, has a value that no operator gives. So that is declined unless the masks are
    constants that prove otherwise; `hidden_rows=any` fuses it, and changes such rows.
    """

    hidden_rows: Literal["exact", "any"] = "exact"

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
            (self.shape_of_joined, self.rewrite_shape),
            (self.with_cache, self.rewrite_spelled_out),
            (self.without_cache, self.rewrite_spelled_out),
            (self.exported, self.rewrite_exported),
            (self.exported_without_cache, self.rewrite_exported),
        ]

    def shape_of_joined(self, op: Any, past: Any, new: Any, along: Any, left: Any) -> Any:
        """Match the shape of a grown cache, or of scores, from which a mask is made."""
        return shape_of_joined(op, past, new, along, left)

    def rewrite_shape(self, op: Rewriter, **found: Any) -> Any:
        names = ("past", "new", "along", "joined", "shape", "left", "perm", "start", "end")
        return lengths_of_parts(op, **{name: found[name] for name in names if found.get(name) is not None})

    def with_cache(self, op: Any, past_key: Any, key: Any, past_value: Any, value: Any, along: Any) -> Any:
        """Match attention to a KV cache that is joined with the keys and values of this step."""
        keys = op.Concat(past_key, key, axis=along)
        values = op.Concat(past_value, value, axis=along)
        return [attention(op, keys, values), keys, values]

    def without_cache(self, op: Any, key: Any, value: Any) -> Any:
        """Match attention without a cache, in a prefill or where something else joins the cache."""
        return attention(op, key, value)

    def exported(self, op: Any, query: Any, past_key: Any, key: Any, past_value: Any, value: Any, along: Any) -> Any:
        """Match an exporter's Attention, with the cache joined and shared heads repeated outside of it."""
        keys = op.Concat(past_key, key, axis=along)
        values = op.Concat(past_value, value, axis=along)
        inputs = (query, _heads(op, "key", keys), _heads(op, "value", values), op.maybe(op.variable("mask")))
        return [op.Attention(*inputs, is_causal=0, bind="y"), keys, values]

    def exported_without_cache(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        """Match an exporter's Attention without a cache, with shared heads repeated outside of it."""
        inputs = (query, _repeated(op, "key", key), _repeated(op, "value", value), op.maybe(op.variable("mask")))
        return op.Attention(*inputs, is_causal=op.variable("is_causal"), bind="y")

    def rewrite_exported(self, op: Rewriter, **found: Any) -> Any:
        parts = Parts.of(found)
        parts.check()
        attributes = {name: item.value for name, item in parts.y.producer().attributes.items()}  # type: ignore[union-attr]
        return op.Attention(
            parts.query, parts.key, parts.value, parts.mask, *parts.past, outputs=parts.outputs, **attributes
        )

    def rewrite_spelled_out(self, op: Rewriter, **found: Any) -> Any:
        op.require_opset()
        parts = Parts.of(found)
        parts.check()
        scale, softcap = parts.total_scale(op), parts.softcap(op)
        query, key, value, outputs = parts.wide_query(op), parts.plain_key(op), parts.value, parts.outputs
        parts.check_hidden_rows(op, self.hidden_rows)
        floored = parts.floor is not None
        alibi, others, terms = parts.added(op)
        # AlibiAttention floors all scores alike. Without a floor, one of several masks may reach -inf and another not.
        if alibi is not None and (floored or len(others) < 2):
            if softcap:
                raise Decline("caps the scores and adds an ALiBi bias; no operator does both")
            beside = alibi_mask(op, others, parts.rows_and_columns(op, query))
            inputs = (query, key, value, alibi.slopes, alibi.positions, beside, *parts.past)
            kind = ALIBI_ATTENTION if parts.cached else ALIBI_ATTENTION_NO_CACHE
            return op.node(kind, *inputs, outputs=outputs, domain=DOMAIN, scale=scale)
        mask = visible_mask(op, terms, parts.rows_and_columns(op, query), floored=floored)
        attributes = {"scale": scale, **({"softcap": softcap} if softcap else {})}
        if parts.widened is not None or parts.late_widened is not None:
            attributes["softmax_precision"] = onnx_ir.DataType.FLOAT.value
        if not parts.narrows:
            return op.Attention(query, key, value, mask, *parts.past, outputs=outputs, **attributes)
        wide = op.CastLike(value, query)
        return op.CastLike(op.Attention(query, key, wide, mask, **attributes), value)


def attention(op: Any, keys: Any, values: Any) -> Any:
    """Return the pattern of softmax(q · kᵀ · scale + mask) · v, from [b, h, q, d] to [b, h, q, d], in all spellings."""
    scores = _masked(op, _widened(op, _capped(op, _scaled(op, "score", _early_biased(op, _products(op, keys))))))
    probabilities = op.Softmax(scores, axis=op.variable("axis"))
    guarded = op.optional("guard", probabilities, lambda p: op.Where(op.IsNaN(p), 0, p))
    narrowed = op.optional("narrowing", guarded, op.Cast)
    return op.MatMul(narrowed, _heads(op, "value", values), bind="y")


def _products(op: Any, keys: Any) -> Any:
    """Return the pattern of q · kᵀ: torch scales both sides by √scale, other exporters the query alone.

    A side may be multiplied or divided, the keys also before they are turned.
    """
    shared = _scaled(op, "key", _heads(op, "key", keys))
    turned = op.any_of(
        "key_layout",
        bhsd=op.Transpose(shared, perm=[0, 1, 3, 2]),
        bshd=op.Transpose(keys, perm=[0, 2, 3, 1]),
        bhds=shared,
    )
    return op.MatMul(_scaled(op, "query", op.variable("query")), _scaled(op, "turned", turned))


def _heads(op: Any, name: str, x: Any) -> Any:
    """Return the pattern of keys or values, repeated for the query heads that share them or one for each head."""
    return op.any_of(f"{name}_heads", repeated=_repeated(op, name, x), own=x)


def _repeated(op: Any, name: str, x: Any) -> Any:
    """Return the pattern of keys or values that are repeated for the query heads that share them."""
    spread = op.Expand(op.Unsqueeze(x, [2]), op.anything(), bind=f"{name}_groups")
    return op.Reshape(spread, op.anything(), bind=f"{name}_repeated")


def _scaled(op: Any, name: str, x: Any) -> Any:
    """Add an optional scale to the pattern, as a product or a quotient."""
    factor = op.scalar(f"{name}_scale")
    return op.any_of(f"{name}_scaling", product=op.Mul(x, factor), quotient=op.Div(x, factor), absent=x)


def _early_biased(op: Any, x: Any) -> Any:
    """Add an optional bias to the pattern that is scaled with the scores, as a Conformer's relative positions are."""
    return op.optional("early_biasing", x, lambda y: op.Add(y, op.variable("early_bias")))


def _capped(op: Any, x: Any) -> Any:
    """Add an optional soft cap to the pattern: cap · tanh(x / cap)."""
    cap = op.scalar("cap")
    inner = op.any_of("cap_spelling", quotient=op.Div(x, cap), product=op.Mul(x, cap))
    return op.optional("capping", x, lambda _: op.Mul(op.Tanh(inner), op.scalar("uncap")))


def _widened(op: Any, x: Any) -> Any:
    """Add an optional Cast to the pattern.

    A half-precision model casts its scores to fp32 before the mask or before the softmax.
    """
    return op.optional("widening", x, lambda y: op.Cast(y, bind="widened"))


def _masked(op: Any, x: Any) -> Any:
    """Add an optional bias (ALiBi) and an optional mask to the pattern, then the lowest number as an optional floor.

    The mask is added, or chosen by a condition; GPT-2 chooses by one mask, and adds another.
    """
    biased = op.optional("biasing", x, lambda y: op.Add(y, op.variable("bias")))
    condition, low = op.variable("condition"), op.scalar("low")
    shown, hidden = op.Where(condition, biased, low), op.Where(condition, low, biased)
    masked = op.any_of(
        "masking",
        added=op.Add(biased, op.variable("mask")),
        shown=shown,
        hidden=hidden,
        shown_added=op.Add(shown, op.variable("mask")),
        hidden_added=op.Add(hidden, op.variable("mask")),
        absent=biased,
    )
    floored = op.optional("flooring", masked, lambda y: op.Max(y, op.scalar("floor")))
    return op.optional("late_widening", floored, lambda y: op.Cast(y, bind="late_widened"))
