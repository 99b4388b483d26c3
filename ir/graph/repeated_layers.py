"""Find the decoder layers in a node list: the longest run of blocks that are equal except for the layer number.

Canonical text uses this to print 40 identical layers as one. The only assumption about names is that the weights of
two successive layers differ in one number, as in `model.layers.3.mlp` and `model.layers.4.mlp`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re

import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.weights.lazy_weight import expression_of
from passopt.ir.weights.literals import Literal

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_SHORTEST_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of equal blocks: the nodes [start, start + period × count) are `count` blocks of `period` nodes.

    `carried` pairs the name of each value that enters the first block with the one that the second block reads in its
    place.
    """

    start: int
    period: int
    count: int
    carried: tuple[tuple[str, str], ...]

    @property
    def stop(self) -> int:
        """Return the index of the first node behind the run."""
        return self.start + self.period * self.count


def longest_run(nodes: list[onnx_ir.Node]) -> Run | None:
    """Return the longest run of at least two blocks, or None if nothing repeats."""
    finder = _Finder(nodes)
    runs = [run for anchor, period in finder.candidates() if (run := finder.run(anchor, period))]
    return max(runs, key=lambda run: run.period * run.count, default=None)


class _Finder:
    def __init__(self, nodes: list[onnx_ir.Node]) -> None:
        self.nodes = nodes
        self.position = {id(node): index for index, node in enumerate(nodes)}
        self._keys = [_key(node) for node in nodes]

    def candidates(self) -> list[tuple[int, int]]:
        """Return likely pairs (position of a layer's first weight, block length), guessed from the numbers in names."""
        places: dict[object, list[int]] = collections.defaultdict(list)
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                if value is not None and value.is_initializer() and _NUMBER.search(value.name or ""):
                    places[(self._keys[index], _NUMBER.sub("#", value.name or ""))].append(index)
        gaps: collections.Counter[int] = collections.Counter()
        for found in places.values():
            gaps.update(later - earlier for earlier, later in itertools.pairwise(found))
        likely = [gap for gap, _ in gaps.most_common(3) if gap >= _SHORTEST_BLOCK]
        repeated = [found for found in places.values() if len(found) > 1]
        # The first layer may differ from the others, because it computes what they share: start at the second, too.
        anchors = [min(found[layer] for found in repeated) for layer in (0, 1)] if repeated else []
        return [(anchor, gap) for gap in likely for anchor in anchors]

    def run(self, anchor: int, period: int) -> Run | None:
        """Return the longest run of blocks of `period` nodes whose first block contains the node `anchor`."""
        best: Run | None = None
        for start in range(max(0, anchor - period + 1), anchor + 1):
            carried: dict[str, str] = {}
            if not self._same_block(start, period, start, carried):
                continue
            count = 2
            while self._same_block(start + (count - 1) * period, period, start, None):
                count += 1
            if best is None or count > best.count:
                handed_on = tuple((one, other) for one, other in carried.items() if one != other)
                best = Run(start, period, count, handed_on)
        return best

    def _same_block(self, start: int, period: int, origin: int, carried: dict[str, str] | None) -> bool:
        """Return whether the block at `start` equals the next one.

        `origin` is where the first block starts: all blocks may share what lies before it. `carried`, if given,
        collects the values that enter the first block where the second reads a result of the block before it.
        """
        if start + 2 * period > len(self.nodes):
            return False
        return all(self._same(index, index + period, origin, carried) for index in range(start, start + period))

    def _same(self, index: int, later: int, origin: int, carried: dict[str, str] | None) -> bool:
        if self._keys[index] != self._keys[later]:
            return False
        one, other = self.nodes[index], self.nodes[later]
        inputs = zip(one.inputs, other.inputs, strict=True)
        if not all(self._same_input(x, y, index, later, origin, carried) for x, y in inputs):
            return False
        return all(
            x.is_graph_output() == y.is_graph_output() and (not x.is_graph_output() or _advances(x.name, y.name))
            for x, y in zip(one.outputs, other.outputs, strict=True)
        )

    def _same_input(
        self,
        x: onnx_ir.Value | None,
        y: onnx_ir.Value | None,
        index: int,
        later: int,
        origin: int,
        carried: dict[str, str] | None,
    ) -> bool:
        if x is None or y is None:
            return x is y
        first, second = x.producer(), y.producer()
        inside = first is not None and self.position[id(first)] >= origin
        if x is y:  # A value that all layers read is made before them, and is not passed from layer to layer.
            shared = carried is None or carried.setdefault(x.name or "", y.name or "") == (y.name or "")
            return shared and not inside
        if first is None and second is None:
            return _same_leaf(x, y)
        if second is None:
            return False
        back = later - self.position[id(second)]
        if first is not None and x.index() == y.index():
            # Equal distances mean something only inside of the layers: a value from before them stands anywhere.
            if inside and index - self.position[id(first)] == back:
                return True
            if self.position[id(second)] < origin and self._same_prelude(first, second):
                return True
        if carried is None or inside or not index - origin < back <= later - origin:
            return False
        # The first layer reads a value from before the layers, where later ones read a result of the layer before.
        return carried.setdefault(x.name or "", y.name or "") == (y.name or "")

    def _same_prelude(self, first: onnx_ir.Node, second: onnx_ir.Node) -> bool:
        """Return whether two nodes before the layers correspond, each serving one layer, such as its cache's length."""
        if self._keys[self.position[id(first)]] != self._keys[self.position[id(second)]]:
            return False
        for x, y in zip(first.inputs, second.inputs, strict=True):
            if x is y:
                continue
            if x is None or y is None:
                return False
            one, other = x.producer(), y.producer()
            if one is None and other is None:
                if not _same_leaf(x, y):
                    return False
            elif one is None or other is None or not self._same_prelude(one, other):
                return False
        return True


def _key(node: onnx_ir.Node) -> tuple[object, ...]:
    return node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes_key(node)


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
    """Return whether two names are equal except that at least one number between dots is one more in the later name."""
    one, other = _NUMBER.split(f".{earlier}."), _NUMBER.split(f".{later}.")
    if len(one) != len(other) or one[0::2] != other[0::2]:
        return False
    steps = {int(y) - int(x) for x, y in zip(one[1::2], other[1::2], strict=True)}
    return 1 in steps and steps <= {0, 1}
