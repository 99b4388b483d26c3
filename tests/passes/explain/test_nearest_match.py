"""How near a pattern comes: each kind of difference in its exact words, and what the search steps over."""

from __future__ import annotations

import pytest

from passopt.passes.explain.nearest_match import nearest, nearest_below
from passopt.passes.patterns.language import trace
from passopt.testing.checking import read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
X = "(float[3,5] x, float[3,5] y, float[3,5] z) => (float[3,5] out)"


@pytest.fixture
def attempt():
    """`attempt(pattern, body, signature)`: the nearest attempt at the node that makes `out`."""

    def at_out(pattern, body, signature=X, labels=None):
        model = read_model(f"{HEADER}g {signature} {body}")
        node = model.graph.outputs[0].producer()
        return nearest(trace(pattern, "here"), node, 21, labels)

    return at_out


@pytest.fixture
def differences(attempt):
    """The share of nodes that fit, and the differences as text."""

    def of(*arguments, **keywords):
        found = attempt(*arguments, **keywords)
        return f"{found.matched} of {found.total}", [str(item) for item in found.differences]

    return of


def rms_norm(op, x, w, epsilon):
    """Six nodes, as most tests below spell them."""
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(w, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))))


W = f"{X} <float[5] w = {{1, 2, 3, 4, 5}}, float e = {{0.001}}, float two = {{2}}, float three = {{3}}, "
W += "int64[1] last = {-1}, int64[1] first = {0}>"
NORM = {
    "square": "p = Pow(x, two)",
    "mean": "m = ReduceMean<keepdims=1>(p, last)",
    "add": "a = Add(m, e)",
    "root": "s = Sqrt(a)",
    "inverse": "r = Reciprocal(s)",
    "scaled": "n = Mul(x, r)",
    "out": "out = Mul(n, w)",
}


def norm(**changed):
    return "{ " + " ".join({**NORM, **changed}.values()) + " }"


def test_a_whole_match_has_no_difference(differences):
    assert differences(rms_norm, norm(), W) == ("7 of 7", [])


@pytest.mark.parametrize(
    ("changed", "share", "words"),
    [
        # another constant
        ({"square": "p = Pow(x, three)"}, 6, "p (Pow), input 1: expected the constant 2, found the constant 3 (float)"),
        ({"square": "p = Pow(x, w)"}, 6, "p (Pow), input 1: expected the constant 2, found the constant "
         "[1.0, 2.0, 3.0, 4.0, 5.0] (float)"),
        ({"square": "p = Pow(x, y)"}, 6, "p (Pow), input 1: expected the constant 2, found the graph input "
         "float[3,5] y"),
        ({"mean": "m = ReduceMean<keepdims=1>(p, first)"}, 6,
         "m (ReduceMean), input 1: expected the constant [-1], found the constant [0] (int64)"),
        # another attribute, one by default
        ({"mean": "k = ReduceMean<keepdims=0>(p, last) m = Unsqueeze(k, last)"}, 6,
         "a (Add), input 0: expected ReduceMean, found Unsqueeze m with ReduceMean behind it"),
        # another value than the one bound before
        ({"square": "p = Pow(y, two)"}, 6, "p (Pow), input 0 (x): expected the same value as x, x, found the graph "
         "input float[3,5] y"),
        # an operator too many
        ({"inverse": "r0 = Reciprocal(s) r = Identity(r0)"}, 7,
         "n (Mul), input 1: expected Reciprocal, found Identity r with Reciprocal behind it"),
        ({"inverse": "r0 = Reciprocal(s) r1 = Identity(r0) r = Neg(r1)"}, 7,
         "n (Mul), input 1: expected Reciprocal, found Neg r with Reciprocal behind it"),
        # one too few
        ({"root": "", "inverse": "r = Reciprocal(a)"}, 6,
         "r (Reciprocal), input 0: expected Sqrt, found Add a: no Sqrt in between"),
        # another operator with the same inputs, or of one input
        ({"root": "s = Abs(a)"}, 6, "r (Reciprocal), input 0: expected Sqrt, found Abs s"),
        ({"add": "a = Max(m, e)"}, 6, "s (Sqrt), input 0: expected Add, found Max a"),
    ],
)  # fmt: skip
def test_one_difference_is_found_and_all_else_fits(differences, changed, share, words):
    found, texts = differences(rms_norm, norm(**changed), W)
    assert texts[0] == words
    if "keepdims=0" in changed.get("mean", ""):
        assert texts[1:] == ["k (ReduceMean), keepdims: expected 1, found 0"]
    else:
        assert texts == [words]
    assert found == f"{share} of 7"


def test_what_lies_behind_another_part_of_the_model_is_not_stepped_to(differences):
    """A MatMul is no operator that an exporter slips in."""
    body = norm(inverse="r0 = Reciprocal(s) t = Transpose(r0) u = MatMul(x, t) v = ReduceMean(u, last) r = Neg(v)")
    share, texts = differences(rms_norm, body, W)
    assert share == "2 of 7"
    assert texts == ["n (Mul), input 1: expected Reciprocal, found Neg r"]


def test_a_part_that_ends_at_an_input_is_given_up(differences):
    assert differences(rms_norm, norm(scaled="n = Mul(x, y)"), W) == (
        "2 of 7",
        ["n (Mul), input 1: expected Reciprocal, found the graph input float[3,5] y"],
    )


def test_an_attribute_that_only_another_value_has(differences):
    """An attribute that the node leaves out has its default."""

    def soft(op, a, axis):
        return op.Softmax(op.Softmax(a, axis=axis), axis=axis)

    assert differences(soft, "{ s = Softmax<axis=0>(x) out = Softmax(s) }") == (
        "1 of 2",
        ["s (Softmax), axis: expected the same as axis, -1, found 0"],
    )


def test_an_attribute_that_is_not_there(differences):
    def turned(op, a, perm):
        return op.Transpose(a, perm=perm)

    assert differences(turned, "{ out = Transpose(x) }", "(float[3,5] x) => (float[5,3] out)") == (
        "0 of 1",
        ["out (Transpose), perm: expected a value, found no such attribute"],
    )


def test_dtypes_are_named(differences):
    assert differences(
        lambda op, a: op.Cast(a, to=10), "{ out = Cast<to=11>(x) }", X.replace("float[3,5] out", "double[3,5] out")
    ) == (
        "0 of 1",
        ["out (Cast), to: expected FLOAT16, found DOUBLE"],
    )


def test_a_weight_is_asked_for(differences):
    signature = "(float[3,5] x, float[5,4] y) => (float[3,4] out) <float[5,4] w = random>"
    pattern = lambda op, a, w: op.MatMul(a, op.weight(w))  # noqa: E731
    assert differences(pattern, "{ out = MatMul(x, w) }", signature) == ("1 of 1", [])
    assert differences(pattern, "{ out = MatMul(x, y) }", signature) == (
        "0 of 1",
        ["out (MatMul), input 1 (w): expected a weight of the checkpoint, found the graph input float[5,4] y"],
    )
    assert differences(pattern, "{ n = Neg(w) out = MatMul(x, n) }", signature) == (
        "0 of 1",
        ["out (MatMul), input 1 (w): expected a weight of the checkpoint, found Neg n"],
    )


def test_a_weight_is_named_with_its_type(differences):
    signature = "(float[3,5] x) => (float[3,4] out) <float[5,4] w = random>"
    assert differences(lambda op, a, b: op.MatMul(a, op.Neg(b)), "{ out = MatMul(x, w) }", signature) == (
        "1 of 2",
        ["out (MatMul), input 1: expected Neg, found the weight float[5,4] w"],
    )


def test_the_number_of_inputs_and_outputs(differences):
    def split(op, a, b, c):
        return op.Split(op.Concat(a, b, axis=0), c, axis=0, outputs=3)[0]

    signature = X + " <int64[2] sizes = {3, 6}>"
    body = "{ c = Concat<axis=0>(x, y, z) out, rest = Split<axis=0>(c, sizes) }"
    assert differences(split, body, signature) == (
        "0 of 2",
        ["out (Split): expected 3 outputs, found 2", "c (Concat): expected 2 inputs, found 3"],
    )


def test_another_output_of_the_node(differences):
    def second(op, a, sizes):
        return op.Neg(op.Split(a, sizes, axis=1, outputs=2)[1])

    signature = "(float[3,5] x) => (float[3,2] out) <int64[2] sizes = {2, 3}>"
    assert differences(second, "{ a, b = Split<axis=1>(x, sizes) out = Neg(a) }", signature) == (
        "1 of 2",
        ["out (Neg), input 0: expected output 1 of Split, found output 0 of Split a"],
    )


def test_a_piece_used_twice_must_be_one_node(differences):
    def shared(op, a):
        piece = op.Relu(a)
        return op.Sub(piece, op.Sigmoid(piece))

    assert differences(shared, "{ r = Relu(x) q = Relu(x) s = Sigmoid(q) out = Sub(r, s) }") == (
        "2 of 3",
        ["s (Sigmoid), input 0: expected the same Relu as before, r, found Relu q"],
    )


def test_commuted_inputs_are_tried_in_the_order_that_fits_best(differences):
    def silu(op, a):
        return op.Mul(op.Neg(op.Relu(a)), op.Sigmoid(a))

    for inputs in ("s, n", "n, s"):
        body = f"{{ s = Sigmoid(x) r = Relu(y) n = Neg(r) out = Mul({inputs}) }}"
        assert differences(silu, body) == (
            "3 of 4",
            ["s (Sigmoid), input 0 (a): expected the same value as a, y, found the graph input float[3,5] x"],
        )


def spelled(op, a):
    kind = op.any_of("kind", soft=op.Sigmoid(op.Neg(a)), hard=op.Relu(op.Abs(a)))
    return op.Sub(kind, a)


@pytest.mark.parametrize(
    ("body", "label", "words"),
    [
        ("n = Ceil(x) s = Sigmoid(n) out = Sub(s, x)", "soft", "s (Sigmoid), input 0: expected Neg, found Ceil n"),
        ("n = Ceil(x) s = Relu(n) out = Sub(s, x)", "hard", "s (Relu), input 0: expected Abs, found Ceil n"),
        ("n = Abs(x) s = Tanh(n) out = Sub(s, x)", "hard",
         "out (Sub), input 0: expected Sigmoid or Relu, found Tanh s"),
    ],
)  # fmt: skip
def test_the_alternative_that_came_farthest_is_explained(attempt, body, label, words):
    found = attempt(spelled, f"{{ {body} }}")
    assert found.labels == {"kind": label}
    assert [str(item) for item in found.differences] == [words]
    assert (found.matched, found.total) == (2, 3)


def test_a_label_can_be_asked_for(attempt):
    found = attempt(spelled, "{ n = Neg(x) s = Sigmoid(n) out = Sub(s, x) }", labels={"kind": "hard"})
    assert found.labels == {"kind": "hard"}
    assert [str(item) for item in found.differences] == ["out (Sub), input 0: expected Relu, found Sigmoid s"]


def test_an_optional_operator_is_not_missed(differences):
    def optional(op, a, b):
        return op.Sub(op.optional("cast", op.Relu(a), lambda v: op.Cast(v, to=1)), op.Neg(b))

    assert differences(optional, "{ r = Relu(x) n = Abs(y) out = Sub(r, n) }") == (
        "2 of 3",
        ["out (Sub), input 1: expected Neg, found Abs n"],
    )


def three_parts(op, a, axis):
    pieces = op.Squeeze(op.Neg(a), axis)
    return [op.Gather(pieces, index, axis=0) for index in range(3)]


PARTS = "(float[1,3,5] x) => (float[5] out, float[5] second, float[5] third)"
PARTS += " <int64[1] axis = {0}, int64 zero = {0}, int64 one = {1}, int64 two = {2}>"
GATHERS = "{ n = Neg(x) s = Squeeze(n, axis) out = Gather(s, zero)"


def test_all_roots_are_found(differences):
    assert differences(three_parts, GATHERS + " second = Gather(s, one) third = Gather(s, two) }", PARTS) == (
        "5 of 5",
        [],
    )


def test_a_root_that_nothing_stands_for(differences):
    body = GATHERS + " second = Gather(s, one) q = Neg(s) third = Gather(q, two) }"
    share, texts = differences(three_parts, body, PARTS)
    assert (share, texts) == (
        "4 of 5",
        ["s (Squeeze), root 3 of 3: expected Gather that reads s, found readers Gather, Neg"],
    )


def test_a_root_that_comes_near(differences):
    body = GATHERS + " second = Gather(s, one) third = Gather(s, one) }"
    share, texts = differences(three_parts, body, PARTS)
    assert (share, texts) == (
        "4 of 5",
        ["third (Gather), input 1: expected the constant 2, found the constant 1 (int64)"],
    )


def test_the_root_itself_is_another_operator():
    model = read_model(f"{HEADER}g {W} {norm(out='out = Div(n, w)')}")
    traced = trace(rms_norm, "here")
    child = traced.root_nodes[0].inputs[1]
    source = next(node for node in model.graph if node.outputs[0].name == "n")
    found = nearest_below(traced, child, source, source.outputs[0].consumers()[0], 21)
    assert (found.matched, found.total) == (6, 7)
    assert [str(item) for item in found.differences] == ["n (Mul), read by: expected Mul that reads n, found Div out"]


def test_no_exponential_search(attempt):
    """Twelve commutative levels, of which the last one differs: 4096 orders, and only a few attempts are kept."""

    def pattern(op, a):
        value = op.Relu(a)
        for _ in range(12):
            value = op.Add(value, op.Neg(value))
        return value

    body = "v0 = Abs(x) " + " ".join(f"n{i} = Neg(v{i}) v{i + 1} = Add(n{i}, v{i})" for i in range(12))
    found = attempt(pattern, f"{{ {body.replace('v12', 'out')} }}")
    assert (found.matched, found.total) == (24, 25)
    assert str(found.differences[0]) == "v1 (Add), input 1: expected Relu, found Abs v0"


def test_a_root_above_what_is_bound_is_reached(differences):
    """The second root reads nothing of the first, only what stands above it."""

    def pattern(op, a):
        piece = op.Relu(a)
        return [op.Neg(piece), op.Abs(op.Exp(op.Sqrt(piece)))]

    signature = "(float[3,5] x) => (float[3,5] out, float[3,5] other)"
    whole = "{ r = Relu(x) out = Neg(r) s = Sqrt(r) e = Exp(s) other = Abs(e) }"
    assert differences(pattern, whole, signature) == ("5 of 5", [])
    assert differences(pattern, whole.replace("Exp(s)", "Floor(s)"), signature) == (
        "2 of 5",
        ["s (Sqrt), root 2 of 2: expected Exp that reads s, found readers Floor"],
    )
    assert differences(pattern, whole.replace("Relu(x)", "Ceil(x)"), signature) == (
        "1 of 5",
        ["out (Neg), input 0: expected Relu, found Ceil r"],
    )


def test_a_root_of_one_of_several_operators(differences):
    def pattern(op, a):
        return op.any_op("kind", ["Mul", "Div"], op.Relu(a), op.Neg(a))

    assert differences(pattern, "{ r = Relu(x) n = Abs(x) out = Div(r, n) }") == (
        "2 of 3",
        ["out (Div), input 1: expected Neg, found Abs n"],
    )


CLIP = X + " <float low = {0}, float high = {6}>"


@pytest.mark.parametrize(
    ("pattern", "body", "words"),
    [
        (lambda op, a, b: op.Clip(a, 0.0, b), "out = Clip(x, low)",
         "out (Clip), input 2 (b): expected an input, found no input"),
        (lambda op, a: op.Clip(a, 0.0), "out = Clip(x, low, high)", "out (Clip): expected 2 inputs, found 3"),
        (lambda op, a: op.Clip(a, None, 6.0), "out = Clip(x, low, high)",
         "out (Clip), input 1: expected no input, found the constant 0 (float)"),
        (lambda op, a, b: op.Clip(op.Neg(a), 0.0, op.maybe(b)), "out = Clip(x, low)",
         "out (Clip), input 0: expected Neg, found the graph input float[3,5] x"),
        (lambda op, a: op.Concat(op.Neg(a), op.rest("others"), axis=0), "n = Abs(x) out = Concat<axis=0>(n, y, z)",
         "out (Concat), input 0: expected Neg, found Abs n"),
        (lambda op, a: op.Mul(a, op.near(0.5)), "out = Mul(x, high)",
         "out (Mul), input 1: expected the constant 0.5 or near it, found the constant 6 (float)"),
    ],
)  # fmt: skip
def test_inputs_that_may_be_absent_or_many(differences, pattern, body, words):
    signature = CLIP.replace("float[3,5] out", "float[9,5] out") if "Concat" in body else CLIP
    assert differences(pattern, f"{{ {body} }}", signature)[1] == [words]


def test_what_was_given_up_is_found_from_elsewhere(differences):
    """The piece under the wrong operator stands under another one as well."""

    def pattern(op, a):
        piece = op.Sqrt(op.Abs(a))
        return op.Sub(op.Neg(op.Exp(op.Floor(piece))), op.Ceil(piece))

    body = "{ p = Abs(x) q = Sqrt(p) t = Tanh(y) c = Ceil(q) out = Sub(t, c) }"
    assert differences(pattern, body) == ("4 of 7", ["out (Sub), input 0: expected Neg, found Tanh t"])


def test_the_right_operators_with_other_details_are_nearer_than_other_operators(attempt):
    def pattern(op, a, start, middle, end, sizes):
        slices = op.Sub(op.Slice(a, start, middle), op.Slice(a, middle, end))
        return op.Neg(op.any_of("halves", split=op.Sub(*op.Split(a, sizes, outputs=2)), slices=slices))

    signature = "(float[4,5] x) => (float[2,5] out)"
    signature += " <int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] axis = {0}>"
    body = "{ u = Slice(x, zero, two, axis) v = Slice(x, two, four, axis) s = Sub(u, v) out = Neg(s) }"
    found = attempt(pattern, body, signature)
    assert found.labels == {"halves": "slices"}
    assert [str(item) for item in found.differences] == [
        "u (Slice): expected 3 inputs, found 4",
        "v (Slice): expected 3 inputs, found 4",
    ]
