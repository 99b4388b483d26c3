"""Lay out a graph in rows, so that every arrow points down, with few crossings; `svg` draws it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

Edge = tuple[str, str]

_SWEEPS = 12
_DUMMY = 14.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
        places: The middle of each node.
        ways: The points of each edge, from the lower border of its upper node to the upper border of its lower one.
        width: The width of the whole.
        height: The height of the whole.
    """

    places: Mapping[str, tuple[float, float]]
    ways: Mapping[Edge, Sequence[tuple[float, float]]]
    width: float
    height: float


def reduced(edges: Collection[Edge]) -> list[Edge]:
    """Return the edges without those that follow from others: a → c where a → b → c stands.

    Args:
        edges: Pairs of an upper and a lower node, without circles.
    """
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)

    def reaches(start: str, goal: str, skipped: Edge) -> bool:
        work, seen = [start], set()
        while work:
            node = work.pop()
            for lower in below.get(node, ()):
                if (node, lower) == skipped or lower in seen:
                    continue
                if lower == goal:
                    return True
                seen.add(lower)
                work.append(lower)
        return False

    return sorted(edge for edge in set(edges) if not reaches(*edge, edge))


def layered(
    sizes: Mapping[str, tuple[float, float]],
    edges: Collection[Edge],
    *,
    widest: float = 940.0,
    gap: float = 22.0,
    rise: float = 46.0,
    from_top: bool = False,
) -> Layout:
    """Lay out nodes in rows.

    Args:
        sizes: Width and height of each node.
        edges: Pairs of an upper and a lower node, without circles.
        widest: The width that a row should not exceed.
        gap: The least distance of neighbours.
        rise: The distance of rows.
        from_top: Begin with the nodes that nothing stands above, at the top; otherwise with those at the bottom.

    Returns:
        The layout, whose upper left corner is (0, 0).
    """
    rows = _rows(sizes, edges, widest - gap, gap, from_top=from_top)
    rank = {node: index for index, row in enumerate(rows) for node in row}
    links: list[Edge] = []
    chains: dict[Edge, list[str]] = {}
    for upper, lower in sorted(edges):
        chain = [upper, *(f"\0{upper}\0{lower}\0{row}" for row in range(rank[upper] + 1, rank[lower])), lower]
        for row, dummy in enumerate(chain[1:-1], start=rank[upper] + 1):
            rows[row].append(dummy)
        chains[upper, lower] = chain
        links += itertools.pairwise(chain)
    above, below = _neighbours(links, 1), _neighbours(links, 0)
    for sweep in range(_SWEEPS):
        order = rows if sweep % 2 == 0 else rows[::-1]
        near = above if sweep % 2 == 0 else below
        place = {node: index / max(1, len(row) - 1) for row in rows for index, node in enumerate(row)}
        for row in order:
            row.sort(key=lambda node: _mean([place[item] for item in near.get(node, ())], place[node]))
            place |= {node: index / max(1, len(row) - 1) for index, node in enumerate(row)}
    across = _across(rows, sizes, above, below, gap)
    return _placed(rows, sizes, chains, across, rise)


def _rows(
    sizes: Mapping[str, tuple[float, float]], edges: Collection[Edge], widest: float, gap: float, *, from_top: bool
) -> list[list[str]]:
    """Return the nodes by row, the top one first; a row that is full sends further nodes on to the next."""
    behind: dict[str, set[str]] = {node: set() for node in sizes}
    for upper, lower in edges:
        behind[lower if from_top else upper].add(upper if from_top else lower)
    level: dict[str, int] = {}
    filled: dict[int, float] = {}
    waiting = sorted(sizes)
    while waiting:
        ready = [node for node in waiting if behind[node] <= level.keys()]
        if not ready:
            raise ValueError(f"the nodes {', '.join(waiting)} form a circle")
        for node in sorted(ready, key=lambda item: (max((level[other] for other in behind[item]), default=-1), item)):
            row = 1 + max((level[other] for other in behind[node]), default=-1)
            while filled.get(row, 0.0) and filled[row] + sizes[node][0] + gap > widest:
                row += 1
            level[node] = row
            filled[row] = filled.get(row, 0.0) + sizes[node][0] + gap
            waiting.remove(node)
    rows: list[list[str]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for node in sorted(level):
        rows[level[node]].append(node)
    return rows if from_top else rows[::-1]


def _neighbours(links: Iterable[Edge], end: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for link in links:
        found.setdefault(link[end], []).append(link[1 - end])
    return found


def _mean(numbers: Sequence[float], default: float) -> float:
    return sum(numbers) / len(numbers) if numbers else default


def _across(
    rows: Sequence[Sequence[str]],
    sizes: Mapping[str, tuple[float, float]],
    above: Mapping[str, Sequence[str]],
    below: Mapping[str, Sequence[str]],
    gap: float,
) -> dict[str, float]:
    """Return the middle of every node: near its neighbours, and not too near beside another."""

    def width(node: str) -> float:
        return sizes[node][0] if node in sizes else _DUMMY

    across: dict[str, float] = {}
    for row in rows:
        total = sum(width(node) for node in row) + gap * (len(row) - 1)
        left = -total / 2
        for node in row:
            across[node] = left + width(node) / 2
            left += width(node) + gap
    for sweep in range(_SWEEPS * 2):
        near = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = [_mean([across[other] for other in near.get(node, ())], across[node]) for node in row]
            across |= dict(zip(row, _spread(wanted, [width(node) for node in row], gap)))
    return across


def _spread(wanted: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """Places near the wanted ones, in the same order and apart: the mean of a push to either side."""
    right, left = list(wanted), list(wanted)
    for index in range(1, len(wanted)):
        right[index] = max(right[index], right[index - 1] + (widths[index - 1] + widths[index]) / 2 + gap)
    for index in range(len(wanted) - 2, -1, -1):
        left[index] = min(left[index], left[index + 1] - (widths[index] + widths[index + 1]) / 2 - gap)
    return [(one + other) / 2 for one, other in zip(right, left)]


def _placed(
    rows: Sequence[Sequence[str]],
    sizes: Mapping[str, tuple[float, float]],
    chains: Mapping[Edge, Sequence[str]],
    across: Mapping[str, float],
    rise: float,
) -> Layout:
    least = min((across[node] - sizes[node][0] / 2 for node in sizes), default=0.0)
    least = min([least, *(across[node] for row in rows for node in row)])
    most = max((across[node] + sizes[node][0] / 2 for node in sizes), default=0.0)
    most = max([most, *(across[node] for row in rows for node in row)])
    places: dict[str, tuple[float, float]] = {}
    borders: dict[str, tuple[float, float]] = {}
    top = 0.0
    for row in rows:
        height = max([sizes[node][1] for node in row if node in sizes], default=0.0)
        for node in row:
            middle = (across[node] - least, top + height / 2)
            half = sizes[node][1] / 2 if node in sizes else height / 2
            borders[node] = (middle[1] - half, middle[1] + half)
            places[node] = middle
        top += height + rise
    ways = {}
    for edge, chain in chains.items():
        points = [(places[chain[0]][0], borders[chain[0]][1])]
        for node in chain[1:-1]:
            points += [(places[node][0], borders[node][0]), (places[node][0], borders[node][1])]
        ways[edge] = [*points, (places[chain[-1]][0], borders[chain[-1]][0])]
    nodes = {node: place for node, place in places.items() if node in sizes}
    return Layout(nodes, ways, most - least, top - rise if rows else 0.0)
