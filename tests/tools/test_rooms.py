"""Check who imports whom in small houses: circles, imports that go up, faces, and folders that hold too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).resolve().parents[2] / "tools" / "dev"
FACE = """
from typing import TYPE_CHECKING

from house.cellar.lazy import lazy_names

if TYPE_CHECKING:
    from house.attic.roof import Roof

__getattr__, __dir__ = lazy_names(__name__, {"Roof": "house.attic.roof", "Wine": "house.cellar.wine"})
"""
FLOORS = """
[importlinter:contract:rooms]
name = a house
type = layers
layers =
    house.attic
    house.kitchen | house.parlour
    house.cellar
"""


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEV))
    import rooms

    return rooms


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Build a house of the modules given, under attic, kitchen, parlour and cellar; what is not given is empty."""

    def built(contracts: str = FLOORS, **modules: str) -> Path:
        folders = ["", "attic", "kitchen", "parlour", "cellar"]
        names = "".join(f"    house.{folder}\n" if folder else "    house\n" for folder in folders)
        setup = f"[options]\npackages =\n{names}package_dir =\n    house = src\n    house.cellar = below\n{contracts}"
        (tmp_path / "setup.cfg").write_text(setup)
        for folder in folders:
            place = tmp_path / ("below" if folder == "cellar" else f"src/{folder}")
            place.mkdir(parents=True, exist_ok=True)
            (place / "__init__.py").write_text("")
        for name, source in modules.items():
            folder, _, module = name.partition("__")
            place = tmp_path / ("below" if folder == "cellar" else f"src/{folder}".removesuffix("/root"))
            (place / f"{module or '__init__'}.py").write_text(source)
        return tmp_path

    return built


def examined(rooms: ModuleType, root: Path) -> tuple[ModuleType, ModuleType]:
    house = rooms.read_house(root)
    return house, rooms.examine(house, rooms.read_contracts(root))


def test_imports_down_are_counted_by_folder(rooms, build):
    root = build(
        attic__roof="import house.cellar.wine\nfrom house.cellar import wine, coal\nfrom ..kitchen.oven import Oven\n",
        kitchen__oven="def heat():\n    from house.cellar.coal import Coal\n",
        kitchen__table="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.cellar.wine import Wine\n",
        cellar__wine="import numpy\nfrom .coal import Coal\n",
        cellar__coal="",
    )
    house, found = examined(rooms, root)
    counts = {edge: len(pairs) for edge, pairs in house.edges.items()}
    assert counts == {("attic", "cellar"): 2, ("attic", "kitchen"): 1, ("kitchen", "cellar"): 2}
    assert house.sizes == {"root": 0, "attic": 1, "kitchen": 2, "parlour": 0, "cellar": 2}
    assert found.ok
    assert not found.unordered


def test_a_circle_is_found_with_its_imports(rooms, build, capsys):
    root = build(
        attic__roof="from house.kitchen.oven import Oven\n",
        kitchen__oven="import house.cellar.coal\n",
        cellar__coal="def sell():\n    import house.attic.roof\n",
        parlour__sofa="import house.cellar.coal\n",
    )
    _, found = examined(rooms, root)
    (circle,) = found.circles
    assert circle.folders == ("attic", "cellar", "kitchen")
    assert circle.way[0] == circle.way[-1]
    assert len(circle.way) == 4
    assert rooms.main(["--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert "; circles: 1; upward edges: 1;" in output
    assert "    house.cellar.coal imports house.attic.roof" in output


def test_two_modules_of_a_folder_make_no_circle(rooms, build):
    root = build(cellar__wine="import house.cellar.coal\n", cellar__coal="import house.cellar.wine\n")
    assert examined(rooms, root)[1].ok


@pytest.mark.parametrize(
    ("modules", "edge"),
    [
        ({"cellar__coal": "import house.attic.roof\n", "attic__roof": ""}, ("cellar", "attic")),
        ({"kitchen__oven": "from house.parlour import sofa\n", "parlour__sofa": ""}, ("kitchen", "parlour")),
    ],
)
def test_an_import_that_goes_up_or_beside_is_found(rooms, build, capsys, modules, edge):
    root = build(**modules)
    _, found = examined(rooms, root)
    assert list(found.upward) == [edge]
    assert not found.circles
    assert rooms.main(["--root", str(root)]) == 1
    assert f"upward: {edge[0]} → {edge[1]}\n    house.{edge[0]}." in capsys.readouterr().out


def test_rooms_that_share_a_floor_by_a_colon_may_import_each_other(rooms, build):
    floors = FLOORS.replace("house.kitchen | house.parlour", "house.kitchen : (house.parlour)")
    root = build(floors, kitchen__oven="import house.parlour.sofa\n", parlour__sofa="")
    _, found = examined(rooms, root)
    assert found.ok
    assert not found.unordered


def test_floors_inside_a_room_are_those_of_its_container(rooms, build):
    inner = """
[importlinter:contract:rooms-cellar]
name = inside the cellar
type = layers
containers = house.cellar
layers =
    wine
    coal
"""
    root = build(FLOORS + inner, cellar__coal="import house.cellar.wine\n", cellar__wine="")
    _, found = examined(rooms, root)
    assert found.upward == {("cellar", "cellar"): [("house.cellar.coal", "house.cellar.wine")]}


def test_a_face_stands_above_what_it_hands_on(rooms, build):
    modules = {"attic__roof": "", "cellar__lazy": "def lazy_names(package, names): ...\n", "cellar__wine": ""}
    house, found = examined(rooms, build(root=FACE, **modules))
    assert house.sizes["root (face)"] is None
    counts = {edge: len(pairs) for edge, pairs in house.edges.items()}
    assert counts == {("root (face)", "attic"): 1, ("root (face)", "cellar"): 2}
    assert found.ok
    assert not found.unordered


def test_who_asks_the_face_of_the_own_house_goes_up(rooms, build):
    modules = {"attic__roof": "", "cellar__lazy": "", "cellar__wine": "from house import Roof\n"}
    _, found = examined(rooms, build(root=FACE, **modules))
    assert found.upward == {("cellar", "root (face)"): [("house.cellar.wine", "house")]}
    assert found.circles


def test_a_room_that_a_face_does_not_hand_on_may_ask_it(rooms, build):
    modules = {"attic__roof": "", "cellar__lazy": "", "cellar__wine": "", "parlour__sofa": "from house import Roof\n"}
    _, found = examined(rooms, build(root=FACE, **modules))
    assert found.ok
    assert not found.unordered


def test_an_init_that_defines_something_is_no_face(rooms, build):
    modules = {"attic__roof": "", "cellar__lazy": "", "cellar__wine": ""}
    house, _ = examined(rooms, build(root=f"{FACE}\n\ndef live(): ...\n", **modules))
    assert "root (face)" not in house.sizes
    assert ("root", "attic") in house.edges


@pytest.mark.parametrize(("count", "code"), [(18, 0), (19, 1)])
def test_a_folder_holds_so_many_modules_and_no_more(rooms, build, capsys, count, code):
    root = build(**{f"cellar__bottle{number}": "" for number in range(count)})
    assert rooms.main(["--root", str(root)]) == code
    assert ("too large: cellar holds 19 modules, more than 18" in capsys.readouterr().out) == bool(code)


def test_without_floors_edges_and_circles_are_shown_all_the_same(rooms, build, capsys):
    root = build("", attic__roof="import house.cellar.coal\n", cellar__coal="")
    assert rooms.main(["--root", str(root)]) == 0
    output = capsys.readouterr().out
    assert "edges between them: 1, of 1 imports; circles: 0;" in output
    assert "floors are not declared: setup.cfg has no contract" in output


def test_an_edge_that_no_contract_orders_is_named(rooms, build, capsys):
    root = build(root__door="import house.attic.roof\n", attic__roof="")
    assert rooms.main(["--root", str(root)]) == 0
    assert "floors are not declared for 1 of the edges: root → attic" in capsys.readouterr().out


def test_programs_get_the_same(rooms, build, capsys):
    root = build(cellar__coal="import house.attic.roof\n", attic__roof="import house.cellar.coal\n")
    assert rooms.main(["--root", str(root), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["folders"]["attic"] == {"modules": 1, "imports": {"cellar": 1}}
    assert (found["edges"], found["imports"], found["floors"]) == (2, 2, True)
    assert found["circles"] == [{"folders": ["attic", "cellar"], "way": ["attic", "cellar", "attic"]}]
    assert found["upward"] == [["house.cellar.coal", "house.attic.roof"]]
