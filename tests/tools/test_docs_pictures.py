"""The scripts of tools/docs: layouts keep their promises, pictures are SVG with text, and pages name everything."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("layered", "rooms", "room_pictures", "graph_pictures", "reference", "typepath")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools/docs"), str(ROOT / "tools/dev"), *sys.path])
    import graph_pictures
    import layered
    import reference
    import room_pictures

    return {
        "layered": layered,
        "room_pictures": room_pictures,
        "graph_pictures": graph_pictures,
        "reference": reference,
    }


def test_arrows_that_follow_from_others_are_left_out(scripts):
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")]
    assert scripts["layered"].reduced(edges) == [("a", "b"), ("a", "d"), ("b", "c")]


def test_all_arrows_point_down_and_no_boxes_overlap(scripts):
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"), ("e", "d")]
    sizes = {name: (90.0 if name != "c" else 300.0, 30.0) for name in "abcde"}
    layout = scripts["layered"].layered(sizes, edges, widest=400)
    for upper, lower in edges:
        assert layout.places[upper][1] < layout.places[lower][1]
        assert layout.ways[upper, lower][0][1] < layout.ways[upper, lower][-1][1]
    for one in sizes:
        for other in sizes:
            if one < other and layout.places[one][1] == layout.places[other][1]:
                apart = abs(layout.places[one][0] - layout.places[other][0])
                assert apart >= (sizes[one][0] + sizes[other][0]) / 2
    assert min(x - sizes[name][0] / 2 for name, (x, _) in layout.places.items()) >= -0.01


def test_a_circle_is_refused(scripts):
    with pytest.raises(ValueError, match="form a circle"):
        scripts["layered"].layered({"a": (9, 9), "b": (9, 9)}, [("a", "b"), ("b", "a")])


@pytest.mark.slow
def test_pictures_are_svg_with_text(scripts):
    found = {**scripts["graph_pictures"].pictures(), **scripts["room_pictures"].pictures()}
    assert {"pipeline.svg", "rooms.svg", "room-passes-fusion.svg", "room-tools-docs.svg"} <= found.keys()
    for name, text in found.items():
        tree = ET.fromstring(text)
        assert tree.tag.endswith("}svg"), name
        assert [item for item in tree.iter() if item.tag.endswith("}text")], name


def test_the_drawn_pictures_are_those_of_the_script(scripts):
    for name, text in scripts["graph_pictures"].pictures().items():
        assert (ROOT / "docs/pictures" / name).read_text(encoding="utf-8") == text, (
            f"run tools/docs/graph_pictures.py ({name})"
        )


@pytest.mark.slow
def test_every_room_has_a_picture_on_the_page(scripts):
    page = (ROOT / "docs/project/architecture.md").read_text(encoding="utf-8")
    assert [room.file for room in scripts["room_pictures"].rooms() if room.file not in page] == []


def test_generated_pages_name_every_pass_pipeline_and_command(scripts):
    import passopt
    from passopt.cli.main import COMMANDS

    pages = scripts["reference"].pages()
    catalogue = passopt.list_passes()
    own = [name for name, entry in catalogue.passes.items() if entry.module.startswith("passopt.")]
    assert [name for name in own if f"### {name}\n" not in pages["passes.inc"]] == []
    assert [name for name in catalogue.pipelines if f"## {name}\n" not in pages["pipelines.inc"]] == []
    assert [name for name in COMMANDS if f"## passopt {name}\n" not in pages["cli.inc"]] == []


def test_bars_of_docstrings_mean_themselves(scripts):
    lines = ["max|difference| / max|reference|", "`a|b` and ``c|d``", "", "::", "", "    x | y"]
    scripts["reference"].escape_docstring(None, "", "", None, None, lines)
    assert lines == [
        "max\\|difference\\| / max\\|reference\\|",
        "`a|b` and ``c|d``",
        "",
        "::",
        "",
        "    x | y",
    ]
