"""A listener sees each replacement while the graph still holds the old nodes, and may stop it."""

from __future__ import annotations

import pytest

from passopt.ir.graph.editor import Editor
from passopt.ir.graph.run_context import listening
from passopt.ir.serialization.text import parse_model, print_model

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[3] x) => (float[3] y) { a = Neg(x) y = Relu(a) }'


class Recorder:
    def __init__(self, error=None):
        self.events = []
        self.error = error

    def on_replace(self, event):
        (old,) = event.replaced
        self.events.append((event, len(old.uses()), [node.graph for node in event.built.nodes]))
        if self.error:
            raise self.error


@pytest.fixture
def model():
    return parse_model(TEXT)


def replace(model, **settings):
    editor = Editor(model, "mine")
    op = editor.builder("a")
    old = model.graph[0].outputs[0]
    editor.replace({old: op.Sub(0.0, model.graph.inputs[0])}, op.built, [model.graph[0]], **settings)


def test_a_replacement_is_announced_before_anything_changes(model):
    recorder = Recorder()
    neg = model.graph[0]
    with listening(model, recorder):
        replace(model)
    ((event, uses, graphs),) = recorder.events
    assert (event.rule, event.matched, uses, graphs) == ("mine", (neg,), 1, [None])


def test_a_rule_speaks_for_itself(model):
    recorder = Recorder()
    with listening(model, recorder):
        replace(model, rule="mine (rules.py:3)")
    assert recorder.events[0][0].rule == "mine (rules.py:3)"


def test_a_listener_stops_a_replacement_by_raising(model):
    before = print_model(model)
    with listening(model, Recorder(ValueError("no"))), pytest.raises(ValueError, match="no"):
        replace(model)
    assert print_model(model) == before


def test_following_a_value_is_announced_too(model):
    recorder = Recorder()
    editor = Editor(model, "mine")
    op = editor.builder("a")
    value = model.graph[0].outputs[0]
    result = op.Abs(value)
    with listening(model, recorder):
        editor.follow(value, result, op.built, "plain")
    ((event, _, _),) = recorder.events
    assert event.replaced == {value: result}


def test_nobody_listens_after_the_block(model):
    recorder = Recorder()
    with listening(model, recorder):
        pass
    replace(model)
    assert not recorder.events
