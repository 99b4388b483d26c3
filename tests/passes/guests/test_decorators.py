"""How a guest is declared: options, names, docstrings, and what is said where a package is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import textwrap

import onnx_ir.passes
import onnx_ir.passes.common
import pytest

from passopt.cli import main
from passopt.ir.errors import PassError, UsageError
from passopt.ir.serialization.text_files import read_model
from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, lossy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog
from passopt.passes.guests import graphsurgeon_pass, ir_pass
from passopt.passes.pipeline.text import describe, resolve

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }'


def test_a_guest_is_a_pass_like_any_other():
    @graphsurgeon_pass(name="my-guest", accuracy=REASSOCIATED, after=("dead-code",))
    def my_guest(graph, limit: int = 2, *, mode: str = "fast", ratio=0.5, deep: bool | None = None):
        """Do it.

        Before: ``x``
        """

    assert issubclass(my_guest, Pass)
    assert (my_guest.name, my_guest.__name__, my_guest.after) == ("my-guest", "my_guest", ("dead-code",))
    assert my_guest.accuracy is REASSOCIATED
    assert not my_guest.changes_interface
    assert my_guest.__doc__.startswith("Do it.")
    assert my_guest.__dataclass_params__.frozen
    assert describe(my_guest()) == "my-guest{limit=2,mode=fast,ratio=0.5,deep=none}"
    (made,) = resolve("my-guest{limit=3,ratio=0.25,deep=true}").passes
    assert (made.limit, made.mode, made.ratio, made.deep) == (3, "fast", 0.25, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.limit = 4


def test_options_reach_the_function():
    seen = []

    @graphsurgeon_pass(name="my-guest")
    def my_guest(graph, *, limit: int = 2):
        seen.append((type(graph).__name__, limit))

    for text in ("my-guest", "my-guest{limit=7}"):
        resolve(text).passes[0].run(read_model(TEXT))
    assert seen == [("Graph", 2), ("Graph", 7)]


def test_an_option_without_default_must_be_given():
    @ir_pass("my-guest")
    def my_guest(*, limit: int):
        return onnx_ir.passes.common.TopologicalSortPass()

    with pytest.raises(UsageError, match="my-guest: needs a value for limit"):
        resolve("my-guest")
    assert resolve("my-guest{limit=1}").passes[0].limit == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, r"my-guest \(.*test_decorators\.py:\d+\): the function takes no graph"),
        (lambda graph, *rest: None, r"\*rest cannot be an option; name each option"),
        (lambda graph, **rest: None, r"\*rest cannot be an option"),
        (lambda graph, limit: None, "option limit needs a type or a default"),
        (lambda graph, limit=None: None, "option limit needs a type or a default"),
    ],
)
def test_a_function_that_cannot_be_a_pass_is_refused_at_once(function, message):
    with pytest.raises(PassError, match=message):
        graphsurgeon_pass(name="my-guest")(function)


def test_a_name_that_is_taken_is_an_error():
    resolve("dead-code")
    with pytest.raises(PassError, match="two passes are called 'dead-code'"):
        graphsurgeon_pass(name="dead-code")(lambda graph: None)


def test_an_accuracy_in_words_is_refused():
    with pytest.raises(PassError, match="accuracy 'exact' is none of EXACT, REASSOCIATED"):
        graphsurgeon_pass(name="my-guest", accuracy="exact")(lambda graph: None)


@pytest.mark.parametrize(("name", "package"), [("my-guest", "onnx_graphsurgeon"), ("simplify", "onnxsim")])
def test_a_missing_package_is_said_with_what_brings_it(monkeypatch, name, package):
    graphsurgeon_pass(name="my-guest")(lambda graph: None)
    for module in ("passopt.passes.guests.graphsurgeon", "passopt.passes.guests.simplifier"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{name}: needs {package}, which is not installed; pip install 'passopt\["):
        resolve(name).passes[0].run(read_model(TEXT))


PLUGIN = """
    import typing

    import onnx_graphsurgeon as gs
    import onnx_ir.passes.common as common

    from passopt.passes import lossy
    from passopt.passes.guests import graphsurgeon_pass, ir_pass


    @graphsurgeon_pass(name="plugged-relu", accuracy=lossy(0.25))
    def plugged_relu(graph: gs.Graph, *, limit: int = 3, mode: typing.Literal["all", "first"] = "all") -> None:
        '''Turn Relu
        into Abs.

        Before: ``Relu(x)``
        After:  ``Abs(x)``
        '''
        for node in graph.nodes[:limit]:
            node.op = "Abs" if node.op == "Relu" else node.op


    plugged_sort = ir_pass("plugged-sort", common.TopologicalSortPass)
"""


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    (tmp_path / "plugged_guests.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugged_guests", raising=False)
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, f"plugged_guests:{name}", "passopt.passes")
        for name in ("plugged_relu", "plugged_sort")
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.select(group=group))
    yield tmp_path
    sys.modules.pop("plugged_guests", None)


def test_entry_points_are_listed_without_importing_them(plugged):
    relu, sort = catalog()["plugged-relu"], catalog()["plugged-sort"]
    assert "plugged_guests" not in sys.modules
    assert (relu.class_name, relu.summary, relu.accuracy) == ("plugged_relu", "Turn Relu into Abs.", "lossy(0.25)")
    assert relu.options == (("limit", "int", "3"), ("mode", "typing.Literal['all', 'first']", "'all'"))
    assert relu.origin.endswith("plugged_guests.py:12")
    assert (sort.class_name, sort.options, sort.accuracy) == ("plugged_sort", (), "exact")


def test_a_plug_in_whose_package_is_missing_says_what_brings_it(plugged, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    path = plugged / "graph.onnxtxt"
    path.write_text(TEXT)
    assert main(["run", str(path), "--passes", "plugged-relu", "--emit", "text"]) == 2
    assert "needs onnx_graphsurgeon, which is not installed; pip install 'passopt[guests]'" in capsys.readouterr().err


def test_entry_points_run_with_options(plugged, capsys):
    path = plugged / "graph.onnxtxt"
    path.write_text(TEXT)
    pipeline = "plugged-relu{limit=1,mode=first},plugged-sort"
    assert main(["run", str(path), "--passes", pipeline, "--emit", "text"]) == 0
    assert "y = Abs (x)" in capsys.readouterr().out
    made = resolve(pipeline).passes[0]
    assert (made.accuracy, type(made).__module__) == (lossy(0.25), "plugged_guests")
    assert resolve("plugged-sort").passes[0].accuracy is EXACT
    with pytest.raises(UsageError, match="option mode=last is not one of all, first"):
        resolve("plugged-relu{mode=last}")
