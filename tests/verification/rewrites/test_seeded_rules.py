"""Wrong replacements of rules are caught rewrite by rewrite, and right ones of the same patterns raise no alarm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, Accuracy
from passopt.verification.rewrites.check import Violation


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern in a graph, and what replaces it wrongly and rightly; values inside are named as parameters."""

    name: str
    text: str
    pattern: Callable[..., Any]
    wrong: Callable[..., Any]
    right: Callable[..., Any]
    accuracy: Accuracy = EXACT


def ints(*values):
    return np.array(values, np.int64)


def _norm(op, x, mean, eps):
    centred = op.Sub(x, mean)
    return op.Div(centred, op.Sqrt(op.Add(op.ReduceMean(op.Mul(centred, centred), [-1]), eps)))


def _ones(op):
    return np.ones(6, np.float32)


LINEAR = (
    "(float[n,4] x) => (float[n,3] y) <float[4,3] w = random, float[3] b = random> { p = MatMul(x, w) y = Add(p, b) }"
)
RULES = [
    Rule(
        "shapes as values: another length as the target of a Reshape",
        "(float[n,m,3] x) => (float[n,k] y) <int64[1] rest = {-1}, int64[1] zero = {0}, int64 first = {0}> "
        "{ s = Shape(x) a = Gather(s, first) b = Unsqueeze(a, zero) t = Concat <axis = 0> (b, rest) "
        "y = Reshape(x, t) }",
        lambda op, x, t: op.Reshape(x, op.Concat(op.Unsqueeze(op.Gather(op.Shape(x), 0), [0]), t, axis=0)),
        lambda op, x, t: op.Reshape(x, op.Concat(op.Shape(x, start=1, end=2), t, axis=0)),
        lambda op, x, t: op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), t, axis=0)),
    ),
    Rule(
        "shapes as values: an Expand that is needed, dropped",
        "(float[1,m] x, float[n,m] z) => (float[n,m] y) { s = Shape(z) e = Expand(x, s) y = Mul(e, e) }",
        lambda op, x, s: op.Expand(x, s),
        lambda op, x, s: op.Identity(x),
        lambda op, x, s: op.Add(x, op.ConstantOfShape(s)),
    ),
    Rule(
        "masks: what is hidden and what is seen, swapped",
        "(float[b,q,t] x, bool[b,1,t] mask) => (float[b,q,t] y) <float low = {-10000}> "
        "{ w = Where(mask, x, low) y = Softmax(w) }",
        lambda op, m, x, low: op.Softmax(op.Where(m, x, low), axis=-1),
        lambda op, m, x, low: op.Softmax(op.Where(op.Not(m), x, low), axis=-1),
        lambda op, m, x, low: op.Exp(op.LogSoftmax(op.Where(op.Not(m), low, x), axis=-1)),
        REASSOCIATED,
    ),
    Rule(
        "masks: rows that see nothing become NaN",
        "(float[b,q,t] x, bool[b,1,t] mask) => (float[b,q,t] y) <float low = {-10000}> "
        "{ w = Where(mask, x, low) y = Softmax(w) }",
        lambda op, m, x, low: op.Softmax(op.Where(m, x, low), axis=-1),
        lambda op, m, x, low: op.Softmax(op.Where(m, x, np.float32(-np.inf)), axis=-1),
        lambda op, m, x, low: op.Exp(op.LogSoftmax(op.Where(m, x, np.float32(-10000)), axis=-1)),
        REASSOCIATED,
    ),
    Rule(
        "casts: a narrow one between, dropped",
        "(int32[n] x) => (int32[n] y) { a = Cast <to = 3> (x) b = Cast <to = 6> (a) y = Neg(b) }",
        lambda op, x: op.Cast(op.Cast(x, to=3), to=6),
        lambda op, x: op.Identity(x),
        lambda op, x: op.Cast(op.Cast(op.Cast(x, to=3), to=7), to=6),
    ),
    Rule(
        "casts: rounding for truncation",
        "(float[n] x) => (int64[n] y) { y = Cast <to = 7> (x) }",
        lambda op, x: op.Cast(x, to=7),
        lambda op, x: op.Cast(op.Floor(x), to=7),
        lambda op, x: op.CastLike(x, ints(0)),
    ),
    Rule(
        "lengths: a mean divided by the length of another axis",
        "(float[n,m] x) => (float[n] y) <int64[1] one = {1}, int64 first = {1}> "
        "{ r = ReduceSum <keepdims = 0> (x, one) s = Shape(x) l = Gather(s, first) f = Cast <to = 1> (l) "
        "y = Div(r, f) }",
        lambda op, x: op.Div(op.ReduceSum(x, [1], keepdims=0), op.Cast(op.Gather(op.Shape(x), 1), to=1)),
        lambda op, x: op.Div(op.ReduceSum(x, [1], keepdims=0), op.Cast(op.Squeeze(op.Shape(x, end=1)), to=1)),
        lambda op, x: op.ReduceMean(x, ints(1), keepdims=0),
        REASSOCIATED,
    ),
    Rule(
        "lengths: a bound that no sample may pass",
        "(float[n,3] x) => (float[m,3] y) <int64[1] zero = {0}, int64[1] end = {40}> "
        "{ s = Slice(x, zero, end, zero) y = Neg(s) }",
        lambda op, x, a, b, c: op.Slice(x, a, b, c),
        lambda op, x, a, b, c: op.Identity(x),
        lambda op, x, a, b, c: op.Slice(x, a, b, c, ints(1)),
    ),
    Rule(
        "tables: the last row out of reach",
        "(int64[n] token_ids) => (float[n,2] y) <float[9,2] table = random> { y = Gather(table, token_ids) }",
        lambda op, table, i: op.Gather(table, i, axis=0),
        lambda op, table, i: op.Gather(table, op.Min(i, ints(7)), axis=0),
        lambda op, table, i: op.GatherND(table, op.Unsqueeze(op.Min(i, ints(8)), [1])),
    ),
    Rule(
        "tables: rows counted from one",
        "(int64[n] position_ids) => (float[n,2] y) <float[9,2] table = random> { y = Gather(table, position_ids) }",
        lambda op, table, i: op.Gather(table, i, axis=0),
        lambda op, table, i: op.Gather(table, op.Mod(op.Add(i, ints(1)), ints(9)), axis=0),
        lambda op, table, i: op.GatherND(table, op.Unsqueeze(i, [1])),
    ),
    Rule(
        "norms: the default epsilon",
        "(float[n,6] x) => (float[n,6] y) <int64[1] last = {-1}, float e = {1e-12}> { m = ReduceMean(x, last) "
        "c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, last) a = Add(v, e) s = Sqrt(a) y = Div(c, s) }",
        lambda op, x, eps: _norm(op, x, op.ReduceMean(x, [-1]), eps),
        lambda op, x, eps: op.LayerNormalization(x, _ones(op), axis=-1),
        lambda op, x, eps: op.LayerNormalization(x, _ones(op), axis=-1, epsilon=1e-12),
        REASSOCIATED,
    ),
    Rule(
        "norms: the epsilon outside of the root",
        "(float[n,6] x) => (float[n,6] y) <int64[1] last = {-1}, float e = {1e-5}> { m = ReduceMean(x, last) "
        "c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, last) a = Add(v, e) s = Sqrt(a) y = Div(c, s) }",
        lambda op, v, eps, c: op.Div(c, op.Sqrt(op.Add(v, eps))),
        lambda op, v, eps, c: op.Div(c, op.Add(op.Sqrt(v), eps)),
        lambda op, v, eps, c: op.Mul(c, op.Reciprocal(op.Sqrt(op.Add(eps, v)))),
        REASSOCIATED,
    ),
    Rule(
        "a dropped bias",
        LINEAR,
        lambda op, x, w, b: op.Add(op.MatMul(x, w), b),
        lambda op, x, w, b: op.Gemm(x, w),
        lambda op, x, w, b: op.Gemm(x, w, b),
        REASSOCIATED,
    ),
    Rule(
        "a bias added twice",
        LINEAR,
        lambda op, x, w, b: op.Add(op.MatMul(x, w), b),
        lambda op, x, w, b: op.Add(op.Gemm(x, w, b), b),
        lambda op, x, w, b: op.Add(op.Gemm(x, w), b),
        REASSOCIATED,
    ),
    Rule(
        "an axis: another one for a softmax",
        "(float[n,m,5] x) => (float[n,m,5] y) { y = Softmax <axis = 1> (x) }",
        lambda op, x: op.Softmax(x, axis=1),
        lambda op, x: op.Transpose(op.Softmax(op.Transpose(x, perm=[0, 2, 1]), axis=1), perm=[0, 2, 1]),
        lambda op, x: op.Transpose(op.Softmax(op.Transpose(x, perm=[0, 2, 1]), axis=2), perm=[0, 2, 1]),
        REASSOCIATED,
    ),
    Rule(
        "an axis: two permutations joined in the wrong order",
        "(float[n,n,n] x) => (float[n,n,n] y) "
        "{ a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [0, 2, 1]> (a) y = Neg(b) }",
        lambda op, x: op.Transpose(op.Transpose(x, perm=[1, 2, 0]), perm=[0, 2, 1]),
        lambda op, x: op.Transpose(x, perm=[2, 1, 0]),
        lambda op, x: op.Transpose(x, perm=[1, 0, 2]),
    ),
    Rule(
        "a cache: new keys before the past",
        "(float[b,2,p,3] past, float[b,2,q,3] new) => (float[b,2,t,3] y) { y = Concat <axis = 2> (past, new) }",
        lambda op, past, new: op.Concat(past, new, axis=2),
        lambda op, past, new: op.Concat(new, past, axis=2),
        lambda op, past, new: op.Concat(op.Identity(past), new, axis=-2),
    ),
    Rule(
        "a scale: that of the other length",
        "(float[b,q,4] x, float[b,4,k] z) => (float[b,q,k] y) <float two = {2}> { p = MatMul(x, z) y = Div(p, two) }",
        lambda op, x, z: op.Div(op.MatMul(x, z), 2.0),
        lambda op, x, z: op.Mul(op.MatMul(x, z), np.float32(0.25)),
        lambda op, x, z: op.MatMul(op.Mul(x, np.float32(0.5)), z),
        REASSOCIATED,
    ),
]


def _made(rule, item, rewrite):
    """Make the rule of a graph: its functions take no `self`, which methods do."""
    made = rule(staticmethod(item.pattern), staticmethod(rewrite), item.accuracy)
    made.name = "test-rule"
    return made


@pytest.mark.parametrize("item", RULES, ids=lambda item: item.name)
def test_a_wrong_replacement_is_caught_where_it_is_made(item, rule, parsed, checked):
    with pytest.raises(Violation) as error:
        checked(_made(rule, item, item.wrong), parsed(f"g {item.text}"))
    assert error.value.comparison is not None, "the rewrite itself shows it, not only the whole graph"


@pytest.mark.parametrize("item", RULES, ids=lambda item: item.name)
def test_a_right_replacement_raises_no_alarm(item, rule, parsed, checked):
    summary = checked(_made(rule, item, item.right), parsed(f"g {item.text}"))
    assert summary.sites >= 1
    assert summary.worst <= summary.budget
    assert summary.whole
