"""A rewrite that changes a type or shape, drops a graph output or touches what others read is stopped, with pass, rule
and site in the message. The graph may be any: here each rule does one thing wrong."""

from __future__ import annotations

import re

import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.runner import run_passes

X = "g (float[batch,seq,5] x, float[batch,seq,5] y)"
BODY = "[one] a = Neg(x) [two] b = Abs(a) [three] c = Add(b, y) [four] shared = Mul(a, y)"
OUTPUTS = "=> (float[batch,seq,5] c, float[batch,seq,5] shared)"


@pytest.fixture
def stopped(rule, parsed, source_line):
    """The message without the rule's place, which must come first."""

    def run(rewrite, text=f"{X} {OUTPUTS} {{ {BODY} }}"):
        def pattern(self, op, x):
            return op.Abs(op.Neg(x))

        with pytest.raises(VerifyError) as error:
            run_passes(parsed(text), [rule(pattern, rewrite)])
        message = str(error.value)
        place = f"test-rule ({source_line(pattern)}): "
        assert message.startswith(place), message
        return message.removeprefix(place)

    return run


def test_another_dtype(stopped):
    message = stopped(lambda self, op, x: op.Cast(op.Abs(x), to=11))
    assert message.startswith("would replace 'b' (FLOAT) by 'b.cast' (DOUBLE); a rewrite must keep the dtype")


@pytest.mark.parametrize(
    ("rewrite", "shape"),
    [
        (lambda self, op, x: op.Slice(op.Abs(x), [0], [4], [2]), "[batch,seq,4]"),
        (lambda self, op, x: op.Unsqueeze(op.Abs(x), [0]), "[1,batch,seq,5]"),
        (lambda self, op, x: op.Transpose(op.Abs(x), perm=[1, 0, 2]), "[seq,batch,5]"),
    ],
)
def test_another_shape(stopped, rewrite, shape):
    message = stopped(rewrite)
    assert re.match(r"would replace 'b' of shape \[batch,seq,5\] by 'b\.\w+' of shape ", message)
    assert f"of shape {shape}; a rewrite must keep the shape" in message


def states(dtype=None, dims=None):
    def rewrite(self, op, x):
        result = op.Slice(op.Abs(x), [0], [4], [2])
        if dims is not None:
            result.shape = onnx_ir.Shape(dims)
        if dtype is not None:
            result.type = onnx_ir.TensorType(dtype)
        return result

    return rewrite


def test_a_false_statement_about_a_result(stopped):
    """Saying what was expected is no way around: the operator gives something else."""
    message = stopped(states(dims=["batch", "seq", 5]))
    assert message.startswith("states [batch,seq,5] for 'b.slice', Slice gives [batch,seq,4]")
    message = stopped(states(dtype=onnx_ir.DataType.DOUBLE, dims=["batch", "seq", 4]))
    assert message.startswith("states DOUBLE for 'b.slice', Slice gives FLOAT")


def matched(op, x):
    """The Neg that the pattern matched: `shared` reads it too."""
    (neg,) = [node for node in x.consumers() if node.op_type == "Neg"]
    return neg


def removes(self, op, x):
    neg = matched(op, x)
    neg.graph.remove(neg)
    return op.Abs(x)


def test_removing_a_node_that_others_read(stopped):
    message = stopped(removes)
    assert message.startswith("its rewrite at 'b' removed Neg 'one', which two, four still read. A rule only builds")


def test_removing_is_no_part_of_declining_either(stopped):
    def rewrite(self, op, x):
        removes(self, op, x)
        raise Decline("no")

    assert stopped(rewrite).startswith("its rewrite at 'b' removed Neg 'one'")


def test_changing_a_node_that_others_read(stopped):
    def rewrite(self, op, x):
        neg = matched(op, x)
        neg.op_type = "Exp"
        return op.Abs(x)

    assert stopped(rewrite).startswith("its rewrite at 'b' changed Neg 'one', which two, four still read")


def test_changing_an_attribute_or_a_name(stopped):
    def attribute(self, op, x):
        matched(op, x).attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
        return op.Abs(x)

    def name(self, op, x):
        matched(op, x).outputs[0].name = "renamed"
        return op.Abs(x)

    for rewrite in (attribute, name):
        assert stopped(rewrite).startswith("its rewrite at 'b' changed Neg 'one'")


def test_giving_readers_of_a_shared_value_another_one(stopped):
    def rewrite(self, op, x):
        matched(op, x).outputs[0].replace_all_uses_with(x)
        return op.Abs(x)

    assert stopped(rewrite).startswith("its rewrite at 'b' changed Abs 'two'")

    def others(self, op, x):
        value = matched(op, x).outputs[0]
        for use in value.uses():
            if use.node.op_type == "Mul":
                use.node.replace_input_with(use.idx, x)
        return op.Abs(x)

    assert stopped(others).startswith("its rewrite at 'b' changed who reads ")


def test_dropping_a_graph_output(stopped):
    def rewrite(self, op, x):
        graph = matched(op, x).graph
        graph.outputs.pop()
        return op.Abs(x)

    assert stopped(rewrite).startswith("its rewrite at 'b' dropped the graph output 'shared'")


def test_another_node_than_those_matched(stopped):
    def rewrite(self, op, x):
        graph = matched(op, x).graph
        graph.append(onnx_ir.node("Exp", [x]))
        return op.Abs(x)

    assert stopped(rewrite).startswith("its rewrite at 'b' changed who reads 'x'")


def test_a_rewrite_that_only_builds_is_left_alone(rule, parsed):
    item = rule(lambda self, op, x: op.Abs(op.Neg(x)), lambda self, op, x: op.Max(x, op.Sub(0.0, x)))
    (record,) = run_passes(parsed(f"{X} {OUTPUTS} {{ {BODY} }}"), [item])
    assert record.result.matches == 1


def whole(name, run, **facts):
    made = type("Made", (Pass,), {"run": lambda self, model: run(model) or PassResult(modified=True), **facts})
    made.name = name
    return made()


def test_a_whole_graph_pass_that_drops_an_output_is_stopped(parsed):
    model = parsed(f"{X} {OUTPUTS} {{ {BODY} }}")
    with pytest.raises(VerifyError) as error:
        run_passes(model, [whole("dropper", lambda model: model.graph.outputs.pop() and None)])
    assert str(error.value) == "dropper left a broken graph (passes before it: none): graph output 'shared' is gone"


def test_a_pass_that_changes_the_interface_says_so(parsed):
    def narrow(model):
        model.graph.outputs.pop()

    item = whole("narrow", narrow, changes_interface=True)
    run_passes(parsed(f"{X} {OUTPUTS} {{ {BODY} }}"), [item])
