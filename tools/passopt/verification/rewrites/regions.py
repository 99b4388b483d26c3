"""Cut a rewrite out of its graph: what it replaces and what it puts there, back to values that can be sampled.

Both sides stop at the same values, or one of them would be run on inputs that do not belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import onnx_ir

from passopt.verification.rewrites.value_kinds import Kind, Kinds, has_subgraph, numbers_read

#: How many times a cut is widened by a node before it is given up.
_WIDENINGS = 48


#: Values between a leaf and others that it may follow from.
_FAR = 8


class Unchecked(Exception):
    """A rewrite that cannot be checked alone, with the reason for the report."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One graph that a cut is made in: its opsets, its functions, and where each value stands."""

    opsets: Mapping[str, int]
    functions: Mapping[onnx_ir.OperatorIdentifier, onnx_ir.Function]
    kinds: Kinds

    @classmethod
    def of(cls, model: onnx_ir.Model, kinds: Kinds) -> Side:
        return cls(dict(model.graph.opset_imports), model.functions, kinds)


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes in topological order that compute `roots` from `leaves`, which are sampled, and `weights`."""

    nodes: tuple[onnx_ir.Node, ...]
    leaves: tuple[onnx_ir.Value, ...]
    weights: tuple[onnx_ir.Value, ...]
    roots: tuple[onnx_ir.Value, ...]
    side: Side

    def read_leaves(self) -> list[onnx_ir.Value]:
        """The leaves whose numbers count; of others only the shape or dtype is asked, which is known."""
        read = {value for node in self.nodes for value in numbers_read(node)} | set(self.roots)
        return [leaf for leaf in self.leaves if leaf in read]

    def open_leaves(self) -> list[onnx_ir.Value]:
        """Those of `read_leaves` that stand inside of the graph, and so could be computed too."""
        return [leaf for leaf in self.read_leaves() if leaf.producer() is not None]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The roots that a rewrite replaces, and what replaces them; equal in number and order."""

    before: Region
    after: Region


@dataclasses.dataclass(frozen=True)
class Request:
    """What to cut: roots on both sides, and the names of values that are computed inside of the cut, on each."""

    old_roots: tuple[onnx_ir.Value, ...]
    new_roots: tuple[onnx_ir.Value, ...]
    before: Side
    after: Side
    inside_before: frozenset[str]
    inside_after: frozenset[str]


def cut(request: Request, has_shape: Callable[[onnx_ir.Value], bool], position: Callable[[onnx_ir.Value], int]) -> Cut:
    """Both regions, widened upstream until they agree on their leaves, all of known shape, none a function of others.

    `position` says where the producer of a value stands in the graph. Raises Unchecked.
    """
    widened: set[str] = set()
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
        derived = _derived(before) | _derived(after)
        if not derived:
            break
        widened |= derived
    else:
        raise Unchecked("the values that it is computed from depend on each other over too many nodes")
    if shapeless:
        raise Unchecked(f"the shape of the input {shapeless[0].name} is unknown")
    return Cut(before, after)


def _derived(region: Region) -> set[str]:
    """Names of values between leaves: those of a leaf that follows from the other leaves within a few nodes."""
    leaves = set(region.read_leaves())
    for leaf in region.open_leaves():
        between = _between(leaf, leaves, region.side)
        if between:
            return {value.name or "" for value in between}
    return set()


def _between(leaf: onnx_ir.Value, leaves: Collection[onnx_ir.Value], side: Side) -> list[onnx_ir.Value]:
    """`leaf` and what it is computed from down to other leaves; empty if it has a source of its own, or is far."""
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
    """The names of all values that the nodes compute."""
    return frozenset(value.name for node in nodes for value in node.outputs if value.name)
