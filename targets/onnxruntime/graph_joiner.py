"""Join the graphs of all ranks into one graph, node by node.

Nodes that compute the same value on every rank become one node. AllReduce becomes Sum, AllGather becomes Concat.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.attributes import attributes_key
from passopt.ir.graph.builder import Builder, Built
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.decoder import ATTENTION_MASK, DEGREE, INPUT_IDS, KV_HEADS, LOGITS, POSITION_IDS
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of

_SHARED_INPUTS = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
_HEAD_AXIS = 1
_GRAPHS = {onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS}


class Joiner:
    """Build one graph out of the graphs of all ranks, which must have the same nodes in the same order.

    `_values[r]` maps each value of rank r to the value that stands for it in the joined graph. Several ranks may map
    to the same joined value.
    """

    def __init__(self, ranks: Sequence[onnx_ir.Model], heads: int | None, replicated: set[str]) -> None:
        """Prepare to join `ranks`.

        Args:
            ranks: The model of each rank.
            heads: The number of key-value heads without padding; None for as many as the ranks hold together.
            replicated: The names of weights that are known to be the same on every rank, so that one copy is kept.
        """
        self._ranks = ranks
        self._heads = heads
        self._replicated = replicated
        self._first = ranks[0]
        self._values: list[dict[onnx_ir.Value | None, onnx_ir.Value | None]] = [{None: None} for _ in ranks]
        self._nodes: list[onnx_ir.Node] = []
        self._initializers: list[onnx_ir.Value] = []
        self._inputs: list[onnx_ir.Value] = []
        self._names: set[str] = set()
        self._opset = self._first.graph.opset_imports.get("", 0)

    def joined(self, rank_logits: bool) -> onnx_ir.Model:
        """Return the joined model, or raise ModelError if the ranks' graphs do not fit together.

        With `rank_logits`, the logits of each rank are additional outputs `rank{r}/logits`.
        """
        graphs = [model.graph for model in self._ranks]
        self._check_equal(
            [(len(graph), len(graph.inputs), len(graph.outputs)) for graph in graphs], "(nodes, inputs, outputs)"
        )
        for name in self._first.graph.initializers:
            self._add_initializer(name)
        for values in zip(*(graph.inputs for graph in graphs), strict=True):
            self._add_input(values)
        for nodes in zip(*graphs, strict=True):
            self._add_node(nodes)
        outputs = [self._output(values) for values in zip(*(graph.outputs for graph in graphs), strict=True)]
        if rank_logits:
            outputs += self._logits_of_ranks()
        graph = onnx_ir.Graph(
            self._inputs,
            outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=dict(self._first.graph.opset_imports),
            name=self._first.graph.name,
        )
        metadata = {key: text for key, text in self._first.metadata_props.items() if key not in {DEGREE, KV_HEADS}}
        functions = self._first.functions.values()
        return onnx_ir.Model(
            graph,
            ir_version=self._first.ir_version,
            functions=[function.clone() for function in functions],
            metadata_props=metadata,
        )

    def _add_initializer(self, name: str) -> None:
        values = [model.graph.initializers.get(name) for model in self._ranks]
        expressions = [None if value is None else expression_of(value) for value in values]
        if None in expressions:
            raise ModelError(f"rank{expressions.index(None)} has no weight {name!r}, which rank0 has")
        shared = name in self._replicated or len(set(expressions)) == 1
        made: onnx_ir.Value | None = None
        for rank, value in enumerate(values):
            assert value is not None
            if made is None or not shared:
                made = self._initializer(name if shared else f"rank{rank}/{name}", value)
            self._values[rank][value] = made

    def _initializer(self, name: str, value: onnx_ir.Value) -> onnx_ir.Value:
        tensor = value.const_value
        assert tensor is not None
        data: onnx_ir.TensorProtocol
        if isinstance(tensor, LazyWeight):
            data = LazyWeight(tensor.expression, name)
        else:
            data = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        made = _value(name, data.dtype, onnx_ir.Shape(data.shape.numpy()))
        made.const_value = data
        self._initializers.append(made)
        return made

    def _add_input(self, values: Sequence[onnx_ir.Value]) -> None:
        first = values[0]
        name, dims = _declared(first)
        if name in _SHARED_INPUTS or not name.startswith("past."):
            self._share(values, self._input(name, first.dtype, dims))
            return
        local = dims[_HEAD_AXIS]
        if not isinstance(local, int):
            raise ModelError(f"input {name!r}: the number of heads is unknown, shape {first.shape}")
        if self._heads == 1:  # A single key-value head cannot be split: every rank holds all of it.
            self._share(values, self._input(name, first.dtype, dims))
            return
        padded = local * len(self._ranks)
        true = self._true(name, padded)
        dims[_HEAD_AXIS] = true
        whole = self._input(name, first.dtype, dims)
        builder = Builder(self._opset, self._unique, f"joined/{name}")
        full = whole
        if true != padded:
            full = builder.Pad(whole, [0, 0, 0, 0, 0, padded - true, 0, 0])
        if len(values) == 1:
            parts: Sequence[onnx_ir.Value] = (full,)
        else:
            parts = builder.Split(full, [local] * len(values), axis=_HEAD_AXIS, outputs=len(values))
        self._take(builder.built)
        for rank, (value, part) in enumerate(zip(values, parts, strict=True)):
            self._values[rank][value] = part

    def _true(self, name: str, padded: int) -> int:
        """Return the number of key-value heads without padding; `padded` is how many the ranks hold together."""
        heads = self._heads if self._heads is not None else padded
        if not 0 < heads <= padded:
            raise ModelError(f"{name!r}: the ranks hold {padded} key-value heads, the unsplit model {heads}")
        return heads

    def _input(self, name: str, dtype: onnx_ir.DataType | None, dims: Sequence[int | str | None]) -> onnx_ir.Value:
        value = _value(self._unique(name), dtype, onnx_ir.Shape(dims))
        self._inputs.append(value)
        return value

    def _add_node(self, nodes: Sequence[onnx_ir.Node]) -> None:
        self._check_equal([node.op_identifier() for node in nodes], f"operators at {nodes[0].name!r}")
        inputs = [[self._values[rank][value] for value in node.inputs] for rank, node in enumerate(nodes)]
        if is_collective(nodes[0]):
            self._add_collective(nodes, [values[0] for values in inputs])
            return
        alike = [_alike(node, values, nodes[0], inputs[0]) for node, values in zip(nodes, inputs, strict=True)]
        made = self._copy(nodes[0], "" if all(alike) else "rank0/", inputs[0])
        for rank, node in enumerate(nodes):
            source = made if alike[rank] else self._copy(node, f"rank{rank}/", inputs[rank])
            for value, output in zip(node.outputs, source.outputs, strict=True):
                self._values[rank][value] = output

    def _copy(self, node: onnx_ir.Node, prefix: str, inputs: Sequence[onnx_ir.Value | None]) -> onnx_ir.Node:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise ModelError(f"{node.op_type} {node.name!r}: nodes with subgraphs cannot be joined")
        outputs = [
            _value(self._unique(f"{prefix}{value.name}") if value.name else "", value.dtype, value.shape)
            for value in node.outputs
        ]
        copy = onnx_ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            outputs=outputs,
            name=self._unique(f"{prefix}{node.name}"),
            metadata_props=dict(node.metadata_props),
        )
        self._nodes.append(copy)
        return copy

    def _add_collective(self, nodes: Sequence[onnx_ir.Node], parts: Sequence[onnx_ir.Value | None]) -> None:
        """Add one Sum or Concat that replaces the collective of every rank, since all ranks get the same value."""
        node = nodes[0]
        output = node.outputs[0]
        name, dims = output.name or "", output.shape
        attributes = []
        if node.op_type == "AllGather":
            size = node.attributes["group_size"].as_int()
            if size != len(self._ranks):
                raise ModelError(f"AllGather {node.name!r}: gathers from {size} ranks, there are {len(self._ranks)}")
            attributes = [onnx_ir.AttrInt64("axis", node.attributes["axis"].as_int())]
        value = _value(self._unique(name), output.dtype, dims)
        joined = onnx_ir.Node(
            "",
            "Sum" if node.op_type == "AllReduce" else "Concat",
            parts,
            attributes,
            outputs=[value],
            name=self._unique(node.name or name),
            metadata_props=dict(node.metadata_props),
        )
        self._nodes.append(joined)
        self._share([node.outputs[0] for node in nodes], value)

    def _output(self, values: Sequence[onnx_ir.Value]) -> onnx_ir.Value:
        first = values[0]
        name, dims = _declared(first)
        parts = [self._values[rank][value] for rank, value in enumerate(values)]
        if not name.startswith("present.") or self._heads == 1:
            made = parts[0]
            assert made is not None
            if made.name != name:
                made.name = self._unique(name)
            return made
        local = dims[_HEAD_AXIS]
        if not isinstance(local, int):
            raise ModelError(f"output {name!r}: the number of heads is unknown, shape {first.shape}")
        padded = local * len(values)
        dims[_HEAD_AXIS] = self._true(name, padded)
        builder = Builder(self._opset, self._unique, f"joined/{name}")
        whole = builder.Concat(*parts, axis=_HEAD_AXIS)
        if dims[_HEAD_AXIS] != padded:
            whole = builder.Slice(whole, [0], [dims[_HEAD_AXIS]], [_HEAD_AXIS])
        self._take(builder.built)
        for part in parts:
            if part is not None and part.name == name:
                part.name = self._unique(f"rank0/{name}")
        whole.name, whole.type, whole.shape = name, first.type, onnx_ir.Shape(dims)
        return whole  # type: ignore[no-any-return]

    def _logits_of_ranks(self) -> list[onnx_ir.Value]:
        outputs = []
        for rank, model in enumerate(self._ranks):
            value = next(value for value in model.graph.outputs if value.name == LOGITS)
            own = self._values[rank][value]
            assert own is not None
            name = f"rank{rank}/{LOGITS}"
            if own.name == name:
                own.name = self._unique(f"{name}.own")
            builder = Builder(self._opset, self._unique, f"joined/rank{rank}")
            copy = builder.Identity(own)
            self._take(builder.built)
            copy.name, copy.type, copy.shape = name, value.type, value.shape
            outputs.append(copy)
        return outputs

    def _take(self, built: Built) -> None:
        self._nodes.extend(built.nodes)
        self._initializers.extend(built.initializers)

    def _share(self, values: Sequence[onnx_ir.Value], made: onnx_ir.Value) -> None:
        for rank, value in enumerate(values):
            self._values[rank][value] = made

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}.{count}"
        self._names.add(found)
        return found

    def _check_equal(self, facts: Sequence[object], what: str) -> None:
        for rank, fact in enumerate(facts):
            if fact != facts[0]:
                raise ModelError(f"the ranks' graphs differ in {what}: rank0 has {facts[0]}, rank{rank} has {fact}")


def _value(name: str, dtype: onnx_ir.DataType | None, shape: onnx_ir.Shape | None) -> onnx_ir.Value:
    return onnx_ir.Value(
        name=name,
        type=None if dtype is None else onnx_ir.TensorType(dtype),
        shape=None if shape is None else onnx_ir.Shape(shape.dims),
    )


def _declared(value: onnx_ir.Value) -> tuple[str, list[int | str | None]]:
    if value.shape is None or value.dtype is None:
        raise ModelError(f"graph input or output {value.name!r} has no shape or dtype")
    return value.name or "", [dim if isinstance(dim, int) else dim.value for dim in value.shape.dims]


def _alike(
    node: onnx_ir.Node,
    inputs: Sequence[onnx_ir.Value | None],
    first: onnx_ir.Node,
    first_inputs: Sequence[onnx_ir.Value | None],
) -> bool:
    """Return whether a rank's node computes the same value as the node of rank 0.

    It does if the attributes and the joined inputs are the same. All ranks hold shards of equal shape, so the result of
    Shape is always the same.
    """
    if attributes_key(node) != attributes_key(first):
        return False
    is_shape = node.op_type == "Shape" and not node.domain
    return is_shape or all(x is y for x, y in zip(inputs, first_inputs, strict=True))
