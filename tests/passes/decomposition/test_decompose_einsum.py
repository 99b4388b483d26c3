"""Einsums of two tensors become MatMuls of the same numbers, or stay with the reason."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir
import pytest

from passopt.passes.decomposition.decompose_einsum import DecomposeEinsum
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import read_model
from passopt.testing.peer_graphs import peer_graphs

HEADER = '<ir_version: 10, opset_import: ["" : 18]>'
LENGTHS = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 7, "f": 1}


def einsum(equation: str, dtype: str = "float") -> onnx_ir.Model:
    left, right = equation.partition("->")[0].split(",")
    x, y, z = (f"{dtype}[{','.join(letters)}]" for letters in (left, right, equation.partition("->")[2]))
    return read_model(f'{HEADER} g ({x} x, {y} y) => ({z} z) {{ z = Einsum<equation="{equation}">(x, y) }}')


def check_equal(model: onnx_ir.Model, shapes: tuple[tuple[int, ...], ...]) -> onnx_ir.Model:
    changed = model.clone()
    assert DecomposeEinsum().run(changed).matches == 1
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in zip("xy", shapes, strict=True)}
    # The kernel of onnxruntime for Einsum does not survive empty inputs.
    equation = next(iter(model.graph)).attributes["equation"].as_string()
    expected, found = np.einsum(equation, *feeds.values()), Session(changed, optimize=False).run(feeds)["z"]
    assert expected.shape == found.shape
    assert np.allclose(expected, found, rtol=1e-5, atol=1e-5)
    if all(value.size for value in feeds.values()):
        assert np.allclose(Session(model, optimize=False).run(feeds)["z"], found, rtol=1e-5, atol=1e-5)
    return changed


@pytest.mark.parametrize(
    "equation",
    [
        *("ab,bc->ac", "ab,bc->ca", "ab,cb->ac", "ba,bc->ac", "abc,ce->abe", "abc,cd->dba", "ce,abc->abe"),
        *("aecd,abcd->acbe", "acbe,aecd->abcd", "abcd,aecd->acbe", "abcd,aecd->acbe", "abc,aec->abe", "cab,dca->cbd"),
    ],
)
def test_products_are_matmuls(equation: str) -> None:
    """Over unequal lengths, one, and empty axes."""
    left, right = equation.partition("->")[0].split(",")
    model = einsum(equation)
    for changes in ({}, {"a": 1}, {"b": 1, "e": 1}, {"c": 1, "d": 1}, {"a": 0}, {"b": 0}):
        sizes = {**LENGTHS, **changes}
        changed = check_equal(model, tuple(tuple(sizes[letter] for letter in letters) for letters in (left, right)))
        assert {node.op_type for node in changed.graph} <= {"MatMul", "Transpose"}


@pytest.mark.parametrize(
    "equation",
    ["abdce,abfe->abdcf", "abfe,abdce->abdcf", "abe,acde->abcd", "abe,bcd->acde", "abe,acde->dbac", "abde,acfe->bdacf"],
)
def test_several_axes_of_both_tensors_are_stretched_over(equation: str) -> None:
    """As the groups of heads that share keys; over unequal lengths, one, and empty axes."""
    left, right = equation.partition("->")[0].split(",")
    model = einsum(equation)
    for changes in ({}, {"a": 1}, {"b": 1, "e": 1}, {"c": 1, "d": 1}, {"a": 0}, {"c": 0}):
        sizes = {**LENGTHS, **changes}
        changed = check_equal(model, tuple(tuple(sizes[letter] for letter in letters) for letters in (left, right)))
        assert {node.op_type for node in changed.graph} <= {"MatMul", "Transpose", "Unsqueeze"}


@pytest.mark.parametrize(
    ("equation", "other"),
    [("bshk,hkd->bsd", "3,4,5"), ("bshk,dhk->bsd", "5,3,4"), ("bshk,hkd->dbs", "3,4,d"), ("bshk,bhkd->bsd", "b,3,4,5")]
    + [("bshk,kdhe->bsde", "4,5,3,2"), ("bshk,kbhd->bsd", "4,b,3,d"), ("hkbs,hkbd->bsd", "3,4,b,d")],
)
def test_several_summed_axes_become_one(equation: str, other: str) -> None:
    """As in the projection of attention that joins its heads."""
    left, _, result = equation.replace("->", ",").split(",")
    known = {"h": "3", "k": "4", **dict(zip(equation.split("->")[0].split(",")[1], other.split(","), strict=True))}
    shape = ",".join(known.get(letter, letter) for letter in left)
    made = ",".join(known.get(letter, letter) for letter in result)
    node = f'z = Einsum<equation="{equation}">(x, y)'
    model = read_model(f"{HEADER} g (float[{shape}] x, float[{other}] y) => (float[{made}] z) {{ {node} }}")
    for b, s, d in ((2, 3, 5), (1, 1, 1), (0, 3, 2), (2, 0, 3)):
        sizes = {"b": b, "s": s, "d": d}
        taken = tuple(
            tuple(sizes[axis] if axis.isalpha() else int(axis) for axis in axes.split(",")) for axes in (shape, other)
        )
        check_equal(model, taken)


def test_the_matrix_of_a_weight_may_have_a_symbol_for_rows() -> None:
    node = 'z = Einsum<equation="bsd,dhk->bshk">(x, y)'
    model = read_model(f"{HEADER} g (float[b,s,d] x, float[d,2,4] y) => (float[b,s,2,4] z) {{ {node} }}")
    for d in (6, 1, 0):
        changed = check_equal(model, ((2, 3, d), (d, 2, 4)))
        assert [item.op_type for item in changed.graph] == ["Reshape", "MatMul", "Reshape"]


def test_a_batch_of_one_is_stretched_by_both() -> None:
    node = 'z = Einsum<equation="aqd,akd->aqk">(x, y)'
    model = read_model(f"{HEADER} g (float[a,q,4] x, float[b,k,4] y) => (float[c,q,k] z) {{ {node} }}")
    for one, other in itertools.product((1, 3), repeat=2):
        check_equal(model, ((one, 2, 4), (other, 5, 4)))


@pytest.mark.parametrize("order", ["abde", "deab", "adbe"])
def test_axes_of_a_weight_become_one(order: str) -> None:
    sizes = {"a": "a", "b": "b", "d": "2", "e": "4"}
    result = ",".join(sizes[letter] for letter in order)
    model = read_model(
        f"{HEADER} g (float[a,b,6] x, float[6,2,4] y) => (float[{result}] z) "
        f'{{ z = Einsum<equation="abc,cde->{order}">(x, y) }}'
    )
    for a, b in ((2, 3), (1, 1), (0, 3), (2, 0)):
        changed = check_equal(model, ((a, b, 6), (6, 2, 4)))
        assert any(node.op_type == "Reshape" for node in changed.graph)


@pytest.mark.parametrize(
    ("equation", "inputs", "result", "reason"),
    [
        ("ab->b", ["a,b"], "b", "joins 1 tensors"),
        ("ab,bc->a", ["a,b", "b,c"], "a", "sums over 'c'"),
        ("aa,ac->ac", ["a,a", "a,c"], "a,c", "repeats a letter"),
        ("ab,bc", ["a,b", "b,c"], "a,c", "letters for all axes"),
        ("...b,bc->...c", ["a,b", "b,c"], "a,c", "letters for all axes"),
        ("ab,bc->ac", ["a,b", "c,d"], "a,d", "proven equal: b and c"),
        ("ab,bc->ac", ["a,?", "?,d"], "a,d", "proven equal: ? and ?"),
        ("ab,ab->ab", ["a,b", "a,b"], "a,b", "an axis to sum over"),
        ("abc,bce->ae", ["a,b,4", "b,4,e"], "a,e", "the length of 'b' is b, not a number"),
        ("ab,b->a", ["a,b", "b"], "a", "an axis of each tensor"),
        ("abc,bcea->abe", ["a,b,c", "b,c,e,a"], "a,b,e", "an axis of each tensor"),
    ],
)
def test_what_is_no_single_product_stays(equation: str, inputs: list[str], result: str, reason: str) -> None:
    names = "xy"[: len(inputs)]
    given = ", ".join(f"float[{axes}] {name}" for axes, name in zip(inputs, names, strict=True))
    node = f'z = Einsum<equation="{equation}">({", ".join(names)})'
    check_stays(read_model(f"{HEADER} g ({given}) => (float[{result}] z) {{ {node} }}"), reason)


def test_integers_stay() -> None:
    check_stays(einsum("ab,bc->ac", "int32"), "floats of one dtype")


def check_stays(model: onnx_ir.Model, reason: str) -> None:
    result = DecomposeEinsum().run(model)
    assert not result.modified
    assert [node.op_type for node in model.graph] == ["Einsum"]
    (told,) = result.declines
    assert reason in told


def test_attention_that_is_spelled_by_einsum_is_fused() -> None:
    from passopt.passes import resolve, run_passes

    graph = next(graph for graph in peer_graphs() if "Einsum" in graph.name)
    model = read_model(graph.text)
    run_passes(model, resolve("fuse").passes)
    assert sum(node.op_type == "Attention" for node in model.graph) == 1
