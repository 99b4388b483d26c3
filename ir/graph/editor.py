"""Changing a graph safely: the editor owns names, insertion points, provenance and the removal of what died.

A rule or pass builds nodes with `Builder`; only the editor puts them into the graph.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.builder import Builder, Built
from passopt.ir.graph.functions import DOMAIN, local_function
from passopt.ir.graph.node_order import NodeOrder
from passopt.ir.graph.provenance import provenance_of
from passopt.ir.graph.run_context import Replacement, RunContext
from passopt.ir.graph.shapes import merged_shapes

_GRAPH, _GRAPHS = onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS


class Editor:
    """Edits the main graph of `model` on behalf of the pass `author`."""

    def __init__(self, model: onnx_ir.Model, author: str) -> None:
        self.model = model
        self.graph = model.graph
        self.author = author
        self.opset = model.graph.opset_imports.get("", 0)
        self.types = RunContext.of(model).types
        self._names: set[str] | None = None
        self._counters: dict[str, int] = {}
        self._order = NodeOrder(model.graph)

    def unique(self, name: str) -> str:
        """`name`, or `name.2`, `name.3` …, whichever no value or node has yet."""
        if self._names is None:
            self.survey()
            assert self._names is not None
        found, count = name, self._counters.get(name, 1)
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._counters[name] = count
        self._names.add(found)
        return found

    def survey(self) -> bool:
        """Look once at the whole graph, for its names, before the first is made; True if all types are known."""
        names: set[Any] = set()
        is_typed, graphs = True, [self.graph]
        while graphs:
            graph = graphs.pop()
            names.update(value.name for value in graph.inputs)
            names.update(graph.initializers.data)
            for node in graph:
                names.add(node.name)
                for value in node.outputs:
                    names.add(value.name)
                    if value.type is None and graph is self.graph:
                        is_typed = False
                for attribute in node.attributes.data.values():
                    kind = attribute.type
                    if kind is _GRAPH:
                        graphs.append(attribute.as_graph())
                    elif kind is _GRAPHS:
                        graphs.extend(attribute.as_graphs())
        self._names = names - {None, ""}
        return is_typed

    def builder(self, hint: str) -> Builder:
        return Builder(self.opset, self.unique, hint, types=self.types)

    def insert(
        self,
        built: Built,
        before: onnx_ir.Node | None,
        origins: Iterable[onnx_ir.Node] = (),
        *,
        after: onnx_ir.Node | None = None,
    ) -> None:
        """Put built nodes before or after a node (neither: at the end) and register their initializers."""
        for value in built.initializers:
            self.graph.register_initializer(value)
        provenance = provenance_of(self.author, list(origins))
        for node in built.nodes:
            node.metadata_props.update(provenance)
            if node.domain and node.domain not in self.graph.opset_imports:
                self.graph.opset_imports[node.domain] = 1
            self._define_function(node)
        if after is not None:
            self.graph.insert_after(after, built.nodes)
        elif before is not None:
            self.graph.insert_before(before, built.nodes)
        else:
            self.graph.extend(built.nodes)
        self._order.insert(built.nodes, before=before, after=after)

    def _define_function(self, node: onnx_ir.Node) -> None:
        """A call of a function of passopt's own brings its definition into the model."""
        if node.domain != DOMAIN or node.op_identifier() in self.model.functions:
            return
        function = local_function(node.op_type, self.opset)
        if function is None:
            raise VerifyError(f"{self.author}: {node.op_type} has no definition over opset {self.opset}")
        self.model.functions[function.identifier()] = function

    def replace(
        self,
        replaced: Mapping[onnx_ir.Value, onnx_ir.Value],
        built: Built,
        origins: Sequence[onnx_ir.Node],
        before: onnx_ir.Node | None = None,
        *,
        rule: str = "",
    ) -> None:
        """Insert `built`, let every use of an old value read the new one, and drop what nobody reads any more.

        The new value takes the name of the old one and must have its dtype and shape; one that stands for several keeps
        the first name. `rule` says in errors who does this, if not the author. Raises VerifyError if not.
        """
        rule = rule or self.author
        _check_statements(built, rule)
        for old, new in replaced.items():
            _check_replacement(old, new, rule)
        context = RunContext.of(self.model)
        if context.listener is not None:
            context.announce(Replacement(rule, replaced, built, tuple(origins)))
        roots = [node for old in replaced if (node := old.producer()) is not None]
        self._insert_at(roots, built, origins, before)
        unnamed = {value for node in built.nodes for value in node.outputs}
        for old, new in replaced.items():
            if new not in unnamed and old.is_graph_output():
                new = self._identity(new, old, origins)
                unnamed.add(new)
            new.type = new.type or old.type
            # What a model says of its outputs stays: exporters and inference spell `past + seq` differently.
            shapes = (old.shape, new.shape) if old.is_graph_output() else (new.shape, old.shape)
            new.shape = merged_shapes(*shapes)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            if new in unnamed:
                old.name, new.name = new.name, old.name
                unnamed.remove(new)
        if len(roots) > 1:
            self._restore_order(built)
        self.remove_dead(roots)
        for value in built.initializers:
            self.remove_unused_initializer(value)

    def follow(
        self, value: onnx_ir.Value, result: onnx_ir.Value, built: Built, suffix: str, *, outputs_only: bool = False
    ) -> None:
        """Insert `built` right after the producer of `value`; all former users read `result`, which takes its name.

        With `outputs_only`, nodes go on reading `value`, and only graph outputs become `result`.
        """
        producer = value.producer()
        if producer is None:
            raise VerifyError(f"{self.author}: {value.name!r} is not the output of a node")
        if not outputs_only:
            RunContext.of(self.model).announce(Replacement(self.author, {value: result}, built, (producer,)))
        inside = {id(node) for node in built.nodes}
        users = [(use.node, use.idx) for use in value.uses() if id(use.node) not in inside and not outputs_only]
        self.insert(built, None, [producer], after=producer)
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = result
        for node, index in users:
            node.replace_input_with(index, result)
        name = value.name or "value"
        result.name, value.name = name, self.unique(f"{name}.{suffix}")

    def remove_dead(self, nodes: Iterable[onnx_ir.Node]) -> int:
        """Remove those nodes whose outputs nobody reads, then what only they read; returns how many nodes went."""
        dead: dict[onnx_ir.Node, None] = {}
        work = list(nodes)
        while work:
            node = work.pop()
            if node in dead or node.graph is None or not _is_read_only_by(node, dead):
                continue
            dead[node] = None
            for value in node.inputs:
                if value is not None and (producer := value.producer()) is not None:
                    work.append(producer)
        for node in dead:
            for index, value in enumerate(node.inputs):
                if value is None or value.producer() in dead:
                    continue
                node.replace_input_with(index, None)
                if value.is_initializer():
                    self.remove_unused_initializer(value)
        if dead:
            self.graph.remove(dead)  # once for all: it looks at every graph output
        return len(dead)

    def remove_unused_initializer(self, value: onnx_ir.Value) -> bool:
        """Drop an initializer that no node reads, unless the caller of the model can see it."""
        if is_read(value) or value.is_graph_input() or value.name is None:
            return False
        if self.graph.initializers.get(value.name) is not value:
            return False
        del self.graph.initializers[value.name]
        return True

    def _identity(self, value: onnx_ir.Value, old: onnx_ir.Value, origins: Sequence[onnx_ir.Node]) -> onnx_ir.Value:
        """A graph output needs a name of its own, which an input or initializer cannot take."""
        builder = self.builder(old.name or "value")
        copy = builder.Identity(value)
        self.insert(builder.built, old.producer(), origins)
        assert isinstance(copy, onnx_ir.Value)
        return copy

    def _insert_at(
        self,
        roots: Sequence[onnx_ir.Node],
        built: Built,
        origins: Sequence[onnx_ir.Node],
        before: onnx_ir.Node | None,
    ) -> None:
        """Before the first root; or, if something the new nodes read comes later, right after that."""
        if before is not None or len(roots) == 1:
            self.insert(built, before or roots[0], origins)
            return
        first = min(roots, key=self._order.position)
        inside = set(built.nodes)
        values = (value for node in built.nodes for value in node.inputs if value is not None)
        producers = {producer for value in values if (producer := value.producer()) is not None} - inside
        latest = max(producers, key=self._order.position, default=first)
        if self._order.position(latest) < self._order.position(first):
            self.insert(built, first, origins)
        else:
            self.insert(built, None, origins, after=latest)

    def _restore_order(self, built: Built) -> None:
        """What reads the new nodes and stands before them, as a user of the first root may, moves behind them."""
        if not built.nodes:
            return
        position = self._order.position
        inside, last = set(built.nodes), built.nodes[-1]
        early: dict[onnx_ir.Node, None] = {}
        work = list(built.nodes)
        while work:
            node = work.pop()
            for user in dict.fromkeys(use.node for value in node.outputs for use in value.uses()):
                if user.graph is not self.graph:
                    continue
                if user in inside and node not in inside:
                    names = ", ".join(str(value.name) for made in built.nodes for value in made.outputs)
                    raise VerifyError(f"{self.author}: {names} would depend on themselves; the rewrite joins too much")
                if user not in inside and user not in early and position(user) < position(last):
                    early[user] = None
                    work.append(user)
        if early:
            moved = sorted(early, key=position)
            self.graph.remove(moved)
            self.graph.insert_after(last, moved)
            self._order.insert(moved, after=last)


def discard(built: Built) -> None:
    """Let go of nodes that were built and are not wanted, so that they do not count as uses of their inputs."""
    for node in built.nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _check_statements(built: Built, rule: str) -> None:
    """A rewrite may say more about its values than inference knows, but nothing else."""
    for value, (dtype, shape) in built.inferred.items():
        if dtype is not None and value.dtype != dtype:
            raise VerifyError(f"{rule}: states {value.dtype} for {value.name!r}, {_operator(value)} gives {dtype.name}")
        if shape is not value.shape and _clash(shape, value.shape):
            raise VerifyError(f"{rule}: states {value.shape} for {value.name!r}, {_operator(value)} gives {shape}")


def _operator(value: onnx_ir.Value) -> str:
    node = value.producer()
    return "its node" if node is None else node.op_type


def _clash(one: onnx_ir.Shape | None, other: onnx_ir.Shape | None) -> bool:
    """True if both are known and cannot be the same shape: other numbers, or the same symbols in another order."""
    if one is None or other is None:
        return False
    if len(one) != len(other):
        return True
    pairs = list(zip(one.dims, other.dims, strict=True))
    if any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs):
        return True
    symbols = [(x.value, y.value) for x, y in pairs if not isinstance(x, int) and not isinstance(y, int)]
    moved = [(x, y) for x, y in symbols if x != y]
    return (
        bool(moved)
        and None not in {x for pair in moved for x in pair}
        and {x for x, _ in moved} == {y for _, y in moved}
    )


def _check_replacement(old: onnx_ir.Value, new: onnx_ir.Value, rule: str) -> None:
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        raise VerifyError(
            f"{rule}: would replace {old.name!r} ({old.dtype.name}) by {new.name!r} ({new.dtype.name}); "
            f"a rewrite must keep the dtype"
        )
    if _clash(old.shape, new.shape):
        raise VerifyError(
            f"{rule}: would replace {old.name!r} of shape {old.shape} by {new.name!r} of shape {new.shape}; "
            f"a rewrite must keep the shape"
        )


def is_read(value: onnx_ir.Value) -> bool:
    """True if a node or the caller of the model reads the value."""
    return bool(value._uses) or value.is_graph_output()  # uses() copies: a shared constant is read in every layer


def use_count(value: onnx_ir.Value) -> int:
    """How many inputs of nodes read the value."""
    return len(value._uses)


def _is_read_only_by(node: onnx_ir.Node, readers: Container[onnx_ir.Node]) -> bool:
    """True if nobody but these nodes reads what `node` gives."""
    for value in node.outputs:
        if value.is_graph_output():
            return False
        for use in value._uses:
            if use.node not in readers:
                return False
    return True
