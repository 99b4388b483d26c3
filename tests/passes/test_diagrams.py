"""Diagrams of patterns and of code: every kind of piece, what is shared, and what cannot be drawn."""

from __future__ import annotations

import pytest

from passopt.passes.diagrams import code_trees, draw, pattern_trees
from passopt.passes.pattern import trace


def drawn(method):
    return ["\n".join(draw(tree)) for tree in pattern_trees(trace(method, "here"))]


def text(*lines):
    return "\n".join(lines)


def test_a_tree_has_inputs_below_the_operator():
    assert drawn(lambda op, x, w: op.Add(op.MatMul(x, op.weight(w)), 0.5)) == [
        text("Add  either order", "├─ MatMul", "│  ├─ x", "│  └─ w  a weight of the checkpoint", "└─ 0.5")
    ]


def test_every_kind_of_piece_is_named():
    def pattern(op, x, b, axis, mode):
        scaled = op.Mul(x, op.scalar("scale"))
        gathered = op.Gather(scaled, op.anything(), axis=axis)
        joined = op.Concat(gathered, op.rest("others"), axis=-1)
        clipped = op.Clip(joined, None, op.near(6.0), bind="bounded")
        shaped = op.Reshape(clipped, [0, -1], allowzero=op.maybe(mode))
        return op.node("Fused", shaped, op.maybe(b), domain="own")

    assert drawn(pattern) == [
        text(
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
    ]


def test_alternatives_have_their_labels_and_shared_nodes_are_drawn_once():
    def pattern(op, x):
        root = op.Sqrt(x)
        inverse = op.any_of("inverse", reciprocal=op.Reciprocal(root), quotient=op.Div(1, root))
        return op.Mul(x, inverse), op.Neg(inverse)

    assert drawn(pattern) == [
        text(
            "root 1: Mul  either order",
            "├─ x",
            "└─ one of, as 'inverse'  #1",
            "   ├─ reciprocal: Reciprocal",
            "   │  └─ Sqrt  #2",
            "   │     └─ x",
            "   └─ quotient: Div",
            "      ├─ 1",
            "      └─ Sqrt  → #2 above",
        ),
        text("root 2: Neg", "└─ one of, as 'inverse'  → #1 above"),
    ]


def test_outputs_of_one_node_say_which_they_are():
    assert drawn(lambda op, x, n: op.Split(x, n, outputs=2)) == [
        text("root 1: Split  output 1 of 2  #1", "├─ x", "└─ n"),
        "root 2: Split  output 2 of 2  → #1 above",
    ]


def test_code_is_drawn_statement_by_statement():
    first, second = code_trees("y, k = Attention(q, Concat(a, b, axis=2), scale=s); z = Relu(y)")
    assert draw(first) == ["y, k ← Attention(scale=s)", "├─ q", "└─ Concat(axis=2)", "   ├─ a", "   └─ b"]
    assert draw(second) == ["z ← Relu", "└─ y"]
    assert first.as_json() == {
        "label": "y, k ← Attention(scale=s)",
        "inputs": [{"label": "q"}, {"label": "Concat(axis=2)", "inputs": [{"label": "a"}, {"label": "b"}]}],
    }


@pytest.mark.parametrize("code", ["q·√s", "a = Cos(t) …", "for x in y: pass", "a = b = c(d)"])
def test_what_is_no_code_is_not_drawn(code):
    assert code_trees(code) is None
