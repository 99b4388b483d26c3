"""Where a cut stops: at activations, never at masks, positions or lengths; and at the same values on both sides."""

from __future__ import annotations

import pytest

from passopt.ir.graph.completion import complete_types
from passopt.verification.rewrites.regions import Request, Side, Unchecked, cut, names_of
from passopt.verification.rewrites.structure_key import structure_key
from passopt.verification.rewrites.value_kinds import Kinds

DECODER = """g (int64[b,s] input_ids, int64[b,t] attention_mask, float[b,4,p,3] "past.0.key") => (float[b,s,t] out)
<float[11,6] table = random, float[6,6] w = random, int64[1] one = {1}, float low = {-1000}, int64 first = {0},
 int64[3] to = {0, 0, 6}> {
    hidden = Gather(table, input_ids)
    length = Shape <start = 1, end = 2> (attention_mask)
    seen = Cast <to = 1> (attention_mask)
    row = Unsqueeze(seen, one)
    bias = Mul(row, low)
    h = MatMul(hidden, w)
    k = Relu(h)
    target = Shape(k)
    view = Reshape(k, to)
    turned = Transpose <perm = [0,2,1]> (view)
    scores = MatMul(h, turned)
    pad = Neg(scores)
    out = Add(pad, bias)
}"""


def value(model, name):
    return next(out for node in model.graph for out in node.outputs if out.name == name)


def request(model, *roots, inside=None):
    """A rewrite of the nodes of `roots` by themselves."""
    side = Side.of(model, Kinds())
    old = tuple(value(model, name) for name in roots)
    names = names_of(root.producer() for root in old) | frozenset(inside or ())
    return Request(old, old, side, side, names, names)


def cut_at(model, found):
    order = {out.name: index for index, node in enumerate(model.graph) for out in node.outputs}
    return cut(found, lambda leaf: leaf.shape is not None, lambda leaf: order.get(leaf.name, -1))


def shape_of(leaf):
    return str(leaf.shape)


def leaves(region):
    return [leaf.name for leaf in region.leaves]


@pytest.fixture
def model(parsed):
    made = parsed(DECODER)
    complete_types(made)
    return made


def test_masks_are_computed_from_the_graph_inputs(model):
    found = cut_at(model, request(model, "bias"))
    assert leaves(found.before) == ["attention_mask"]
    assert [node.op_type for node in found.before.nodes] == ["Cast", "Unsqueeze", "Mul"]


def test_activations_are_sampled_where_the_match_ends(model):
    found = cut_at(model, request(model, "k"))
    assert leaves(found.before) == ["h"]
    found = cut_at(model, request(model, "h"))
    assert leaves(found.before) == ["hidden"], "an embedding is no mask, though computed from integers"
    assert [weight.name for weight in found.before.weights] == ["w"]


def test_a_leaf_that_follows_from_another_is_computed(model):
    """`turned` is a function of `h` through three operators: two independent samples would not belong together."""
    found = cut_at(model, request(model, "scores"))
    assert leaves(found.before) == ["h"]
    assert [node.op_type for node in found.before.nodes] == ["Relu", "Reshape", "Transpose", "MatMul"]


def test_a_leaf_of_unknown_shape_is_computed_from_one_that_has_a_shape(model):
    value(model, "scores").shape = None
    found = cut_at(model, request(model, "pad"))
    assert leaves(found.before) == ["h"]


def test_what_the_replacement_reads_upstream_is_shared_by_both_sides(model):
    base = request(model, "view")
    reads = value(model, "h")
    found = cut_at(model, Request(base.old_roots, (reads,), base.before, base.after, base.inside_before, frozenset()))
    assert leaves(found.before) == leaves(found.after) == ["h"]


def test_a_graph_input_without_a_shape_is_the_end(parsed):
    model = parsed("g (float x, float[3] y) => (float[3] out) { a = Neg(x) out = Add(a, y) }")
    model.graph.inputs[0].shape = None
    with pytest.raises(Unchecked, match="the shape of the input x is unknown"):
        cut_at(model, request(model, "a"))


def test_equal_structure_has_equal_keys_whatever_things_are_called(parsed):
    text = """g (float[n,6] x, float[n,6] y) => (float[n,6] out) <float[6,6] w = random, float[5,6] w2 = random,
    float[6,5] u = random, float c = {{2}}, float d = {{{}}}> {{
        a = MatMul(x, w) b = Mul(a, c) e = MatMul(b, w) f = Mul(e, d) g = MatMul(f, u)
        h = MatMul(g, w2) out = Add(h, y) }}"""
    model = parsed(text.format("2"))
    complete_types(model)

    def key(*names):
        return structure_key(cut_at(model, request(model, *names[:1], inside=names[1:])), shape_of)

    assert key("b", "a") == key("f", "e")
    assert key("a") == key("e")
    assert key("a") != key("g"), "another width"
    other = parsed(text.format("3"))
    complete_types(other)
    assert structure_key(cut_at(other, request(other, "f", inside=["e"])), shape_of) != key("f", "e"), (
        "another constant"
    )
