"""Change a graph safely: the editor chooses names and insertion points, keeps provenance, and removes dead nodes.

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
from passopt.ir.shapes.dimensions import clash, merged_shapes

_GRAPH, _GRAPHS = onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS


class Editor:
    """Edits the main graph of a model on behalf of a pass; `inside` gives an editor of a body of If, Loop or Scan.

    Args:
        model: The model, which is changed in place.
        author: The name of the pass, which becomes part of the provenance of new nodes.

    Example:
        Replace a node by two others::

            editor = Editor(model, "my-pass")
            builder = editor.builder("mlp")
            y = builder.Relu(builder.Neg(node.inputs[0]))
            editor.replace({node.outputs[0]: y}, builder.built, origins=[node])
    """

    def __init__(self, model: onnx_ir.Model, author: str) -> None:
        self.model = model
        self.graph = model.graph
        self.author = author
        self.opset = model.graph.opset_imports.get("", 0)
        self.types = RunContext.of(model).types
        self._names: set[str] | None = None
        self._counters: dict[str, int] = {}
        self._order = NodeOrder(model.graph)

    def inside(self, body: onnx_ir.Graph) -> Editor:
        """Return an editor of a body of an If, Loop or Scan, at any depth, which makes names for this graph too.

        New initializers become those of the main graph, which all bodies can read.

        Args:
            body: The graph that the new editor changes.
        """
        editor = Editor(self.model, self.author)
        editor.graph, editor._order = body, NodeOrder(body)
        if self._names is None:
            self.survey()
        editor._names, editor._counters = self._names, self._counters
        return editor

    def unique(self, name: str) -> str:
        """Return `name`, or the first of `name.2`, `name.3` and so on that no value or node has yet, and reserve it.

        Args:
            name: The name that is wanted.
        """
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
        """Collect all names of the graph before the first new name is made.

        Returns:
            True if the types of all values of the main graph are known.
        """
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
        """Return a builder of nodes for this graph; `insert`, `replace` or `follow` put them into it.

        Args:
            hint: What the names of its nodes and values start with.
        """
        return Builder(self.opset, self.unique, hint, types=self.types)

    def insert(
        self,
        built: Built,
        before: onnx_ir.Node | None,
        origins: Iterable[onnx_ir.Node] = (),
        *,
        after: onnx_ir.Node | None = None,
    ) -> None:
        """Insert built nodes before or after a node (given neither, at the end) and register their initializers.

        Args:
            built: The nodes and initializers of a builder.
            before: The node in front of which the nodes are inserted.
            origins: The nodes that the new ones stand for; their provenance is passed on.
            after: The node behind which the nodes are inserted; it takes precedence over `before`.

        Raises:
            VerifyError: If a node calls a passopt function that has no definition over the model's opset.
        """
        main = self.model.graph
        for value in built.initializers:
            main.register_initializer(value)
        provenance = provenance_of(self.author, list(origins))
        for node in built.nodes:
            node.metadata_props.update(provenance)
            if node.domain and node.domain not in main.opset_imports:
                main.opset_imports[node.domain] = 1
            self._define_function(node)
        if after is not None:
            self.graph.insert_after(after, built.nodes)
        elif before is not None:
            self.graph.insert_before(before, built.nodes)
        else:
            self.graph.extend(built.nodes)
        self._order.insert(built.nodes, before=before, after=after)

    def _define_function(self, node: onnx_ir.Node) -> None:
        """Add the definition of a passopt function to the model if the node calls one."""
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
        """Insert `built`, let every reader of an old value read the new one, and remove the nodes that are then dead.

        The new value takes the name of the old one; if it replaces several, it takes the name of the first.

        Args:
            replaced: Maps each old value to the new value, which must have the same dtype and a compatible shape.
            built: The nodes and initializers that compute the new values.
            origins: The nodes that the new ones stand for; their provenance is passed on.
            before: The node in front of which to insert. By default, the editor finds the place.
            rule: The name that errors give as the culprit, if it is not the author.

        Raises:
            VerifyError: If dtypes or shapes do not fit, or if the rewrite would make values depend on themselves.
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
            # Graph outputs keep the stated shape: exporters and inference spell `past + seq` differently.
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
        """Insert `built` right after the producer of `value`, and let readers of `value` read `result` instead.

        `result` takes the name of `value`, which is renamed with `suffix`.

        Args:
            value: The output of a node.
            result: The value, computed by `built`, that takes its place.
            built: The nodes and initializers to insert. Those that read `value` go on reading it.
            suffix: What is appended to the old name of `value`.
            outputs_only: Let all nodes go on reading `value`, and replace it only as a graph output.

        Raises:
            VerifyError: If `value` is not the output of a node.
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
        """Remove those of `nodes` whose outputs nobody reads, then what only they read.

        Args:
            nodes: The nodes that may be dead. Others are removed only if a removed node was their last reader.

        Returns:
            How many nodes were removed.
        """
        dead: dict[onnx_ir.Node, None] = {}
        work = list(nodes)
        while work:
            node = work.pop()
            if node in dead or node.graph is not self.graph or not _is_read_only_by(node, dead):
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
            self.graph.remove(dead)  # All at once, because every call looks at every graph output.
        return len(dead)

    def remove_unused_initializer(self, value: onnx_ir.Value) -> bool:
        """Remove an initializer that no node reads.

        One that is also a graph input or output stays, because callers of the model can see it.

        Args:
            value: The initializer.

        Returns:
            Whether it was removed.
        """
        if is_read(value) or value.is_graph_input() or value.name is None:
            return False
        owner = next((graph for graph in (self.graph, self.model.graph) if _owns(graph, value)), None)
        if owner is None:
            return False
        del owner.initializers[value.name]
        return True

    def _identity(self, value: onnx_ir.Value, old: onnx_ir.Value, origins: Sequence[onnx_ir.Node]) -> onnx_ir.Value:
        """Insert an Identity of `value`, since a graph output cannot take the name of an input or initializer."""
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
        """Insert before the first root, or behind the last producer of the new nodes' inputs if that comes later."""
        if before is not None or len(roots) == 1:
            self.insert(built, before or roots[0], origins)
            return
        first = min(roots, key=self._order.position)
        inside = set(built.nodes)
        values = (value for node in built.nodes for value in node.inputs if value is not None)
        found = {producer for value in values if (producer := value.producer()) is not None} - inside
        producers = (node for node in found if node.graph is self.graph)
        latest = max(producers, key=self._order.position, default=first)
        if self._order.position(latest) < self._order.position(first):
            self.insert(built, first, origins)
        else:
            self.insert(built, None, origins, after=latest)

    def _restore_order(self, built: Built) -> None:
        """Move nodes that read the new nodes but stand before them, as readers of the first root may, behind them."""
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


def _owns(graph: onnx_ir.Graph, value: onnx_ir.Value) -> bool:
    """Return whether a value is an initializer of this very graph."""
    return value.name is not None and graph.initializers.get(value.name) is value


def discard(built: Built) -> None:
    """Disconnect built nodes that are not wanted from their inputs, so that they do not count as readers of them."""
    for node in built.nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _check_statements(built: Built, rule: str) -> None:
    """Check that the rewrite states nothing about its values that contradicts inference; it may state more."""
    for value, (dtype, shape) in built.inferred.items():
        if dtype is not None and value.dtype != dtype:
            raise VerifyError(f"{rule}: states {value.dtype} for {value.name!r}, {_operator(value)} gives {dtype.name}")
        if shape is not value.shape and clash(shape, value.shape):
            raise VerifyError(f"{rule}: states {value.shape} for {value.name!r}, {_operator(value)} gives {shape}")


def _operator(value: onnx_ir.Value) -> str:
    node = value.producer()
    return "its node" if node is None else node.op_type


def _check_replacement(old: onnx_ir.Value, new: onnx_ir.Value, rule: str) -> None:
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        raise VerifyError(
            f"{rule}: would replace {old.name!r} ({old.dtype.name}) by {new.name!r} ({new.dtype.name}); "
            f"a rewrite must keep the dtype"
        )
    if clash(old.shape, new.shape):
        raise VerifyError(
            f"{rule}: would replace {old.name!r} of shape {old.shape} by {new.name!r} of shape {new.shape}; "
            f"a rewrite must keep the shape"
        )


def is_read(value: onnx_ir.Value) -> bool:
    """Return whether a node or the caller of the model reads the value."""
    # The public uses() copies, which is slow for a constant that every layer reads.
    return bool(value._uses) or value.is_graph_output()


def use_count(value: onnx_ir.Value) -> int:
    """Return how many inputs of nodes read the value."""
    return len(value._uses)


def _is_read_only_by(node: onnx_ir.Node, readers: Container[onnx_ir.Node]) -> bool:
    """Return whether only the nodes `readers` read the outputs of `node`."""
    for value in node.outputs:
        if value.is_graph_output():
            return False
        for use in value._uses:
            if use.node not in readers:
                return False
    return True
