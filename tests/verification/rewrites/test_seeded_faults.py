"""Wrong rewrites of every kind, seeded in small graphs, are caught by numbers, and right ones raise no alarm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.completion import complete_types
from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, lossy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checking import read_model
from passopt.verification.rewrites.check import NumericCheck, Violation

FOLDER = Path(__file__).parent / "seeded"
GRAPHS = sorted(path.stem.replace("_", " ") for path in FOLDER.glob("*.txt"))


def nodes_of(model):
    found = [*model.graph.all_nodes()]
    for function in model.functions.values():
        found += function.all_nodes()
    return found


def makes(model, name):
    """The node that computes the value of this name, in whatever graph or body."""
    return next(node for node in nodes_of(model) for value in node.outputs if value.name == name)


def attribute(name, **values):
    """Another value for attributes of the node that computes `name`; None drops the attribute."""

    def change(model):
        node = makes(model, name)
        for key, value in values.items():
            node.attributes.pop(key, None)
            if value is not None:
                node.attributes[key] = _attr(key, value)

    return change


def _attr(key, value):
    if isinstance(value, str):
        return onnx_ir.AttrString(key, value)
    if isinstance(value, list):
        return onnx_ir.AttrInt64s(key, value)
    return onnx_ir.AttrFloat32(key, value) if isinstance(value, float) else onnx_ir.AttrInt64(key, value)


def operands(name, *order):
    """The inputs of a node in another order, or some of them twice."""

    def change(model):
        node = makes(model, name)
        old = list(node.inputs)
        for index, source in enumerate(order):
            node.replace_input_with(index, old[source])

    return change


def operator(name, op_type):
    """Another operator with the same inputs."""

    def change(model):
        old = makes(model, name)
        new = onnx_ir.Node("", op_type, list(old.inputs), old.attributes.values(), num_outputs=1)
        _put(model, old, new)

    return change


def _put(model, old, new):
    graph = old.graph
    graph.insert_before(old, new)
    value, made = old.outputs[0], new.outputs[0]
    made.type, made.shape = value.type, value.shape
    name = value.name
    value.replace_all_uses_with(made, replace_graph_outputs=True)
    value.name, made.name = None, name
    graph.remove(old, safe=True)


def dropped(name, source=0):
    """Readers of a node's result read its input instead, as if the node did nothing."""

    def change(model):
        old = makes(model, name)
        old.outputs[0].replace_all_uses_with(old.inputs[source])
        old.graph.remove(old, safe=True)

    return change


def constant(name, change):
    """Another number in a constant or weight."""

    def apply(model):
        for value in model.graph.initializers.values():
            if value.name == name:
                array = np.array(value.const_value.numpy())
                value.const_value = onnx_ir.tensor(np.asarray(change(array), array.dtype), name=name)
                return
        raise KeyError(name)

    return apply


def merged(name, other):
    """Readers of `name` read `other`, as if both were equal."""

    def change(model):
        makes(model, name).outputs[0].replace_all_uses_with(_value(model, other))

    return change


def _value(model, name):
    given = [*model.graph.inputs, *model.graph.initializers.values()]
    return next(
        value for value in (*given, *(out for node in nodes_of(model) for out in node.outputs)) if value.name == name
    )


def scaled(factor):
    return lambda array: array * factor


def folded(name, array):
    """The result of a node as a constant."""

    def change(model):
        old = makes(model, name)
        made = onnx_ir.Value(name=f"{name}.folded", const_value=onnx_ir.tensor(array))
        made.type, made.shape = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)), onnx_ir.Shape(array.shape)
        model.graph.register_initializer(made)
        old.outputs[0].replace_all_uses_with(made)
        old.graph.remove(old, safe=True)

    return change


def read(name, index, other):
    """One input of a node reads another value."""
    return lambda model: makes(model, name).replace_input_with(index, _value(model, other))


#: (graph, what is wrong, the change, what the pass declares)
FAULTS = [
    ("arithmetic", "swapped operands of Sub", operands("d", 1, 0), EXACT),
    ("arithmetic", "Pow as identity", dropped("p"), EXACT),
    ("arithmetic", "an exponent of 3", constant("two", scaled(1.5)), EXACT),
    ("arithmetic", "a product for a quotient", operator("q", "Mul"), EXACT),
    ("arithmetic", "a bias read twice", read("s", 0, "x"), EXACT),
    ("arithmetic", "Max for Min", operator("lo", "Max"), EXACT),
    ("arithmetic", "Relu before a graph output dropped to Abs", operator("out", "Abs"), EXACT),
    ("linear", "gate and up swapped", operands("h", 1, 1), EXACT),
    ("linear", "two different weights merged", merged("h2", "h1"), EXACT),
    ("linear", "a weight transposed", constant("w1", np.transpose), EXACT),
    ("linear", "a scale of 1 % in a reassociating pass", constant("w3", scaled(1.01)), REASSOCIATED),
    ("linear", "one channel of a lossy pass with twice its scale", constant("w3", scaled([1, 2, 1, 1])), lossy(0.02)),
    ("linear", "a bias dropped", constant("bias", scaled(0)), EXACT),
    ("linear", "an activation dropped", dropped("g1"), EXACT),
    ("gemm", "alpha lost", attribute("z", alpha=None), EXACT),
    ("gemm", "beta lost", attribute("z", beta=None), EXACT),
    ("gemm", "a bias with another sign", constant("c", scaled(-1)), EXACT),
    ("softmax11", "the axis of opset 13", attribute("s", axis=2), EXACT),
    ("softmax11", "the default axis of opset 13", attribute("s", axis=-1), EXACT),
    ("softmax13", "the default axis", attribute("s", axis=None), EXACT),
    ("softmax13", "another axis of Hardmax", attribute("h", axis=1), EXACT),
    ("softmax13", "Softmax for LogSoftmax", operator("s", "Softmax"), EXACT),
    ("reshape", "heads and channels swapped", constant("split", lambda a: a[[0, 1, 3, 2]]), EXACT),
    ("reshape", "another permutation", attribute("t", perm=[0, 1, 2, 3]), EXACT),
    ("reshape", "a target that may hold 0, after another reshape", lambda model: _reshaped_first(model), EXACT),
    ("expand", "a Slice dropped, since Expand to 1 looked like one element", dropped("s"), EXACT),
    ("expand", "an Expand dropped", dropped("w"), EXACT),
    ("expand", "an Expand to another length", constant("to", lambda a: a + [0, 1, 0]), EXACT),
    ("lengths", "the wrong axis as a length", constant("zero", lambda a: a + 1), EXACT),
    (
        "lengths",
        "a Reshape dropped, since a Cast to bool looked like a length",
        lambda model: _boolean_length(model),
        EXACT,
    ),
    ("lengths", "a length of 2 that was only recorded", folded("i", np.array([2], np.int64)), EXACT),
    ("norm", "an epsilon of 1e-5", constant("eps", scaled(10)), REASSOCIATED),
    ("norm", "the mean over another axis", constant("last", lambda a: a - 1), REASSOCIATED),
    ("norm", "a scale shifted by one channel", constant("scale", lambda a: np.roll(a, 1)), REASSOCIATED),
    ("norm", "keepdims lost and broadcast", attribute("m", keepdims=0), REASSOCIATED),
    ("layer norm", "an epsilon that is lost", attribute("y", epsilon=1e-12), REASSOCIATED),
    ("layer norm", "an axis that is lost", attribute("y", epsilon=0.1), REASSOCIATED),
    ("layer norm", "scale and bias swapped", operands("y", 0, 2, 1), REASSOCIATED),
    ("batch norm", "mean and variance swapped", operands("y", 0, 1, 2, 4, 3), REASSOCIATED),
    ("batch norm", "an epsilon of 1e-2", attribute("y", epsilon=1e-2), REASSOCIATED),
    ("batch norm", "another epsilon of the instance norm", attribute("z", epsilon=1e-3), REASSOCIATED),
    ("group norm", "another number of groups", attribute("y", num_groups=4), REASSOCIATED),
    ("attention", "a scale dropped", dropped("scaled"), REASSOCIATED),
    ("attention", "a mask dropped", dropped("masked"), REASSOCIATED),
    ("attention", "a mask of the wrong sign", constant("low", scaled(-1)), REASSOCIATED),
    ("attention", "the mask along another axis", constant("axes", lambda a: a + [0, 1]), REASSOCIATED),
    ("attention", "wrong slopes", constant("slopes", lambda a: a[::-1]), REASSOCIATED),
    ("attention", "slopes of one position further", lambda model: _shifted_columns(model), REASSOCIATED),
    ("attention", "new keys before the past", operands("present.0.key", 1, 0), REASSOCIATED),
    ("attention", "the past of the values dropped", lambda model: _without_past(model), REASSOCIATED),
    ("attention", "softmax over another axis", attribute("weights", axis=2), REASSOCIATED),
    ("attention", "a hidden position seen weakly", constant("low", lambda a: np.float32(-10)), REASSOCIATED),
    ("rotary", "sine and cosine swapped", merged("s1", "c1"), REASSOCIATED),
    ("rotary", "halves in the other order", operands("turned", 1, 0), REASSOCIATED),
    ("rotary", "the sign of a half lost", dropped("n"), REASSOCIATED),
    ("rotary", "positions off by one", lambda model: _off_by_one(model), REASSOCIATED),
    ("quantised", "zero points dropped", constant("zeros", scaled(0)), EXACT),
    ("quantised", "one scale for all channels", constant("scales", lambda a: a * 0 + 0.25), EXACT),
    ("quantised", "the scales of neighbours", constant("scales", lambda a: np.roll(a, 1)), lossy(0.02)),
    ("dynamic", "zero points ignored", lambda model: makes(model, "d").resize_inputs(2), EXACT),
    ("float8", "saturate lost", attribute("e", saturate=None), EXACT),
    ("float8", "saturate switched off", attribute("c", saturate=0), EXACT),
    ("float8", "a narrowing Cast and its way back dropped", lambda model: _read_through(model), EXACT),
    ("reductions", "the last of equal largest numbers", attribute("at", select_last_index=1), EXACT),
    ("reductions", "a mean for a sum", operator("m", "ReduceMean"), EXACT),
    ("reductions", "another axis", constant("axis", lambda a: a + 1), EXACT),
    ("scans", "an exclusive sum", attribute("s", exclusive=1), EXACT),
    ("scans", "a sum from the end", attribute("s", reverse=1), EXACT),
    ("scans", "the upper triangle", attribute("t", upper=1), EXACT),
    ("scans", "the smallest for the largest", attribute("top", largest=0), EXACT),
    ("convolution", "pads lost on one side", attribute("c", pads=[0, 0, 2, 1]), EXACT),
    ("convolution", "padding counted in a mean", attribute("a", count_include_pad=1), EXACT),
    ("convolution", "the default slope", attribute("out", alpha=None), EXACT),
    (
        "convolution",
        "another kernel of the pool",
        attribute("p", ceil_mode=0, kernel_shape=[1, 2], pads=[0, 0, 0, 0], strides=[1, 1]),
        EXACT,
    ),
    ("resize", "another coordinate mode", attribute("r", coordinate_transformation_mode="asymmetric"), EXACT),
    ("pad", "the default value", lambda model: makes(model, "p").resize_inputs(2), EXACT),
    ("pad", "another mode", attribute("p", mode="edge"), EXACT),
    ("gather", "rows off by one", constant("table", lambda a: np.roll(a, 1, axis=0)), EXACT),
    ("rows", "a row of a table as one element", folded("a", np.array([1], np.int64)), EXACT),
    ("where", "branches swapped", operands("w", 0, 2, 1), EXACT),
    ("where", "a Clip dropped", dropped("k"), EXACT),
    ("where", "a Not dropped", dropped("i"), EXACT),
    ("integers", "division towards minus infinity", lambda model: _floor_division(model), EXACT),
    ("integers", "the remainder of C", attribute("m", fmod=1), EXACT),
    ("gelu", "the tanh approximation", attribute("g1", approximate="tanh"), REASSOCIATED),
    ("gelu", "the default alpha", attribute("e", alpha=None), EXACT),
    ("einsum", "an absolute value before a product", lambda model: _absolute_operand(model), EXACT),
    ("half", "a softmax over another axis", attribute("out", axis=0), EXACT),
    ("double", "a constant rounded to fp32", constant("c", lambda a: np.float32(0.1)), EXACT),
    ("branch", "a wrong operator in a branch", operator("q1", "Neg"), EXACT),
    ("branch", "the other branch dropped to the same", operator("p1", "Abs"), EXACT),
    ("loop", "another operator in a body", operator("u", "Sub"), EXACT),
    ("loop", "one round less", constant("count", lambda a: a - 1), EXACT),
    ("sequence", "parts in the other order", operands("s", 1, 0), EXACT),
    ("function", "a wrong constant in a function", lambda model: _function_constant(model), EXACT),
]

#: Faults beyond what a graph compares with, or beyond small numbers: (text, the value, what replaces it).
LIMITS = [
    ("(int64[n] x) => (int64[n] y) { a = Cast <to = 3> (x) y = Cast <to = 7> (a) }", "y", "x"),
    ("(int64[n] x) => (int64[n] y) { a = Cast <to = 6> (x) y = Cast <to = 7> (a) }", "y", "x"),
    ("(int64[n] x) => (int64[n] y) { a = Cast <to = 1> (x) y = Cast <to = 7> (a) }", "y", "x"),
    ("(int32[n] x) => (int32[n] y) { a = Cast <to = 1> (x) y = Cast <to = 6> (a) }", "y", "x"),
    ("(int64[n] x) => (int64[n] y) <int64 k = {5}, int64 o = {6}> {y = Div(x, k) u = Div(x, o) }", "y", "u"),
    ("(int64[n] x) => (int64[n] y) <int64 k = {70000}> { y = Min(x, k) }", "y", "x"),
    ("(float[n] x) => (float[n] y) <float l = {-300000}, float h = {300000}> { y = Clip(x, l, h) }", "y", "x"),
    ("(float[2] x) => (float[2] y) <float l = {-300000}, float h = {300000}> { y = Clip(x, l, h) }", "y", "x"),
    ("(float[n] x) => (bool[n] y) <float h = {1000}, float t = {1001}> { y = Less(x, h) u = Less(x, t) }", "y", "u"),
    (
        "(float[n] x) => (int64[1] y) <int64 k = {30}> { a = Shape(x) b = Min(a, k) y = Neg(b) u = Neg(a) }",
        "y",
        "u",
    ),
    (
        "(float[n,m] x) => (int64[2] y) <int64 k = {64}> { a = Shape(x) b = Min(a, k) y = Neg(b) u = Neg(a) }",
        "y",
        "u",
    ),
    (
        "(float[n] x) => (float[k] y) <int64[1] s = {0}, int64[1] e = {200}> { y = Slice(x, s, e) }",
        "y",
        "x",
    ),
    (
        "(int64[n] position_ids) => (float[n,2] y) <float[100,2] t = random, float[100,1] w = random> "
        "{ a = Gather(t, position_ids) b = Gather(w, position_ids) c = Mul(b, b) y = Mul(a, c) }",
        "w",
        "its last row",
    ),
]

NESTED = """(float[2] x, bool a, bool b) => (float[2] y) { y = If <
    then_branch = t () => (float[2] s) { s = If <
        then_branch = t2 () => (float[2] u) { u = Neg(x) }, else_branch = e2 () => (float[2] q) { q = Exp(x) }> (b) },
    else_branch = e () => (float[2] v) { v = Abs(x) }> (a) }"""
IN_A_ROW = """(float[2] x, bool a, bool b, bool c) => (float[2] y) {
    h = If <then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Exp(x) }> (a)
    i = If <then_branch = t2 () => (float[2] r) { r = Neg(h) }, else_branch = e2 () => (float[2] s) { s = Relu(h) }> (b)
    y = If <then_branch = t3 () => (float[2] u) { u = Tanh(i) },
        else_branch = e3 () => (float[2] v) { v = Neg(i) }> (c) }"""
CHOSEN = """{ y = If <then_branch = t () => (float[2] p) { p = Neg(x) },
    else_branch = e () => (float[2] q) { q = Exp(x) }> (CONDITION) }"""
#: Faults in a branch that runs only for some conditions: (text, the value in the branch, another operator for it).
BRANCHES = [
    (NESTED, "q", "Relu"),
    (NESTED, "u", "Abs"),
    (IN_A_ROW, "s", "Abs"),
    ("(float[2] x, bool[1] c) => (float[2] y) " + CHOSEN.replace("CONDITION", "c"), "q", "Relu"),
    ("(float[2] x, bool[1] c) => (float[2] y) " + CHOSEN.replace("CONDITION", "c"), "p", "Relu"),
    (
        "(float[2] x, float[1] f) => (float[2] y) "
        + CHOSEN.replace("CONDITION", "c").replace("{ y", "{ c = Cast <to = 9> (f) y", 1),
        "q",
        "Relu",
    ),
    (
        "(float[2] x, int64 mode) => (float[2] y) <int64 k = {5}> "
        + CHOSEN.replace("CONDITION", "c").replace("{ y", "{ c = Equal(mode, k) y", 1),
        "p",
        "Relu",
    ),
]


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: f"{branch[1]} of {branch[0][:40]}")
def test_faults_in_rare_branches_are_caught(branch):
    text, name, op_type = branch
    model = read_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')

    def change(model):
        makes(model, name).op_type = op_type

    with pytest.raises(Violation, match="seeded: "):
        checked(model, [seeded(change, EXACT)])


def test_a_branch_that_no_sample_runs_is_reported():
    text = """(float[2] x) => (float[2] y) <float k = {-1}> { s = ReduceSumSquare <keepdims = 0> (x)
        c = Less(s, k) z = Neg(x) y = If <then_branch = t () => (float[2] p) { p = Neg(z) },
        else_branch = e () => (float[2] q) { q = Exp(z) }> (c) }"""
    model = read_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    (summary,) = checked(model, [seeded(lambda model: None, EXACT)])
    assert "the then_branch of If If_3 (y) ran in no sample" in summary.unchecked


def test_strings_in_a_cut_are_constants():
    text = """(string[n] x) => (bool[n] y) <string[1] k = {"s1"}> { e = Identity(k) f = Equal(x, e) y = Identity(f) }"""
    model = read_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    assert any(item.sites for item in checked(model, resolve("fold-constants,canonicalize", complete=False).passes))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit[0][:60])
def test_faults_beyond_the_limits_of_a_graph_are_caught(limit):
    text, name, other = limit
    model = read_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')

    def change(model):
        if other == "its last row":
            constant(name, lambda array: np.concatenate([array[:-1], array[-1:] + 1]))(model)
            return
        new = onnx_ir.node("Identity", [_value(model, other)])
        old = makes(model, name)
        _put(model, old, new)
        model.graph.remove(new)
        model.graph.append(new)

    assert checked(model.clone(), [seeded(lambda model: None, EXACT)])
    with pytest.raises(Violation, match="seeded: "):
        checked(model, [seeded(change, EXACT)])


def _reshaped_first(model):
    """Reshape to the runtime target after a Reshape to one row: a 0 in the target means another axis then."""
    node = makes(model, "f")
    row = onnx_ir.Value(name="row", const_value=onnx_ir.tensor(np.array([1, -1], np.int64)))
    row.type, row.shape = onnx_ir.TensorType(onnx_ir.DataType.INT64), onnx_ir.Shape([2])
    model.graph.register_initializer(row)
    first = onnx_ir.node("Reshape", [node.inputs[0], row])
    first.outputs[0].name = "first"
    node.graph.insert_before(node, first)
    node.replace_input_with(0, first.outputs[0])


def _boolean_length(model):
    node = makes(model, "t")
    first = onnx_ir.node("Cast", [node.inputs[0]], {"to": 9})
    second = onnx_ir.node("Cast", first.outputs, {"to": 7})
    first.outputs[0].name, second.outputs[0].name = "bool", "number"
    node.graph.insert_before(node, [first, second])
    node.replace_input_with(0, second.outputs[0])


def _shifted_columns(model):
    node = makes(model, "range")
    value = onnx_ir.Value(name="from.one", const_value=onnx_ir.tensor(np.array(-1, np.int64)))
    value.type, value.shape = onnx_ir.TensorType(onnx_ir.DataType.INT64), onnx_ir.Shape([])
    model.graph.register_initializer(value)
    moved = onnx_ir.node("Sub", [node.outputs[0], value])
    moved.outputs[0].name = "moved"
    squared = onnx_ir.node("Mul", [moved.outputs[0], node.outputs[0]])
    squared.outputs[0].name = "squared"
    user = makes(model, "columns")
    node.graph.insert_after(node, [moved, squared])
    user.replace_input_with(0, squared.outputs[0])


def _without_past(model):
    """Doubles the new values instead of joining them to the past, which fits only where both are equally long."""
    node = makes(model, "values")
    node.replace_input_with(0, node.inputs[1])


def _off_by_one(model):
    gather = makes(model, "c")
    one = onnx_ir.Value(name="shift", const_value=onnx_ir.tensor(np.array(1, np.int64)))
    one.type, one.shape = onnx_ir.TensorType(onnx_ir.DataType.INT64), onnx_ir.Shape([])
    model.graph.register_initializer(one)
    moved = onnx_ir.node("Sub", [gather.inputs[1], one])
    moved.outputs[0].name = "moved"
    gather.graph.insert_before(gather, moved)
    gather.replace_input_with(1, moved.outputs[0])


def _read_through(model):
    makes(model, "w").outputs[0].replace_all_uses_with(model.graph.inputs[0])


def _floor_division(model):
    """`(x - x mod 3) / 3` with the remainder of Python, which differs for negative numbers only."""
    node, remainder = makes(model, "d"), makes(model, "m")
    less = onnx_ir.node("Sub", [node.inputs[0], remainder.outputs[0]])
    less.outputs[0].name = "less"
    node.graph.remove(remainder)
    node.graph.insert_before(node, [remainder, less])
    node.replace_input_with(0, less.outputs[0])


def _absolute_operand(model):
    node = makes(model, "z")
    positive = onnx_ir.node("Abs", [node.inputs[0]])
    positive.outputs[0].name = "positive"
    node.graph.insert_before(node, positive)
    node.replace_input_with(0, positive.outputs[0])


def _function_constant(model):
    (function,) = [item for item in model.functions.values() if item.name == "f"]
    node = next(node for node in function if node.op_type == "Constant")
    node.attributes["value_float"] = onnx_ir.AttrFloat32("value_float", 2.5)


def seeded(change, accuracy):
    def run(self, model):
        change(model)
        return PassResult(modified=True, matches=1)

    made = type("Seeded", (Pass,), {"run": run, "accuracy": accuracy})
    made.name = "seeded"
    return made()


def read_graph(name):
    model = read_model((FOLDER / f"{name.replace(' ', '_')}.txt").read_text())
    complete_types(model)
    return model


def checked(model, passes):
    watch = NumericCheck()
    run_passes(model, passes, instruments=[watch], verify=False)
    return watch.summaries


def test_there_are_enough_faults():
    assert len(FAULTS) >= 60
    assert {name for name, *_ in FAULTS} == set(GRAPHS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1]}")
def test_a_seeded_fault_is_caught(fault):
    name, _, change, accuracy = fault
    with pytest.raises(Violation, match="seeded: "):
        checked(read_graph(name), [seeded(change, accuracy)])


PASSES = (
    "legalize,fold-constants,canonicalize,cse,inline-functions,fuse-rms-norm,fuse-rotary,fuse-attention,"
    "decompose-rms-norm,decompose-rotary,decompose-attention,decompose-activations,dead-code"
)


@pytest.mark.parametrize("name", GRAPHS)
def test_right_rewrites_raise_no_alarm(name):
    model = read_graph(name)
    for item in resolve(PASSES, complete=False).passes:
        changed = model.clone()
        try:
            item.run(changed)
        except PassError:  # what a pass refuses, it does not rewrite
            continue
        (summary,) = checked(model, [item])
        assert not summary.sites or summary.worst <= summary.budget
