"""Cut a rewrite out of its graph: the nodes that it replaces and the new ones, back to values that can be sampled.

Both sides of a cut start from the same values. Otherwise one of them would run on inputs that do not belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import onnx_ir

from passopt.verification.rewrites.value_kinds import Kind, Kinds, has_subgraph, numbers_read

#: A cut is widened by a node at most this many times, then the rewrite counts as unchecked.
_WIDENINGS = 48


#: The largest number of values, the leaf included, over which a leaf is traced back to other leaves.
_FAR = 8


class Unchecked(Exception):
    """Raised for a rewrite that cannot be checked on its own; its message is the reason that reports show."""


@dataclasses.dataclass(frozen=True)
class Side:
    """The graph on one side of a rewrite: its opsets, its functions and the kinds of its values."""

    opsets: Mapping[str, int]
    functions: Mapping[onnx_ir.OperatorIdentifier, onnx_ir.Function]
    kinds: Kinds

    @classmethod
    def of(cls, model: onnx_ir.Model, kinds: Kinds) -> Side:
        """Return the side for a model, with the kinds of its values found so far."""
        return cls(dict(model.graph.opset_imports), model.functions, kinds)


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes in topological order that compute `roots` from `leaves`, which are sampled, and from `weights`."""

    nodes: tuple[onnx_ir.Node, ...]
    leaves: tuple[onnx_ir.Value, ...]
    weights: tuple[onnx_ir.Value, ...]
    roots: tuple[onnx_ir.Value, ...]
    side: Side

    def read_leaves(self) -> list[onnx_ir.Value]:
        """Return the leaves whose numbers are read; nodes read only the shape or dtype of the others."""
        read = {value for node in self.nodes for value in numbers_read(node)} | set(self.roots)
        return [leaf for leaf in self.leaves if leaf in read]

    def open_leaves(self) -> list[onnx_ir.Value]:
        """Return those of `read_leaves` that a node computes, so that the region could be widened past them."""
        return [leaf for leaf in self.read_leaves() if leaf.producer() is not None]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The region of the roots that a rewrite replaces, and the region of their replacements, in the same order."""

    before: Region
    after: Region

    def unread(self) -> frozenset[str]:
        """Return the names of computed leaves whose numbers only the rewritten nodes read, not their replacements."""
        read = {leaf.name for leaf in self.after.read_leaves()}
        return frozenset(leaf.name for leaf in self.before.open_leaves() if leaf.name and leaf.name not in read)


@dataclasses.dataclass(frozen=True)
class Request:
    """The data of a cut: the roots on both sides, and the names of values that either side computes inside the cut.

    `widened` names further values to compute inside on both sides.
    """

    old_roots: tuple[onnx_ir.Value, ...]
    new_roots: tuple[onnx_ir.Value, ...]
    before: Side
    after: Side
    inside_before: frozenset[str]
    inside_after: frozenset[str]
    widened: frozenset[str] = frozenset()


def cut(request: Request, has_shape: Callable[[onnx_ir.Value], bool], position: Callable[[onnx_ir.Value], int]) -> Cut:
    """Return both regions of a rewrite, widened upstream until they can be sampled.

    That is when both sides read the same leaves, all leaves have a known shape, and no leaf follows from the others.

    Args:
        request: The rewrite to cut out.
        has_shape: A function that tells whether the shape of a value is known.
        position: A function that returns the position of a value's producer in the graph.

    Raises:
        Unchecked: If no such regions are found, or if a node in them has a subgraph.
    """
    widened = set(request.widened)
    for _ in range(_WIDENINGS):
        before = _region(request.old_roots, request.inside_before | widened, request.before)
        after = _region(request.new_roots, request.inside_after | widened, request.after)
        names = {leaf.name for leaf in before.read_leaves()}
        foreign = [leaf for leaf in after.read_leaves() if leaf.name not in names and _is_data(request.after, leaf)]
        shapeless = [leaf for leaf in (*before.leaves, *after.leaves) if not has_shape(leaf)]
        candidates = [leaf for leaf in shapeless if leaf.producer() is not None]
        if foreign and not candidates:
            candidates = [*before.open_leaves(), *after.open_leaves()]
        if candidates:
            widened.add(max(candidates, key=position).name or "")
            continue
        derived = _derived(before) | _derived(after) | _looked_up(before, after)
        if not derived:
            break
        widened |= derived
    else:
        raise Unchecked("the values that it is computed from depend on each other over too many nodes")
    if shapeless:
        raise Unchecked(f"the shape of the input {shapeless[0].name} is unknown")
    return Cut(before, after)


def _looked_up(*regions: Region) -> set[str]:
    """Return the names of leaves that are computed from ids which the cut reads as well, such as rows of a table."""
    leaves = [(leaf, region) for region in regions for leaf in region.read_leaves()]
    ids = {leaf.name for leaf, region in leaves if region.side.kinds.of(leaf) == Kind.TOKENS}
    if not ids:
        return set()
    return {leaf.name or "" for region in regions for leaf in region.open_leaves() if _is_made_of(leaf, ids)}


def _is_made_of(leaf: onnx_ir.Value, names: Collection[str | None]) -> bool:
    """Return whether a value is computed, within a few nodes, from one of the named ones."""
    work, seen = [leaf], {leaf}
    while work and len(seen) <= _WIDENINGS:
        node = work.pop(0).producer()
        for item in node.inputs if node is not None else ():
            if item is not None and item.name in names:
                return True
            if item is not None and item not in seen:
                seen.add(item)
                work.append(item)
    return False


def _derived(region: Region) -> set[str]:
    """Return the names of the values between a leaf and other leaves from which it follows within a few nodes.

    The result includes the leaf; it is empty if no leaf follows from others.
    """
    leaves = set(region.read_leaves())
    for leaf in region.open_leaves():
        between = _between(leaf, leaves, region.side)
        if between:
            return {value.name or "" for value in between}
    return set()


def _between(leaf: onnx_ir.Value, leaves: Collection[onnx_ir.Value], side: Side) -> list[onnx_ir.Value]:
    """Return `leaf` and the values it is computed from, down to other leaves.

    The result is empty if the leaf also depends on something else, or if the other leaves are too far away.
    """
    between: dict[onnx_ir.Value, None] = {leaf: None}
    work, met = [leaf], False
    while work and len(between) <= _FAR:
        node = work.pop().producer()
        if node is None:
            return []
        for item in node.inputs:
            if item is None or item in between or not _is_data(side, item):
                continue
            if item in leaves:
                met = True
            else:
                between[item] = None
                work.append(item)
    return list(between) if met and not work else []


def _is_data(side: Side, leaf: onnx_ir.Value) -> bool:
    return side.kinds.of(leaf) == Kind.DATA


def _region(roots: Sequence[onnx_ir.Value], inside: Collection[str], side: Side) -> Region:
    nodes: dict[onnx_ir.Node, None] = {}
    leaves: dict[onnx_ir.Value, None] = {}
    weights: dict[onnx_ir.Value, None] = {}
    seen: set[onnx_ir.Value] = set()
    stack: list[onnx_ir.Value] = list(reversed(roots))
    while stack:
        value = stack[-1]
        node = value.producer()
        opened = node is not None and (value.name in inside or side.kinds.of(value) < Kind.DATA)
        if value in seen or not opened or node is None:
            stack.pop()
            if not opened and value not in seen:
                (weights if _is_weight(value) else leaves).setdefault(value)
            seen.add(value)
            continue
        if has_subgraph(node):
            raise Unchecked(f"{node.op_type} has a subgraph")
        waiting = [item for item in node.inputs if item is not None and item not in seen]
        stack += reversed(waiting)
        if not waiting:
            nodes.setdefault(node)
            seen.update(node.outputs)
    return Region(tuple(nodes), tuple(leaves), tuple(weights), tuple(roots), side)


def _is_weight(value: onnx_ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def names_of(nodes: Iterable[onnx_ir.Node]) -> frozenset[str]:
    """Return the names of all values that the nodes compute."""
    return frozenset(value.name for node in nodes for value in node.outputs if value.name)
