"""Draw a picture of every room, its modules and what they import, and one of the whole house, from the code itself.

    python tools/docs/room_pictures.py [--check] [DIR]      (default: docs/pictures)

An arrow goes from a module to one that it imports, and down. Arrows that follow from others are left out, as are
imports of modules in other rooms, which stand as a list below. `--check` writes nothing, and exits with 1 if a picture
is not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools" / "dev"), str(ROOT / "tools" / "docs")]

from layered import layered, reduced  # noqa: E402
from passopt.reporting.svg import Picture, Tone, width_of  # noqa: E402
from rooms import House, read_house  # noqa: E402
from typepath import package_dirs  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
_PAD, _HEAD, _HEIGHT, _LINE = 24.0, 46.0, 30.0, 19.0
_WIDEST = 780.0
#: Folders of tools that are no packages of passopt.
SCRIPT_ROOMS = ("tools/bench", "tools/dev", "tools/docs")


@dataclasses.dataclass(frozen=True)
class Room:
    """A room to draw.

    Attributes:
        folder: Where it lies in the checkout, such as `passes/fusion`.
        modules: The names of its modules, and those of rooms inside of it, which end with a slash.
        edges: Pairs of an importing and an imported one.
        below: The folders of other rooms that it imports from.
    """

    folder: str
    modules: Sequence[str]
    edges: Collection[tuple[str, str]]
    below: Sequence[str]

    @property
    def file(self) -> str:
        """The name of its picture."""
        return f"room-{self.folder.replace('/', '-')}.svg"


def rooms(root: Path = ROOT) -> list[Room]:
    """Read all rooms of more than one module: packages, and folders of scripts.

    Args:
        root: The checkout.
    """
    house, folders = read_house(root), package_dirs(root)
    found = [
        _room(house, folders, package)
        for package in sorted(folders, key=lambda name: folders[name])
        if any(module.rpartition(".")[0] == package for module in house.nodes if module not in folders)
    ]
    found += [room for top in SCRIPT_ROOMS for room in _script_rooms(root, top)]
    return [room for room in found if len(room.modules) > 1]


def _room(house: House, folders: Mapping[str, str], package: str) -> Room:
    """Return a package: its modules, and each package right inside of it as one box if the modules import it."""

    def name(module: str) -> str | None:
        if module == package or not module.startswith(f"{package}."):
            return None
        first = module.removeprefix(f"{package}.").split(".")[0]
        inner = f"{package}.{first}"
        return f"{first}/" if inner in folders else first

    own = {found for module in house.nodes if (found := name(module)) is not None}
    is_root = package == min(folders, key=len)
    own = {item for item in own if not (is_root and item.endswith("/"))}
    edges, below = set(), set()
    for importer, imported in house.imports:
        one, other = name(importer), name(imported)
        if one in own and other in own and one is not None and other is not None:
            if one != other:
                edges.add((one, other))
        elif one in own and other is None and imported != package:
            home = imported if imported in folders else imported.rpartition(".")[0]
            if home != package:
                below.add(folders[home])
    used = {item for edge in edges for item in edge}
    modules = sorted(item for item in own if not item.endswith("/") or item in used)
    return Room(folders[package], modules, edges, sorted(below))


def _script_rooms(root: Path, top: str) -> list[Room]:
    """Folders of scripts, which import each other by their bare names or by those of folders on the way to them."""
    files = sorted(path for path in (root / top).rglob("*.py") if path.name != "__init__.py")
    homes: dict[str, Path] = {}
    for path in files:
        homes[".".join(path.relative_to(root / top).with_suffix("").parts)] = path
        homes.setdefault(path.stem, path)
    found = []
    for folder in sorted({path.parent for path in files}):
        edges, below = set(), set()
        for path in (item for item in files if item.parent == folder):
            for source in _sources(path):
                other = homes.get(source)
                if other is not None and other.parent == folder:
                    edges.add((path.stem, other.stem))
                elif other is not None:
                    below.add(str(other.parent.relative_to(root)))
                elif source.partition(".")[0] == "passopt":
                    below.add("passopt")
        names = [path.stem for path in files if path.parent == folder]
        own = [edge for edge in edges if edge[0] != edge[1]]
        found.append(Room(str(folder.relative_to(root)), names, own, sorted(below)))
    return found


def _sources(path: Path) -> set[str]:
    """Return what a script imports: modules, and names from modules, which may be modules as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def draw_room(room: Room) -> str:
    """Return the picture of a room.

    Args:
        room: The room.
    """
    sizes = {name: (max(width_of(name) + 26, 60.0), _HEIGHT) for name in room.modules}
    joined = {item for edge in room.edges for item in edge}
    alone = [name for name in room.modules if name not in joined]
    layout = layered(
        {name: size for name, size in sizes.items() if name in joined}, reduced(room.edges), widest=_WIDEST
    )
    lines = _filled(alone, sizes)
    listed = _wrapped(room.below)
    width = max(
        [layout.width, *(_row_width(line, sizes) for line in lines), *(width_of(text, 12) for text in listed), 260]
    )
    width = max(width, width_of(room.folder, 16) + 40) + 2 * _PAD
    height = _HEAD + layout.height + (18 if joined else 0)
    height += len(lines) * (_HEIGHT + 14) + (10 + len(listed) * _LINE if listed else 0) + 14
    picture = Picture(f"The modules of {room.folder} and what they import", width, height)
    picture.text((_PAD, 25), room.folder, size=16, bold=True, anchor="start")
    shift = (width - layout.width) / 2
    for way in layout.ways.values():
        picture.arrow([(x + shift, y + _HEAD) for x, y in way])
    for name, (x, y) in layout.places.items():
        picture.box((x + shift, y + _HEAD), sizes[name], [name], _tone(name))
    top = _HEAD + layout.height + (18 if joined else 0)
    for line in lines:
        left = (width - _row_width(line, sizes)) / 2
        for name in line:
            picture.box((left + sizes[name][0] / 2, top + _HEIGHT / 2), sizes[name], [name], _tone(name))
            left += sizes[name][0] + 14
        top += _HEIGHT + 14
    for index, text in enumerate(listed):
        picture.text((_PAD, top + 14 + index * _LINE), text, size=12, ink="#596373", anchor="start")
    return picture.svg()


def _tone(name: str) -> Tone:
    return "folder" if name.endswith("/") else "plain"


def _filled(names: Sequence[str], sizes: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Names in rows that are not too wide."""
    lines: list[list[str]] = []
    for name in names:
        if not lines or _row_width([*lines[-1], name], sizes) > _WIDEST * 0.8:
            lines.append([])
        lines[-1].append(name)
    return lines


def _row_width(names: Sequence[str], sizes: Mapping[str, tuple[float, float]]) -> float:
    return sum(sizes[name][0] + 14 for name in names) - 14


def _wrapped(below: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for name in below:
        if lines and width_of(f"{lines[-1]} · {name}", 12) < _WIDEST * 0.75:
            lines[-1] += f" · {name}"
        else:
            lines.append(f"imports from: {name}" if not lines else name)
    return lines


#: What the picture of the house joins into one box: the room and all rooms inside of it.
HOUSE = {
    "ir": "what a model is: graphs, files, lazy weights",
    "passes": "the framework, and the passes by kind",
    "frontends": "checkpoints to graphs (torch)",
    "targets/folders": "output folders and digests",
    "targets/onnxruntime": "running graphs, joining ranks",
    "targets/tvm/compiler": "graphs to native code (TVM)",
    "targets/tvm/engine": "running compiled folders",
    "tools/passopt/reporting": "results, progress",
    "tools/passopt/generation": "tokens to text",
    "tools/passopt/predictions": "perplexity, divergence, standard errors",
    "tools/passopt/verification": "do two models agree?",
    "tools/passopt/evaluation": "how good is a model on texts and questions?",
    "tools/passopt/api": "the Python face, one operation per module",
    "tools/passopt/commands": "one command per module",
    "tools/passopt/terminal": "arguments, progress bars",
    "tools/passopt/cli": "finds the command, exit codes",
    "tools/passopt/testing": "checks, fixtures, tiny models",
}


def draw_house(root: Path = ROOT) -> str:
    """Return the picture of all rooms and what they import.

    Args:
        root: The checkout.
    """
    house, folders = read_house(root), package_dirs(root)

    def box(module: str) -> str | None:
        home = folders[module if module in folders else module.rpartition(".")[0]]
        return next((name for name in HOUSE if f"{home}/".startswith(f"{name}/")), None)

    edges = set()
    for importer, imported in house.imports:
        if importer in house.faces or imported in house.faces:
            continue
        one, other = box(importer), box(imported)
        # `cli` finds commands by their names, which no import shows.
        if one and other and one != other:
            edges.add((one, other))
    edges.add(("tools/passopt/cli", "tools/passopt/commands"))
    sizes = {name: (max(width_of(name), width_of(text, 11.5)) + 30, 46.0) for name, text in HOUSE.items()}
    layout = layered(sizes, reduced(edges), widest=820, gap=14, rise=38)
    width, height = layout.width + 2 * _PAD, layout.height + _HEAD + _PAD
    picture = Picture("The rooms of passopt and what they import", width, height)
    picture.text((_PAD, 25), "passopt: an arrow points to what a room imports", size=16, bold=True, anchor="start")
    for way in layout.ways.values():
        picture.arrow([(x + _PAD, y + _HEAD) for x, y in way])
    for name, (x, y) in layout.places.items():
        picture.box((x + _PAD, y + _HEAD), sizes[name], [name, HOUSE[name]], "folder")
    return picture.svg()


def pictures(root: Path = ROOT) -> dict[str, str]:
    """Return all pictures by their file names.

    Args:
        root: The checkout.
    """
    return {"rooms.svg": draw_house(root), **{room.file: draw_room(room) for room in rooms(root)}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures, or compare them with the code.

    Args:
        arguments: The words of the command line; None for those of the process.

    Returns:
        0, or 1 if a picture is not what the code says.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=FOLDER, metavar="DIR", help="default: docs/pictures")
    parser.add_argument("--check", action="store_true", help="compare with what lies there, and write nothing")
    options = parser.parse_args(arguments)
    found = pictures()
    known = {path.name for path in options.directory.glob("room*.svg")}
    stale = sorted(known - found.keys())
    for name, text in found.items():
        path = options.directory / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            options.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if not options.check:
        for name in known - found.keys():
            (options.directory / name).unlink()
        return 0
    if stale:
        print(f"{', '.join(stale)}: not what the code says; write them again: python tools/docs/room_pictures.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
