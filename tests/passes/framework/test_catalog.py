"""Which passes exist: found in their source, without importing anything heavy."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
import textwrap

import pytest

from passopt.cli import main
from passopt.ir.errors import PassError, PluginWarning, UsageError
from passopt.passes.framework import base
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog, pass_class
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.text import resolve

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
        fields = [(field.name.rstrip("_"), str(field.type), repr(field.default)) for field in dataclasses.fields(cls)]
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


def test_an_entry_point_with_the_name_of_a_built_in_pass_is_left_out(plugged):
    plugged(name='name = "dead-code"')
    message = r"two passes are called 'dead-code': .*dead_code\.py:\d+ and .*plugged_passes\.py:\d+, which is left out"
    with pytest.warns(PluginWarning, match=message):
        assert catalog()["dead-code"].class_name == "RemoveDeadCode"


def test_of_two_plug_ins_with_one_name_neither_is_taken(plugged, monkeypatch):
    plugged()
    (point,) = importlib.metadata.entry_points(group="passopt.passes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point, point])
    with pytest.warns(PluginWarning, match="two passes are called 'mine': .* uninstall one, or rename it"):
        assert "mine" not in catalog()
    with (
        pytest.warns(PluginWarning),
        pytest.raises(UsageError, match="the pass 'mine' cannot be used: two passes are called 'mine'"),
    ):
        resolve("mine")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Mine", "no_such_module cannot be found"),
        ("no_such_package.module:Mine", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("plugged_passes:Other", r"plugged_passes\.py defines no pass 'Other' with a name"),
        ("plugged_passes:Helper", "defines no pass 'Helper' with a name"),
        ("not an entry point", "AttributeError"),
        ("broken_syntax:Mine", r"SyntaxError: .*, .*broken_syntax\.py:2"),
        ("broken_bytes:Mine", "UnicodeDecodeError"),
        ("broken_package.passes:Mine", "ZeroDivisionError: division by zero"),
        ("leaving_package.passes:Mine", "SystemExit: 1"),
    ],
)
def test_a_plug_in_that_names_no_pass_is_one_warning(plugged, tmp_path, capsys, value, message):
    (tmp_path / "broken_syntax.py").write_text("import dataclasses\nclass Mine(:\n    pass\n")
    (tmp_path / "broken_bytes.py").write_bytes(b"name = '\xff\xfe'")
    for package, body in (("broken_package", "1 / 0"), ("leaving_package", "raise SystemExit(1)")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(body)
        (tmp_path / package / "passes.py").write_text("")
    plugged(value)
    with pytest.warns(PluginWarning, match=f"plug-in mine .* is left out: .*{message}"):
        assert "dead-code" in catalog()
    with pytest.warns(PluginWarning), pytest.raises(UsageError, match=f"the pass 'mine' cannot be used: .*{message}"):
        resolve("mine")
    assert main(["list"]) == 0
    printed = capsys.readouterr()
    assert "dead-code" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith(f"passopt list: warning: plug-in mine ({value}) is left out: ")
    assert main(["explain", "mine"]) == 2
    assert "the pass 'mine' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise ImportError('no such thing')",
            r"importing plugged_passes failed with ImportError: no such .*passes\.py:6",
        ),
        ("import no_such_package", "importing plugged_passes failed with ModuleNotFoundError"),
        ("", r"Mine \(.*plugged_passes\.py:\d+\) is no pass; derive it from passopt\.passes\.Pass"),
    ],
)
def test_a_plug_in_that_fails_when_it_is_used_says_why(plugged, tmp_path, monkeypatch, body, message):
    plugged()
    monkeypatch.delitem(sys.modules, "plugged_passes", raising=False)
    source = (tmp_path / "plugged_passes.py").read_text()
    (tmp_path / "plugged_passes.py").write_text(
        source.replace('raise RuntimeError("imported")', body).replace("needed: float", "needed: float = 1.0")
    )
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match=message):
        resolve("mine{needed=2}")
    monkeypatch.delitem(sys.modules, "plugged_passes", raising=False)
