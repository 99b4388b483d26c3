"""fuse-attention on GPT-2: causal masks that are cut from a constant, a second mask, and a packed cache."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.serialization.text import print_model
from passopt.passes.fusion.fuse_attention import FuseAttention
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checking import compare_numbers, read_model

#: Two heads of width 3; at most 8 positions. `low` takes the place of scores, `factor` is added where input_mask is 0.
TEXT = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[b,s,6] x, float[2,b,2,p,3] past, int64[b,t] input_mask) => (float[b,s,6] y, float[2,b,2,n,3] present)
    <float[6,18] w = random, float[18] bias = random, int64[4] heads = {0, 0, 2, 3}, int64[3] flat = {0, 0, 6},
     uint8[1,1,8,8] tri = {TRI}, float low = {LOW}, float factor = {FACTOR}, float one = {1}, float root = {1.7320508},
     int64[1] zero = {0}, int64[2] front = {1, 2}, int64[3] parts = {6, 6, 6}, int64[2] halves = {1, 1},
     int64[1] rows = {2}, int64[1] columns = {3}, int64[1] by = {1}, int64 at = {2}, int64 other = {3}> {
        m = MatMul(x, w) a = Add(m, bias)
        qf, kf, vf = Split <axis = 2> (a, parts)
        q4 = Reshape(qf, heads) q = Transpose <perm = [0, 2, 1, 3]> (q4)
        k4 = Reshape(kf, heads) k = Transpose <perm = [0, 2, 1, 3]> (k4)
        v4 = Reshape(vf, heads) v = Transpose <perm = [0, 2, 1, 3]> (v4)
        pk1, pv1 = Split <axis = 0> (past, halves)
        pk = Squeeze(pk1, zero) pv = Squeeze(pv1, zero)
        keys = Concat <axis = -2> (pk, k) values = Concat <axis = -2> (pv, v)
        ku = Unsqueeze(keys, zero) vu = Unsqueeze(values, zero) present = Concat <axis = 0> (ku, vu)
        kt = Transpose <perm = [0, 1, 3, 2]> (keys) raw = MatMul(q, kt) scores = Div(raw, root)
        LENGTHS
        d = Sub(nk, nq) d1 = Unsqueeze(d, zero) nk1 = Unsqueeze(nk, zero)
        tri1 = Slice(tri, d1, nk1, rows, by) tri2 = Slice(tri1, zero, nk1, columns, by) seen = Cast <to = 9> (tri2)
        im = Unsqueeze(input_mask, front) imf = Cast <to = 1> (im) inverse = Sub(one, imf) am = Mul(inverse, factor)
        chosen = Where(seen, scores, low) masked = Add(MASKED)
        shares = Softmax <axis = 3> (masked) o = MatMul(shares, values)
        ob = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(ob, flat)
    }"""
TRI = ", ".join(map(str, np.tril(np.ones((8, 8), int)).reshape(-1)))
LOWEST = "-3.4028235e38"
#: Where the lengths of the mask come from: the joined keys, or the scores.
LENGTHS = {
    "keys": "qs = Shape(q) ks = Shape(keys) nq = Gather(qs, at) nk = Gather(ks, at)",
    "scores": "ss = Shape(scores) nq = Gather(ss, at) nk = Gather(ss, other)",
    "raw scores": "qs = Shape(q) ss = Shape <start = -1> (raw) nq = Gather(qs, at) nk = Squeeze(ss)",
    "turned keys": "qs = Shape(q) ks = Shape(kt) nq = Gather(qs, at) nk = Gather(ks, other)",
}


def gpt2(lengths="keys", low=LOWEST, factor=LOWEST, masked="chosen, am"):
    text = TEXT.replace("LENGTHS", LENGTHS[lengths]).replace("MASKED", masked)
    return read_model(
        text.replace("{TRI}", f"{{{TRI}}}").replace("{LOW}", f"{{{low}}}").replace("{FACTOR}", f"{{{factor}}}")
    )


def masks(b, t):
    """Masks that show everything, that hide columns at one end, and that hide everything."""
    full = np.ones((b, t), np.int64)
    left, right, none = full.copy(), full.copy(), full.copy()
    left[0, : (t + 1) // 2], right[-1, t // 2 + 1 :], none[0] = 0, 0, 0
    return [full, left, right, none]


def fuse(model, text="fuse"):
    changed = model.clone()
    records = run_passes(changed, resolve(text).passes)
    return changed, {record.name: record.result for record in records}["fuse-attention"]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("masked", ["chosen, am", "am, chosen"])
def test_masks_and_a_packed_cache(lengths, masked):
    model = gpt2(lengths, masked=masked)
    changed, _ = fuse(model)
    kinds = [node.op_type for node in changed.graph]
    assert kinds.count("Attention") == 1
    assert "Softmax" not in kinds
    for b, s, p in ((2, 3, 4), (2, 3, 0), (1, 1, 5), (1, 1, 0), (3, 4, 1)):
        for mask in masks(b, s + p):
            compare_numbers(model, changed, 1e-5, {"input_mask": mask}, {"b": b, "s": s, "p": p, "t": s + p})


def test_a_low_number_beside_another_mask_is_declined():
    """In a row of padding, -1e4 in place of scores counts as much as a score of which -1e4 was taken."""
    model = gpt2(low="-10000.0", factor="-10000.0")
    changed, result = fuse(model)
    assert "Attention" not in [node.op_type for node in changed.graph]
    assert any("which hidden_rows=any accepts" in reason for reason in result.declines), result.declines


def test_rows_that_see_nothing_may_be_given_up():
    model = gpt2(low="-10000.0", factor="-10000.0")
    changed, _ = fuse(model, "fuse{hidden_rows=any}")
    assert "Softmax" not in [node.op_type for node in changed.graph]
    for b, s, p in ((2, 3, 4), (1, 1, 0)):
        full, _, right, _ = masks(b, s + p)
        for mask in (full, right):
            compare_numbers(model, changed, 1e-5, {"input_mask": mask}, {"b": b, "s": s, "p": p, "t": s + p})


def test_the_lengths_are_those_of_the_parts():
    """No operator reads the shape of the cache that Attention gives; a second run changes nothing."""
    changed, _ = fuse(gpt2())
    attention = next(node for node in changed.graph if node.op_type == "Attention")
    assert not [use for use in attention.outputs[1].uses() if use.node.op_type == "Shape"]
    before = print_model(changed)
    assert not FuseAttention().run(changed).modified
    assert print_model(changed) == before
