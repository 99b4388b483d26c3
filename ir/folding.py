"""Find the decoder layers in a node list: the longest run of blocks that are equal but for an index that advances.

Used by canonical text, so that 40 identical layers print as one. Nothing is assumed about names but that a layer's
weights differ in one number, as in `model.layers.3.mlp` and `model.layers.4.mlp`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re

import onnx_ir

from passopt.ir.expressions import Literal
from passopt.ir.weights import expression_of

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_SHORTEST_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """Nodes [start, start + period × count) are `count` equal blocks of `period` nodes."""

    start: int
    period: int
    count: int
    carried: tuple[tuple[str, str], ...]

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count


def longest_run(nodes: list[onnx_ir.Node]) -> Run | None:
    """The longest run of at least two blocks, or None."""
    finder = _Finder(nodes)
    runs = [run for period in finder.periods() if (run := finder.run(period))]
    return max(runs, key=lambda run: run.period * run.count, default=None)


class _Finder:
    def __init__(self, nodes: list[onnx_ir.Node]) -> None:
        self.nodes = nodes
        self.position = {id(node): index for index, node in enumerate(nodes)}
        self._keys = [_key(node) for node in nodes]

    def periods(self) -> list[int]:
        """Likely block lengths: distances between nodes that read weights whose names advance."""
        places: dict[object, list[int]] = collections.defaultdict(list)
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                if value is not None and value.is_initializer() and _NUMBER.search(value.name or ""):
                    places[(self._keys[index], _NUMBER.sub("#", value.name or ""))].append(index)
        gaps: collections.Counter[int] = collections.Counter()
        for found in places.values():
            gaps.update(later - earlier for earlier, later in itertools.pairwise(found))
        return [gap for gap, _ in gaps.most_common(3) if gap >= _SHORTEST_BLOCK]

    def run(self, period: int) -> Run | None:
        equal = [self._same(index, index + period, None) for index in range(len(self.nodes) - period)]
        first, last = _longest_true(equal)
        if last - first < _SHORTEST_BLOCK:
            return None
        for start in range(max(0, first - period + 1), first + 1):
            carried: dict[str, str] = {}
            block = range(start, min(start + period, first))
            if all(equal[index] or self._same(index, index + period, carried) for index in block):
                count = (last + period - start) // period
                return Run(start, period, count, tuple(carried.items())) if count > 1 else None
        return None

    def _same(self, index: int, later: int, carried: dict[str, str] | None) -> bool:
        if self._keys[index] != self._keys[later]:
            return False
        one, other = self.nodes[index], self.nodes[later]
        inputs = zip(one.inputs, other.inputs, strict=True)
        if not all(self._same_input(x, y, index, later, carried) for x, y in inputs):
            return False
        return all(
            x.is_graph_output() == y.is_graph_output() and (not x.is_graph_output() or _advances(x.name, y.name))
            for x, y in zip(one.outputs, other.outputs, strict=True)
        )

    def _same_input(
        self, x: onnx_ir.Value | None, y: onnx_ir.Value | None, index: int, later: int, carried: dict[str, str] | None
    ) -> bool:
        if x is y:
            return True
        if x is None or y is None:
            return False
        first, second = x.producer(), y.producer()
        if first is None and second is None:
            return _same_leaf(x, y)
        if first is not None and second is not None and x.index() == y.index():
            back_x, back_y = index - self.position[id(first)], later - self.position[id(second)]
            if back_x == back_y:
                return True
        if carried is None or second is None or self.position[id(second)] < later - 2 * (later - index):
            return False
        # What enters the first layer from before is what later layers get from the layer before them.
        return carried.setdefault(x.name or "", y.name or "") == (y.name or "")


def _key(node: onnx_ir.Node) -> tuple[object, ...]:
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes


def _same_leaf(x: onnx_ir.Value, y: onnx_ir.Value) -> bool:
    if x.is_initializer() != y.is_initializer():
        return False
    if not x.is_initializer():
        return _advances(x.name, y.name)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    one, other = expression_of(x), expression_of(y)
    assert one is not None
    assert other is not None
    if isinstance(one, Literal) and isinstance(other, Literal):
        return one == other
    return _advances(one.text(), other.text()) and _advances(x.name, y.name)


def _advances(earlier: str | None, later: str | None) -> bool:
    """Equal but for numbers between dots, each of which is equal or one more, and at least one is more."""
    one, other = _NUMBER.split(f".{earlier}."), _NUMBER.split(f".{later}.")
    if len(one) != len(other) or one[0::2] != other[0::2]:
        return False
    steps = {int(y) - int(x) for x, y in zip(one[1::2], other[1::2], strict=True)}
    return 1 in steps and steps <= {0, 1}


def _longest_true(flags: list[bool]) -> tuple[int, int]:
    best, start = (0, 0), None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            best = max(best, (start, index), key=lambda span: span[1] - span[0])
            start = None
    return best
