"""Diagrams of patterns and of code: every kind of piece, what is shared, and what cannot be drawn."""

from __future__ import annotations

import pytest

from passopt.passes.explain.diagrams import code_trees, diagram, draw
from passopt.passes.patterns.language import trace


def drawn(method):
    return "\n".join(diagram(trace(method, "here")).lines())


def text(*lines):
    return "\n".join(lines)


def test_a_tree_has_inputs_below_the_operator():
    assert drawn(lambda op, x, w: op.Add(op.MatMul(x, op.weight(w)), 0.5)) == text(
        "Add  either order", "├─ MatMul", "│  ├─ x", "│  └─ w  a weight of the checkpoint", "└─ 0.5"
    )


def test_every_kind_of_piece_is_named():
    def pattern(op, x, b, axis, mode):
        scaled = op.Mul(x, op.scalar("scale"))
        gathered = op.Gather(scaled, op.anything(), axis=axis)
        joined = op.Concat(gathered, op.rest("others"), axis=-1)
        clipped = op.Clip(joined, None, op.near(6.0), bind="bounded")
        shaped = op.Reshape(clipped, [0, -1], allowzero=op.maybe(mode))
        return op.node("Fused", shaped, op.maybe(b), domain="own")

    assert drawn(pattern) == text(
        "own.Fused",
        "├─ Reshape(allowzero=mode, if it is there)",
        "│  ├─ Clip  as 'bounded'",
        "│  │  ├─ Concat(axis=-1)",
        "│  │  │  ├─ Gather(axis=axis)",
        "│  │  │  │  ├─ Mul  either order",
        "│  │  │  │  │  ├─ x",
        "│  │  │  │  │  └─ scale  a constant number",
        "│  │  │  │  └─ any value",
        "│  │  │  └─ others …  all further inputs",
        "│  │  ├─ absent",
        "│  │  └─ ≈ 6",
        "│  └─ [0, -1]",
        "└─ b  if it is there",
    )


def test_alternatives_have_labels_and_what_is_shared_is_a_part_of_its_own():
    def pattern(op, x):
        root = op.Sqrt(x)
        inverse = op.any_of("inverse", reciprocal=op.Reciprocal(root), quotient=op.Div(1, root))
        return op.Mul(x, op.optional("narrowed", inverse, op.Cast))

    assert drawn(pattern) == text(
        "Mul  either order",
        "├─ x",
        "└─ one of, as 'narrowed'",
        "   ├─ present: Cast",
        "   │  └─ ‹inverse›",
        "   └─ absent: ‹inverse›",
        "",
        "‹inverse› one of, as 'inverse'",
        "├─ reciprocal: Reciprocal",
        "│  └─ ‹Sqrt›",
        "└─ quotient: Div",
        "   ├─ 1",
        "   └─ ‹Sqrt›",
        "",
        "‹Sqrt› Sqrt",
        "└─ x",
    )


def test_parts_of_one_name_are_told_apart():
    def pattern(op, x):
        one, other = op.Neg(x), op.Neg(op.Abs(x))
        return op.Concat(one, one, other, other, axis=0)

    assert drawn(pattern).splitlines()[:5] == ["Concat(axis=0)", "├─ ‹Neg›", "├─ ‹Neg›", "├─ ‹Neg 2›", "└─ ‹Neg 2›"]


def test_several_roots_say_which_output_they_are():
    def pattern(op, x, n):
        first, second = op.Split(x, n, outputs=2)
        return op.Relu(first), second

    assert drawn(pattern) == text(
        "root 1: Relu",
        "└─ ‹Split›  output 1 of 2",
        "root 2: ‹Split›  output 2 of 2",
        "",
        "‹Split› Split",
        "├─ x",
        "└─ n",
    )


def test_a_diagram_as_data_has_roots_and_parts():
    def pattern(op, x):
        root = op.Sqrt(x)
        return op.Add(root, root)

    assert diagram(trace(pattern, "here")).to_json() == {
        "roots": [{"label": "Add  either order", "inputs": [{"label": "‹Sqrt›"}, {"label": "‹Sqrt›"}]}],
        "parts": [{"label": "‹Sqrt› Sqrt", "inputs": [{"label": "x"}]}],
    }


def test_code_is_drawn_statement_by_statement():
    first, second = code_trees("y, k = Attention(q, Concat(a, b, axis=2), scale=s); z = Relu(y)")
    assert draw(first) == ["y, k ← Attention(scale=s)", "├─ q", "└─ Concat(axis=2)", "   ├─ a", "   └─ b"]
    assert draw(second) == ["z ← Relu", "└─ y"]
    assert first.to_json() == {
        "label": "y, k ← Attention(scale=s)",
        "inputs": [{"label": "q"}, {"label": "Concat(axis=2)", "inputs": [{"label": "a"}, {"label": "b"}]}],
    }


@pytest.mark.parametrize("code", ["q·√s", "a = Cos(t) …", "for x in y: pass", "a = b = c(d)"])
def test_what_is_no_code_is_not_drawn(code):
    assert code_trees(code) is None
