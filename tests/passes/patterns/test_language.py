"""What a traced pattern matches: found at the node that makes the graph's first output."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.passes.patterns import matcher
from passopt.passes.patterns.language import trace

X = "(float[3,5] x, float[3,5] y, float[3,5] z) => (float[3,5] out)"


class Matcher:
    """Matches a pattern function at the producer of the first output."""

    def __init__(self, parsed):
        self._parsed = parsed

    def __call__(self, pattern, body, signature=X):
        model = self._parsed(f"g {signature} {body}")
        traced = trace(pattern, "here")
        node = model.graph.outputs[0].producer()
        is_root = (node.domain, node.op_type) in traced.root_keys
        return matcher.Matcher(traced, 21).match(node) if is_root else None

    def names(self, *arguments, **keywords):
        """The bindings by name, values as their names; None without a match."""
        match = self(*arguments, **keywords)
        if match is None:
            return None
        return {key: value.name if isinstance(value, onnx_ir.Value) else value for key, value in match.bindings.items()}


@pytest.fixture
def match(parsed):
    return Matcher(parsed)


def test_variables_bind_values(match):
    found = match.names(lambda op, a, b: op.Sub(op.Relu(a), b), "{ r = Relu(x) out = Sub(r, y) }")
    assert found == {"a": "x", "b": "y"}


def test_another_operator_order_or_domain_does_not_match(match):
    def pattern(op, a, b):
        return op.Sub(op.Relu(a), b)

    assert match(pattern, "{ r = Relu(x) out = Sub(y, r) }") is None
    assert match(pattern, "{ r = Relu(x) out = Add(r, y) }") is None
    assert match(pattern, "{ r = Sigmoid(x) out = Sub(r, y) }") is None
    assert match(lambda op, a: op.Relu(a, domain="other"), "{ out = Relu(x) }") is None


def test_a_variable_used_twice_is_one_value(match):
    def square(op, a):
        return op.Mul(a, a)

    assert match.names(square, "{ out = Mul(x, x) }") == {"a": "x"}
    assert match(square, "{ out = Mul(x, y) }") is None


@pytest.mark.parametrize("kind", ["Add", "Mul", "Max", "Min"])
def test_commutative_inputs_match_in_either_order(match, kind):
    def pattern(op, a, b):
        return op.node(kind, op.Relu(a), b)

    assert match.names(pattern, f"{{ r = Relu(x) out = {kind}(r, y) }}") == {"a": "x", "b": "y"}
    assert match.names(pattern, f"{{ r = Relu(x) out = {kind}(y, r) }}") == {"a": "x", "b": "y"}


def test_three_inputs_are_not_commuted(match):
    assert match(lambda op, a, b: op.Max(op.Relu(a), b), "{ r = Relu(x) out = Max(y, r, z) }") is None


def test_commuted_choices_inside_are_undone_when_the_outside_fails(match):
    """The inner Add can match its inputs in either order; only one order fits what follows."""

    def pattern(op, a, b):
        return op.Sub(op.Add(a, b), op.Sub(b, a))

    assert match.names(pattern, "{ s = Add(x, y) d = Sub(y, x) out = Sub(s, d) }") == {"a": "x", "b": "y"}
    assert match.names(pattern, "{ s = Add(x, y) d = Sub(x, y) out = Sub(s, d) }") == {"a": "y", "b": "x"}
    assert match(pattern, "{ s = Add(x, y) d = Sub(x, z) out = Sub(s, d) }") is None


def test_backtracking_reaches_every_combination(match):
    """Four commutative nodes: the one order of each that fits is found wherever it is."""

    def pattern(op, a, b, c):
        left = op.Mul(op.Add(a, b), op.Add(b, c))
        return op.Sub(left, op.Concat(a, b, c, axis=0))

    signature = "(float[3,5] x, float[3,5] y, float[3,5] z) => (float[9,5] out)"
    for first in ("x, y", "y, x"):
        for second in ("y, z", "z, y"):
            for outer in ("p, q", "q, p"):
                body = f"p = Add({first}) q = Add({second}) m = Mul({outer}) c = Concat<axis=0>(x, y, z)"
                found = match.names(pattern, f"{{ {body} out = Sub(m, c) }}", signature)
                assert found == {"a": "x", "b": "y", "c": "z"}


def test_a_piece_used_twice_is_one_node(match):
    def pattern(op, a):
        piece = op.Relu(a)
        return op.Sub(piece, op.Sigmoid(piece))

    assert match(pattern, "{ r = Relu(x) s = Sigmoid(r) out = Sub(r, s) }") is not None
    assert match(pattern, "{ r = Relu(x) q = Relu(x) s = Sigmoid(q) out = Sub(r, s) }") is None


def test_any_of_binds_the_label_that_matched(match):
    def pattern(op, a):
        return op.Sub(op.any_of("kind", soft=op.Sigmoid(a), hard=op.Relu(a)), a)

    assert match.names(pattern, "{ r = Relu(x) out = Sub(r, x) }") == {"kind": "hard", "a": "x"}
    assert match.names(pattern, "{ r = Sigmoid(x) out = Sub(r, x) }") == {"kind": "soft", "a": "x"}
    assert match(pattern, "{ r = Tanh(x) out = Sub(r, x) }") is None


def test_any_of_tries_the_next_label_when_the_rest_does_not_fit(match):
    def pattern(op, a, b):
        return op.Sub(op.any_of("kind", plain=a, twice=op.Add(b, b)), b)

    assert match.names(pattern, "{ s = Add(x, x) out = Sub(s, x) }")["kind"] == "plain"

    def strict(op, a):
        return op.Sub(op.any_of("kind", plain=a, active=op.Relu(a)), a)

    assert match.names(strict, "{ r = Relu(x) out = Sub(r, x) }") == {"kind": "active", "a": "x"}


def test_one_name_is_one_label_everywhere(match):
    def pattern(op, a, b):
        return op.Sub(
            op.any_of("kind", soft=op.Sigmoid(a), hard=op.Relu(a)),
            op.any_of("kind", soft=op.Sigmoid(b), hard=op.Relu(b)),
        )

    assert match(pattern, "{ p = Relu(x) q = Relu(y) out = Sub(p, q) }") is not None
    assert match(pattern, "{ p = Relu(x) q = Sigmoid(y) out = Sub(p, q) }") is None


def test_optional_says_whether_it_was_there(match):
    def pattern(op, a):
        return op.Relu(op.optional("cast", a, lambda value: op.Cast(value, to=1)))

    assert match.names(pattern, "{ c = Cast<to=1>(x) out = Relu(c) }") == {"cast": "present", "a": "x"}
    assert match.names(pattern, "{ out = Relu(x) }") == {"cast": "absent", "a": "x"}
    assert match.names(pattern, "{ c = Cast<to=11>(x) out = Relu(c) }") == {"cast": "absent", "a": "c"}


def test_bind_names_a_node_inside(match):
    found = match.names(lambda op, a: op.Sigmoid(op.Relu(a, bind="inner")), "{ r = Relu(x) out = Sigmoid(r) }")
    assert found == {"a": "x", "inner": "r"}


def test_attributes_match_by_value_and_by_the_default_of_the_schema(match):
    def softmax(axis):
        return lambda op, a: op.Softmax(a, axis=axis)

    assert match(softmax(-1), "{ out = Softmax(x) }") is not None
    assert match(softmax(0), "{ out = Softmax(x) }") is None
    assert match(softmax(0), "{ out = Softmax<axis=0>(x) }") is not None
    assert match(lambda op, a: op.Transpose(a, perm=[1, 0]), "{ out = Transpose<perm=[1,0]>(x) }") is not None
    assert match(lambda op, a: op.Transpose(a, perm=[1, 0]), "{ out = Transpose<perm=[0,1]>(x) }") is None
    assert match(lambda op, a: op.Transpose(a, perm=[1, 0]), "{ out = Transpose(x) }") is None
    assert match(lambda op, a: op.Gelu(a, approximate="tanh"), '{ out = Gelu<approximate="tanh">(x) }') is not None
    assert match(lambda op, a: op.Gelu(a, approximate="none"), "{ out = Gelu(x) }") is not None
    assert match(lambda op, a: op.Cast(a, to=onnx_ir.DataType.FLOAT), "{ out = Cast<to=1>(x) }") is not None
    assert match(lambda op, a: op.Cast(a, to=onnx_ir.DataType.FLOAT16), "{ out = Cast<to=1>(x) }") is None


def test_a_float_attribute_is_compared_as_stored(match):
    assert match(lambda op, a: op.LeakyRelu(a, alpha=0.1), "{ out = LeakyRelu<alpha=0.1>(x) }") is not None
    assert match(lambda op, a: op.LeakyRelu(a, alpha=0.01), "{ out = LeakyRelu(x) }") is not None
    assert match(lambda op, a: op.LeakyRelu(a, alpha=0.1), "{ out = LeakyRelu<alpha=0.2>(x) }") is None


def test_a_variable_binds_an_attribute(match):
    def pattern(op, a, axis):
        return op.Softmax(op.Softmax(a, axis=axis), axis=axis)

    assert match.names(pattern, "{ s = Softmax<axis=0>(x) out = Softmax<axis=0>(s) }") == {"a": "x", "axis": 0}
    assert match.names(pattern, "{ s = Softmax(x) out = Softmax<axis=-1>(s) }") == {"a": "x", "axis": -1}
    assert match(pattern, "{ s = Softmax<axis=0>(x) out = Softmax(s) }") is None


@pytest.mark.parametrize(
    ("constant", "number", "fits"),
    [
        ("float c = {2}", 2, True),
        ("float[1] c = {2}", 2.0, True),
        ("float c = {2.5}", 2, False),
        ("float[2] c = {2, 2}", 2, False),
        ("float[1,1] c = {2}", 2, False),
        ("float[1,1,1] c = {2}", 2, False),
        ("float c = {0.1}", 0.1, True),
        ("int64 c = {0}", 0.5, False),
        ("int64 c = {3}", 3, True),
        ("float16 c = {31744}", 1e30, True),
        ("float c = {1e20}", 1e-20, False),
    ],
)
def test_a_number_matches_a_constant_of_one_element(match, constant, number, fits):
    kind = constant.split()[0].split("[")[0]
    signature = f"({kind}[3,5] x) => ({kind}[3,5] out) <{constant}>"
    assert (match(lambda op, a: op.Mul(a, number), "{ out = Mul(x, c) }", signature) is not None) == fits


def test_a_list_matches_a_constant_of_integers(match):
    signature = "(float[3,5] x) => (float[5,3] out) <int64[2] shape = {5, 3}, float[2] other = {5, 3}>"
    body = "{ out = Reshape(x, shape) }"
    assert match(lambda op, a: op.Reshape(a, [5, 3]), body, signature) is not None
    assert match(lambda op, a: op.Reshape(a, [3, 5]), body, signature) is None
    assert match(lambda op, a: op.Reshape(a, [5]), body, signature) is None


def test_the_number_of_inputs_counts(match):
    clip = "(float[3,5] x, float low, float high) => (float[3,5] out)"
    assert match(lambda op, a, b: op.Clip(a, b), "{ out = Clip(x, low, high) }", clip) is None
    assert match(lambda op, a, b, c: op.Clip(a, b, c), "{ out = Clip(x, low) }", clip) is None
    assert match.names(lambda op, a, b: op.Clip(a, b), "{ out = Clip(x, low) }", clip) == {"a": "x", "b": "low"}


def test_the_number_of_outputs_counts(match):
    two = "(float[3,5] x, int64[2] s) => (float[3,2] out, float[3,3] b)"

    def pattern(count):
        return lambda op, a, s: op.Split(a, s, axis=1, outputs=count)

    body = "{ out, b = Split<axis=1>(x, s) }"
    assert match(pattern(2), body, two) is not None
    assert match(pattern(3), body, two) is None


def test_several_roots_are_found_from_what_they_share(match):
    def pattern(op, a, b):
        shared = op.Relu(a)
        return [op.Sigmoid(shared), op.Sub(shared, b)]

    body = "{ r = Relu(x) t = Sub(r, z) out = Sigmoid(r) }"
    found = match(pattern, body)
    assert [value.name for value in found.roots()] == ["out", "t"]
    assert match(pattern, "{ r = Relu(x) t = Sub(y, r) out = Sigmoid(r) }") is None
    assert match(pattern, "{ q = Relu(y) t = Sub(q, z) r = Relu(x) out = Sigmoid(r) }") is None


def test_further_roots_backtrack(match):
    """Two Subs read the shared value; only the second one has the Tanh."""

    def pattern(op, a, b):
        shared = op.Relu(a)
        return [op.Sigmoid(shared), op.Sub(shared, op.Tanh(b))]

    found = match(pattern, "{ r = Relu(x) h = Tanh(y) wrong = Sub(r, z) right = Sub(r, h) out = Sigmoid(r) }")
    assert [value.name for value in found.roots()] == ["out", "right"]


def test_a_root_may_stand_inside_of_another(match):
    """A sum and what is computed from it, both replaced: a fused residual norm."""

    def pattern(op, a, b):
        total = op.Add(a, b)
        return [op.Sigmoid(total), total]

    found = match(pattern, "{ t = Add(x, y) out = Sigmoid(t) }")
    assert [value.name for value in found.roots()] == ["out", "t"]


def test_a_further_root_may_stand_some_nodes_above_what_is_shared(match):
    def pattern(op, a, b):
        return [op.Sigmoid(op.Relu(a)), op.Sub(op.Neg(op.Tanh(a)), b)]

    body = "{ r = Relu(x) h = Tanh(x) n = Neg(h) t = Sub(n, z) out = Sigmoid(r) }"
    assert [value.name for value in match(pattern, body).roots()] == ["out", "t"]


def test_roots_may_be_alternatives_of_different_operators(match):
    def pattern(op, a):
        return op.any_of("form", product=op.Mul(a, op.Sigmoid(a)), swish=op.Swish(a))

    assert match.names(pattern, "{ s = Sigmoid(x) out = Mul(s, x) }") == {"form": "product", "a": "x"}
    assert match.names(pattern, "{ out = Swish(x) }") == {"form": "swish", "a": "x"}
    assert match(pattern, "{ out = Sigmoid(x) }") is None
    assert trace(pattern, "here").root_keys == (("", "Mul"), ("", "Swish"))


def test_alternatives_of_several_values_are_one_choice(match):
    """Three slices or one Split: the roots of one form only."""

    def pattern(op, a, sizes):
        gathered = [op.Gather(a, index, axis=0) for index in range(2)]
        return op.any_of("form", gathered=gathered, split=op.Split(a, sizes, axis=0, outputs=2))

    signature = "(float[2,5] x, int64[2] sizes) => (float[1,5] out) <int64 zero = {0}, int64 one = {1}>"
    found = match(pattern, "{ p, q = Split<axis=0>(x, sizes) out = Identity(p) }", signature)
    assert found is None
    found = match(pattern, "{ out, q = Split<axis=0>(x, sizes) }", signature)
    assert ([value.name for value in found.roots()], found.bindings["form"]) == (["out", "q"], "split")
    signature = signature.replace("float[1,5]", "float[5]")
    found = match(pattern, "{ second = Gather<axis=0>(x, one) out = Gather<axis=0>(x, zero) }", signature)
    assert ([value.name for value in found.roots()], found.bindings["form"]) == (["out", "second"], "gathered")


def test_alternatives_of_several_values_have_one_length():
    with pytest.raises(PassError, match=r"here: the choices of any_of 'form' give \[1, 2\] values"):
        trace(lambda op, a: op.any_of("form", one=op.Neg(a), two=[op.Neg(a), op.Abs(a)]), "here")


def test_nested_optional_pieces(match):
    def pattern(op, a):
        cast = op.optional("cast", a, lambda value: op.Cast(value, to=1))
        return op.Relu(op.optional("shape", cast, lambda value: op.Identity(value)))

    assert match.names(pattern, "{ c = Cast<to=1>(x) i = Identity(c) out = Relu(i) }")["a"] == "x"
    names = match.names(pattern, "{ i = Identity(x) out = Relu(i) }")
    assert names == {"cast": "absent", "shape": "present", "a": "x"}
    assert match.names(pattern, "{ out = Relu(x) }") == {"cast": "absent", "shape": "absent", "a": "x"}


def test_none_matches_an_absent_input(match):
    clip = "(float[3,5] x, float low, float high) => (float[3,5] out)"

    def upper(op, a, high):
        return op.Clip(a, None, high)

    assert match.names(upper, '{ out = Clip(x, "", high) }', clip) == {"a": "x", "high": "high"}
    assert match(upper, "{ out = Clip(x, low, high) }", clip) is None
    assert match(lambda op, a, low: op.Clip(a, low, None), "{ out = Clip(x, low) }", clip) is not None
    assert match(lambda op, a, low: op.Clip(a, low, None), "{ out = Clip(x, low, high) }", clip) is None


def test_a_variable_is_a_value_that_is_there(match):
    clip = "(float[3,5] x, float low, float high) => (float[3,5] out)"
    assert match(lambda op, a, b, c: op.Clip(a, b, c), '{ out = Clip(x, "", high) }', clip) is None


def test_maybe_binds_none_to_what_is_absent(match):
    clip = "(float[3,5] x, float low, float high) => (float[3,5] out)"

    def pattern(op, a, low, high):
        return op.Clip(a, op.maybe(low), op.maybe(high))

    assert match.names(pattern, "{ out = Clip(x) }", clip) == {"a": "x", "low": None, "high": None}
    assert match.names(pattern, '{ out = Clip(x, "", high) }', clip) == {"a": "x", "low": None, "high": "high"}
    assert match.names(pattern, "{ out = Clip(x, low, high) }", clip) == {"a": "x", "low": "low", "high": "high"}


def test_maybe_binds_none_to_an_absent_attribute(match):
    def pattern(op, a, axes):
        return op.Transpose(a, perm=op.maybe(axes))

    assert match.names(pattern, "{ out = Transpose(x) }") == {"a": "x", "axes": None}
    assert list(match.names(pattern, "{ out = Transpose<perm=[1,0]>(x) }")["axes"]) == [1, 0]
    assert match(lambda op, a, axes: op.Transpose(a, perm=axes), "{ out = Transpose(x) }") is None


def test_rest_binds_all_further_inputs(match):
    def pattern(op, a):
        return op.Max(a, op.rest("others"))

    def others(body):
        found = match(pattern, body)
        return [value.name for value in found.bindings["others"]]

    assert others("{ out = Max(x, y, z) }") == ["y", "z"]
    assert others("{ out = Max(x, y) }") == ["y"]
    assert others("{ out = Max(x) }") == []
    assert match(lambda op, a: op.Max(op.Neg(a), op.rest("others")), "{ n = Neg(x) out = Max(y, n) }") is None


def test_near_takes_a_relative_tolerance(match):
    signature = "(float[3,5] x) => (float[3,5] out) <float c = {0.79788}>"
    body = "{ out = Mul(x, c) }"
    assert match(lambda op, a: op.Mul(a, op.near(0.7978845608)), body, signature) is not None
    assert match(lambda op, a: op.Mul(a, op.near(0.7978845608, 1e-6)), body, signature) is None
    assert match(lambda op, a: op.Mul(a, 0.7978845608), body, signature) is None
    assert match(lambda op, a: op.Mul(a, op.near(-0.7978845608)), body, signature) is None


def test_any_op_binds_the_operator_that_matched(match):
    def pattern(op, a):
        return op.Neg(op.any_op("kind", ("Floor", "Ceil"), a))

    assert match.names(pattern, "{ c = Ceil(x) out = Neg(c) }") == {"kind": "Ceil", "a": "x"}
    assert match(pattern, "{ c = Round(x) out = Neg(c) }") is None


def test_a_shared_piece_is_searched_again_from_every_place(match):
    """The piece is entered from the left and known at the right; its inner order is tried again when that fails."""

    def pattern(op, a, b):
        piece = op.Mul(op.Add(a, b), op.Sub(a, b))
        return op.Concat(op.Neg(piece), op.Abs(piece), op.Relu(b), axis=0)

    signature = "(float[3,5] x, float[3,5] y, float[3,5] z) => (float[9,5] out)"
    for order in ("x, y", "y, x"):
        body = f"s = Add({order}) d = Sub(x, y) m = Mul(s, d) n = Neg(m) p = Abs(m) r = Relu(y)"
        found = match.names(pattern, f"{{ {body} out = Concat<axis=0>(n, p, r) }}", signature)
        assert found == {"a": "x", "b": "y"}


def test_a_pattern_with_pieces_shared_at_every_level_is_compiled_in_linear_size(match):
    """Each level uses the one below twice: 2^40 paths."""

    def pattern(op, a):
        value = op.Neg(a)
        for _ in range(40):
            value = op.Sub(value, value)
        return value

    body = "v0 = Neg(x)" + "".join(f" v{i + 1} = Sub(v{i}, v{i})" for i in range(39)) + " out = Sub(v39, v39)"
    assert match.names(pattern, f"{{ {body} }}") == {"a": "x"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda op, a, b: op.Relu(a), "here: the pattern never uses its parameters b"),
        (lambda op, a: a, "here: pattern must return the output of an operator"),
        (lambda op, a: [], "here: pattern must return the output of an operator"),
        (lambda op, a: None, "here: pattern must return the output of an operator, got None"),
        (lambda op, a: op.Add(a, "x"), "here: 'x' cannot be an input of a pattern"),
        (lambda op, a: op.Add(a, [1, 0.5]), r"here: \[1, 0.5\] cannot be an input"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(pattern, message):
    with pytest.raises(PassError, match=message):
        trace(pattern, "here")


def test_lower_case_operators_do_not_exist():
    with pytest.raises(
        PassError, match=r"here: <lambda> failed with AttributeError: op has no 'matmul'.*, at .*test_lang"
    ):
        trace(lambda op, a: op.matmul(a, a), "here")


SCALARS = X + " <float one = {1}, float[1] two = {2}, float[5] many = {1, 2, 3, 4, 5}>"


def test_a_scalar_is_a_constant_of_one_element_on_either_side(match):
    def pattern(op, a):
        return op.Mul(a, op.scalar("factor"))

    for body, factor in (("{ out = Mul(x, one) }", "one"), ("{ out = Mul(two, x) }", "two")):
        assert match.names(pattern, body, SCALARS) == {"a": "x", "factor": factor}
    assert match(pattern, "{ out = Mul(x, many) }", SCALARS) is None
    assert match(pattern, "{ out = Mul(x, y) }", SCALARS) is None


def test_a_variable_by_name_is_the_same_everywhere(match):
    def pattern(op):
        return op.Add(op.Exp(op.variable("a")), op.variable("a"))

    assert match.names(pattern, "{ e = Exp(x) out = Add(e, x) }") == {"a": "x"}
    assert match(pattern, "{ e = Exp(x) out = Add(e, y) }") is None


def test_anything_is_another_value_every_time(match):
    def pattern(op):
        return op.Add(op.Sub(op.anything(), op.anything()), op.anything())

    assert match(pattern, "{ d = Sub(x, y) out = Add(d, z) }") is not None
    assert match(pattern, "{ d = Sub(x, x) out = Add(d, x) }") is not None


def nested(op, value, depth):
    """Each level may have its operator or not: 2 ** depth ways."""
    for level in range(depth):
        value = op.optional(f"level{level}", value, op.Neg if level % 2 else op.Abs)
    return value


def test_alternatives_inside_of_alternatives_are_compiled_once(match):
    """They would be compiled 2 ** 40 times."""
    found = match.names(
        lambda op, a: op.Exp(nested(op, a, 40)), "{ p = Abs(x) q = Neg(p) r = Abs(q) s = Neg(r) out = Exp(s) }"
    )
    assert found["a"] == "x"
    assert [found[f"level{level}"] for level in range(36, 40)] == ["present"] * 4
    assert {found[f"level{level}"] for level in range(36)} == {"absent"}


def test_alternatives_at_several_places_are_one_choice(match):
    def pattern(op, a):
        spelled = op.any_of("kind", neg=op.Neg(a), abs=op.Abs(a))
        return op.Add(op.Exp(spelled), op.Mul(spelled, spelled))

    assert match.names(pattern, "{ n = Abs(x) e = Exp(n) m = Mul(n, n) out = Add(e, m) }") == {"a": "x", "kind": "abs"}
    assert match(pattern, "{ n = Abs(x) p = Neg(x) e = Exp(n) m = Mul(p, p) out = Add(e, m) }") is None
    assert match(pattern, "{ n = Abs(x) p = Abs(y) e = Exp(n) m = Mul(p, p) out = Add(e, m) }") is None


def test_a_choice_that_fails_at_its_second_place_is_taken_back(match):
    def pattern(op, a, b):
        either = op.any_of("kind", whole=op.Neg(a), inside=op.Neg(op.Abs(a)))
        return op.Sub(either, op.Mul(either, op.any_of("rest", same=a, other=b)))

    found = match.names(pattern, "{ p = Abs(x) n = Neg(p) m = Mul(n, x) out = Sub(n, m) }")
    assert found == {"a": "p", "b": "x", "kind": "whole", "rest": "other"}
