"""Show which folders of the package import which, and check that they form layers without import cycles.

    python tools/dev/rooms.py [--root DIR] [--json]

The `layers` contracts of setup.cfg say which layers there are; here they are called floors, and packages rooms. The
exit code is 1 if folders import each other in a circle, if an import goes up to a higher floor, or if a folder holds
more than 18 modules. Imports by a name that is made at run time are not seen.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import dataclasses
import functools
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from typepath import ROOT, package_dirs

MOST_MODULES = 18
#: The function of passopt.ir by which a package re-exports names from other modules lazily.
HANDS_ON = "lazy_names"

#: Two modules or two folders, of which the first imports the second.
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class House:
    """Hold which modules there are, where they lie, and what they import.

    A node is a folder or the face of a package. A face is an `__init__` that only re-exports names; it stands above the
    modules that it re-exports from. Folders of its package that it does not re-export from may stand above it.

    Attributes:
        sizes: For each node, how many modules it holds, not counting `__init__`; None for a face.
        nodes: For each module, its node.
        faces: The modules that are faces.
        imports: Pairs of modules, of which the first imports the second.
    """

    sizes: Mapping[str, int | None]
    nodes: Mapping[str, str]
    faces: Collection[str]
    imports: Collection[Pair]

    @functools.cached_property
    def edges(self) -> dict[Pair, list[Pair]]:
        """Return the imports between different nodes, by the importing and the imported node."""
        return {edge: pairs for edge, pairs in self.by_node(self.imports).items() if edge[0] != edge[1]}

    @functools.cached_property
    def ways(self) -> dict[str, dict[str, list[str]]]:
        """Return, for each node, a shortest way to every node that it reaches; to itself only through a circle."""
        below = defaultdict(list)
        for upper, lower in self.edges:
            below[upper].append(lower)
        return {node: _ways(node, below) for node in sorted(below)}

    def by_node(self, imports: Iterable[Pair]) -> dict[Pair, list[Pair]]:
        """Group imports by the nodes in which the two modules lie."""
        found = defaultdict(list)
        for importer, imported in sorted(imports):
            found[self.nodes[importer], self.nodes[imported]].append((importer, imported))
        return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Contract:
    """Hold one `layers` contract of setup.cfg.

    Attributes:
        floors: For each room, its floor, counted from 0 at the top. Rooms are packages or modules; a module lies in the
            room whose name its own name begins with.
        strangers: The floors whose rooms may not import each other.
    """

    floors: Mapping[str, int]
    strangers: Collection[int]

    def allows(self, importer: str, imported: str) -> bool | None:
        """Return whether one module may import another, or None if the contract says nothing about the two."""
        one, other = self._room(importer), self._room(imported)
        if one is None or other is None or one == other:
            return None
        if self.floors[one] == self.floors[other]:
            return self.floors[one] not in self.strangers
        return self.floors[one] < self.floors[other]

    def _room(self, module: str) -> str | None:
        return next((room for room in self.floors if f"{module}.".startswith(f"{room}.")), None)


@dataclasses.dataclass(frozen=True)
class Circle:
    """Hold folders that all reach each other, and a shortest way around, which ends with the folder it begins with."""

    folders: Sequence[str]
    way: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Hold what is wrong with a house, and the imports between nodes that no contract orders.

    Attributes:
        circles: One circle for each group of folders that reach each other.
        upward: Imports that a contract forbids, by the nodes of both modules.
        large: For each folder with too many modules, how many it holds.
        unordered: Imports between nodes about which no contract says anything, by these nodes.
    """

    circles: Sequence[Circle]
    upward: Mapping[Pair, Sequence[Pair]]
    large: Mapping[str, int]
    unordered: Mapping[Pair, Sequence[Pair]]

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong; imports that no contract orders are reported only."""
        return not (self.circles or self.upward or self.large)


def read_house(root: Path) -> House:
    """Read the modules of all packages that the setup.cfg in `root` lists."""
    packages = package_dirs(root)
    top = min(packages, key=len)
    folders = {name: "root" if name == top else name.removeprefix(f"{top}.").replace(".", "/") for name in packages}
    homes, trees = {}, {}
    for package, folder in packages.items():
        for path in sorted((root / folder).glob("*.py")):
            module = package if path.stem == "__init__" else f"{package}.{path.stem}"
            homes[module], trees[module] = package, ast.parse(path.read_bytes())
    faces = {module for module in homes.keys() & packages.keys() if is_face(trees[module])}
    nodes = {module: folders[home] + (" (face)" if module in faces else "") for module, home in homes.items()}
    sizes: dict[str, int | None] = {nodes[face]: None for face in faces}
    for package, folder in folders.items():
        sizes[folder] = sum(home == package != module for module, home in homes.items())
    imports = {
        (module, other)
        for module, tree in trees.items()
        for other in _imported(tree, homes[module], homes, face=module in faces)
        if other != module
    }
    return House(sizes, nodes, faces, imports)


def is_face(tree: ast.Module) -> bool:
    """Return whether an `__init__` re-exports names lazily and defines no function or class of its own."""
    own = any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in tree.body)
    called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return HANDS_ON in called and not own


def _imported(tree: ast.Module, package: str, known: Collection[str], *, face: bool) -> Iterator[str]:
    """Yield the known modules that a module of `package` imports anywhere, or as a face names in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = _source(node, package)
            for alias in node.names:
                yield from [name for name in (f"{source}.{alias.name}", source) if name in known][:1]
        elif face and isinstance(node, ast.Constant) and node.value in known:
            yield str(node.value)


def _source(node: ast.ImportFrom, package: str) -> str:
    """Return the full name that an `import from` names; each dot after the first goes up by one package."""
    parts = package.split(".")
    above = parts[: len(parts) + 1 - node.level] if node.level else []
    return ".".join([*above, *filter(None, [node.module])])


def read_contracts(root: Path) -> list[Contract]:
    """Read the `layers` contracts of setup.cfg.

    Rooms of one line share a floor. They may import each other if `:` stands between them, and may not if it is `|`.
    """
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    found = []
    for name, section in config.items():
        if not name.startswith("importlinter:contract:") or section["type"] != "layers":
            continue
        lines = section["layers"].strip().splitlines()
        strangers = [floor for floor, line in enumerate(lines) if ":" not in line]
        rooms = {
            room.strip(" ()"): floor for floor, line in enumerate(lines) for room in line.replace("|", ":").split(":")
        }
        for container in section.get("containers", "").split() or [""]:
            floors = {f"{container}.{room}".lstrip("."): floor for room, floor in rooms.items()}
            found.append(Contract(floors, strangers))
    return found


def examine(house: House, contracts: Sequence[Contract]) -> Findings:
    """Find circles, imports that go up, imports that no contract orders, and folders with too many modules."""
    allowed = {pair: _allowed(house, contracts, *pair) for pair in house.imports}
    between = [pair for pairs in house.edges.values() for pair in pairs]
    return Findings(
        circles=circles(house.ways),
        upward=house.by_node(pair for pair in house.imports if allowed[pair] is False),
        large={folder: size for folder, size in sorted(house.sizes.items()) if (size or 0) > MOST_MODULES},
        unordered=house.by_node(pair for pair in between if allowed[pair] is None),
    )


def _allowed(house: House, contracts: Sequence[Contract], importer: str, imported: str) -> bool | None:
    """Return whether the contracts allow an import, or None if no contract orders the two modules.

    A face stands above the modules of its package that it re-exports from, whatever the contracts say.
    """
    if imported in house.faces and importer.startswith(f"{imported}."):
        return house.nodes[importer] not in house.ways.get(house.nodes[imported], ())
    if importer in house.faces and imported.startswith(f"{importer}."):
        return True
    verdicts = {contract.allows(importer, imported) for contract in contracts} - {None}
    return False not in verdicts if verdicts else None


def circles(ways: Mapping[str, Mapping[str, list[str]]]) -> list[Circle]:
    """Return one circle for each group of nodes that reach each other, given the ways between all nodes."""
    groups = {tuple(other for other in ways if node in ways[other] and other in ways[node]) for node in ways}
    return [Circle(group, min((ways[node][node] for node in group), key=len)) for group in sorted(groups) if group]


def _ways(start: str, below: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return a shortest way from `start` to each node that it reaches, including both ends."""
    found: dict[str, list[str]] = {}
    waiting = [[start]]
    for way in waiting:
        for node in below.get(way[-1], ()):
            if node not in found:
                found[node] = [*way, node]
                waiting.append(found[node])
    return found


def text(house: House, contracts: Sequence[Contract], found: Findings) -> str:
    """Return the table of folders, its sums, and one line for everything that is wrong."""
    width = max(map(len, house.sizes))
    lines = [f"{'folder':{width}}  modules  imports from (how many)"]
    for node in _in_order(house):
        size = house.sizes[node]
        counts = ", ".join(f"{lower} {count}".replace(" ", "\xa0") for lower, count in _counts(house, node).items())
        head = f"{node:{width}}  {'' if size is None else size:>7}  "
        row = textwrap.fill(counts, 120, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
        lines.append((row or head).rstrip())
    folders = len(house.sizes) - len(house.faces)
    imports = sum(map(len, house.edges.values()))
    lines += [
        "",
        f"folders: {folders}, faces: {len(house.faces)}; edges between them: {len(house.edges)}, of {imports} imports; "
        f"circles: {len(found.circles)}; upward edges: {len(found.upward)}; folders too large: {len(found.large)}",
    ]
    problems = [textwrap.fill(line, 120, subsequent_indent="    ") for line in _problems(house, contracts, found)]
    return "\n".join([*lines, *problems]).replace("\xa0", " ")


def _in_order(house: House) -> list[str]:
    return sorted(house.sizes, key=lambda node: (not node.startswith("root"), node))


def _counts(house: House, node: str) -> dict[str, int]:
    return {lower: len(pairs) for (upper, lower), pairs in house.edges.items() if upper == node}


def _problems(house: House, contracts: Sequence[Contract], found: Findings) -> Iterator[str]:
    for circle in found.circles:
        yield f"circle: {' → '.join(circle.way)}, one of those among {', '.join(circle.folders)}"
        for edge in zip(circle.way, circle.way[1:]):
            yield f"    {' imports '.join(house.edges[edge][0])}"
    for edge, pairs in found.upward.items():
        yield f"upward: {' → '.join(edge)}"
        yield from (f"    {' imports '.join(pair)}" for pair in pairs)
    for folder, size in found.large.items():
        yield f"too large: {folder} holds {size} modules, more than {MOST_MODULES}"
    if not contracts:
        yield "floors are not declared: setup.cfg has no contract of import-linter that is of the type layers"
    elif found.unordered:
        edges = ", ".join(f"{upper}\xa0→\xa0{lower}" for upper, lower in found.unordered)
        yield f"floors are not declared for {len(found.unordered)} of the edges: {edges}"


def to_json(house: House, contracts: Sequence[Contract], found: Findings) -> dict[str, object]:
    """Return what `text` shows as an object for JSON."""
    return {
        "folders": {node: {"modules": house.sizes[node], "imports": _counts(house, node)} for node in _in_order(house)},
        "edges": len(house.edges),
        "imports": sum(map(len, house.edges.values())),
        "circles": [dataclasses.asdict(circle) for circle in found.circles],
        "upward": [pair for pairs in found.upward.values() for pair in pairs],
        "large": found.large,
        "floors": bool(contracts),
        "unordered": [pair for pairs in found.unordered.values() for pair in pairs],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the house, print the table and what is wrong, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="another checkout (default: this one)")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    house, contracts = read_house(options.root), read_contracts(options.root)
    found = examine(house, contracts)
    if options.json:
        print(json.dumps(to_json(house, contracts, found), indent=2))
    else:
        print(text(house, contracts, found))
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
