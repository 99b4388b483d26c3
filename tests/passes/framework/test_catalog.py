"""Which passes exist: found in their source, without importing anything heavy."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
import textwrap

import pytest

from passopt.ir.errors import PassError, UsageError
from passopt.passes.framework import base
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog, pass_class
from passopt.passes.framework.records import PassResult

LISTING = """
import sys
from passopt.passes.framework.catalog import catalog
assert "shard" in catalog()
heavy = sorted({"onnx_ir", "onnx", "numpy", "torch", "onnxruntime"} & set(sys.modules))
assert not heavy, heavy
"""


def test_listing_imports_nothing_heavy():
    subprocess.run([sys.executable, "-W", "error", "-c", LISTING], check=True)


def test_every_entry_is_what_importing_the_class_gives():
    for name, entry in catalog().items():
        cls = pass_class(name)
        assert (cls.name, cls.__name__, cls.__module__) == (name, entry.class_name, entry.module)
        fields = [(field.name, str(field.type), repr(field.default)) for field in dataclasses.fields(cls)]
        assert [option[:2] for option in entry.options] == [field[:2] for field in fields]
        assert entry.origin.endswith(f"{entry.module.rpartition('.')[2]}.py:{entry.origin.rpartition(':')[2]}")


def test_every_pass_says_why_and_shows_before_and_after():
    for name, entry in catalog().items():
        text = pass_class(name).__doc__
        assert "Before:" in text, name
        assert "After:" in text, name
        assert entry.summary.endswith("."), name


def test_passes_are_frozen():
    for name in catalog():
        assert pass_class(name).__dataclass_params__.frozen, name


def test_an_unknown_pass_offers_what_was_meant():
    with pytest.raises(UsageError, match="unknown pass 'fold-constant'; did you mean 'fold-constants'"):
        pass_class("fold-constant")
    with pytest.raises(UsageError, match="unknown pass 'zzz'; passopt list shows all"):
        pass_class("zzz")


def test_two_classes_of_one_name_are_an_error():
    with pytest.raises(
        PassError, match=r"two passes are called 'dead-code': RemoveDeadCode in .*dead_code.py and .*Mine"
    ):

        class Mine(Pass):
            name = "dead-code"

            def run(self, model):
                return PassResult()

    assert base.REGISTERED["dead-code"].__name__ == "RemoveDeadCode"


PLUGIN = """
    import dataclasses
    import typing
    from typing import ClassVar

    raise RuntimeError("imported")

    class Helper:
        size: int = 3

    @dataclasses.dataclass(frozen=True)
    class Mine:
        '''Do it
        at once.

        Before: ``x``
        After:  ``y``
        '''

        {name}
        after: typing.ClassVar[tuple[str, ...]] = ()
        limit: int = 7
        mode: str = "fast"
        needed: float
"""


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """A module with a pass that an entry point names; importing it would fail."""

    def plug(value="plugged_passes:Mine", name='name = "mine"'):
        (tmp_path / "plugged_passes.py").write_text(textwrap.dedent(PLUGIN.replace("{name}", name)))
        monkeypatch.syspath_prepend(str(tmp_path))
        point = importlib.metadata.EntryPoint("mine", value, "passopt.passes")
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: [point] if group == "passopt.passes" else []
        )

    return plug


@pytest.mark.parametrize(
    "name", ['name = "mine"', 'name: ClassVar[str] = "mine"', 'name: typing.ClassVar[str] = "mine"']
)
def test_entry_points_are_read_without_importing_them(plugged, name):
    plugged(name=name)
    entry = catalog()["mine"]
    assert (entry.module, entry.class_name, entry.summary) == ("plugged_passes", "Mine", "Do it at once.")
    assert entry.options == (("limit", "int", "7"), ("mode", "str", "'fast'"), ("needed", "float", ""))
    assert "dead-code" in catalog()


def test_an_entry_point_with_the_name_of_another_pass_is_an_error(plugged):
    plugged(name='name = "dead-code"')
    with pytest.raises(
        PassError, match=r"two passes are called 'dead-code': .*dead_code\.py:\d+ and .*plugged_passes\.py"
    ):
        catalog()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Mine", "entry point 'mine' of passopt.passes names no_such_module, which cannot be found"),
        ("plugged_passes:Other", r"entry point 'mine': .*plugged_passes\.py defines no pass 'Other' with a name"),
        ("plugged_passes:Helper", "defines no pass 'Helper' with a name"),
    ],
)
def test_an_entry_point_that_names_no_pass_is_an_error(plugged, value, message):
    plugged(value)
    with pytest.raises(PassError, match=message):
        catalog()
