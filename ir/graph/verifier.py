"""Check the structure of a graph, cheaply, after every pass; whatever it finds is a defect of the pass that ran last.

Invariants: names are unique (SSA); every input is fed or produced earlier; nothing points at removed nodes; graph
inputs and outputs have types; the types of graph outputs and casts are those that the operator gives; weights are
complete. Messages show the ten nodes before and after the fault.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.attributes import bodies
from passopt.ir.graph.builder import infer_types
from passopt.ir.graph.operators import is_runtime_operator
from passopt.ir.graph.provenance import called
from passopt.ir.graph.run_context import RunContext
from passopt.ir.weights.lazy_weight import LazyWeight

_CONTEXT = 10


def verify_model(model: onnx_ir.Model) -> None:
    """Raise VerifyError at the first broken invariant of the main graph or of a local function."""
    _verify_graph(model.graph, model, _Scope(model.graph.opset_imports))
    _verify_files(model)
    for function in model.functions.values():
        _verify_graph(function, model, _Scope(function.opset_imports))


@dataclasses.dataclass(frozen=True)
class _Scope:
    """The surroundings of a graph: its opsets and, for the body of an If or Loop, the values and nodes around it."""

    opsets: Mapping[str, int]
    known: frozenset[int] = frozenset()
    nodes: tuple[onnx_ir.Node, ...] = ()
    is_body: bool = False


def _verify_graph(graph: onnx_ir.Graph | onnx_ir.Function, model: onnx_ir.Model, scope: _Scope) -> None:
    nodes = list(graph)
    names: set[str] = set()
    known: set[int] = set(scope.known)
    is_typed = isinstance(graph, onnx_ir.Graph) and not scope.is_body

    def fail(index: int, message: str) -> VerifyError:
        return VerifyError(f"{message}\n{_around(nodes, index)}" if nodes else message)

    def define(value: onnx_ir.Value, index: int, what: str) -> None:
        if not value.name:
            raise fail(index, f"{what} has no name")
        if value.name in names:
            raise fail(index, f"{what} {value.name!r}: the name is defined twice")
        names.add(value.name)
        known.add(id(value))

    for value in graph.inputs:
        define(value, 0, "graph input")
        if is_typed and value.type is None:
            raise fail(0, f"graph input {value.name!r} has no type")
    if isinstance(graph, onnx_ir.Graph):
        for name, value in graph.initializers.items():
            _verify_initializer(name, value)
            if value not in graph.inputs:
                define(value, 0, "initializer")
    for index, node in enumerate(nodes):
        for position, operand in enumerate(node.inputs):
            if operand is not None and id(operand) not in known:
                raise fail(index, _undefined(node, position, operand, (*nodes, *scope.nodes)))
        _verify_operator(node, model, scope.opsets, index, fail)
        for body in bodies(node):
            _verify_graph(body, model, _Scope(scope.opsets, frozenset(known), (*nodes, *scope.nodes), is_body=True))
        for value in node.outputs:
            if value.name or value.uses() or value.is_graph_output():
                define(value, index, f"output of {called(node)}")
    for value in graph.outputs:
        if id(value) not in known:
            raise fail(len(nodes) - 1, f"graph output {value.name!r} is not produced by any node of the graph")
        if is_typed and value.type is None:
            raise fail(len(nodes) - 1, f"graph output {value.name!r} has no type")
    ends = {value.producer() for value in graph.outputs}
    for index, node in enumerate(nodes):
        if node in ends or node.op_type == "Cast":
            _verify_types(node, model, scope.opsets, index, fail)


def _verify_initializer(name: str, value: onnx_ir.Value) -> None:
    tensor = value.const_value
    if value.name != name:
        raise VerifyError(f"initializer {name!r} is registered under another name than its own, {value.name!r}")
    if tensor is None:
        raise VerifyError(f"initializer {name!r} has no data")
    if isinstance(tensor, onnx_ir.ExternalTensor):
        raise VerifyError(f"initializer {name!r} is raw external data; load models with passopt.ir.load_model")
    if value.dtype is not None and value.dtype != tensor.dtype:
        raise VerifyError(f"initializer {name!r} is declared {value.dtype.name}, its data is {tensor.dtype.name}")
    if value.shape is not None and not _fits(value.shape, tuple(tensor.shape.numpy())):
        raise VerifyError(f"initializer {name!r} is declared {value.shape}, its data has shape {tensor.shape}")


def _fits(declared: onnx_ir.Shape, lengths: tuple[int, ...]) -> bool:
    """Return whether a tensor of these lengths may stand where a shape is declared; symbols may have any length."""
    pairs = zip(declared.dims, lengths, strict=False)
    return len(declared) == len(lengths) and all(dim == length for dim, length in pairs if isinstance(dim, int))


def _verify_files(model: onnx_ir.Model) -> None:
    """Check that the files of the weights exist; whether they have changed is checked when they are opened."""
    needed: dict[str, str] = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, LazyWeight):
            for source in value.const_value.expression.sources():
                needed.setdefault(source.file.path, name)
    for path, name in needed.items():
        if not Path(path).is_file():
            raise VerifyError(f"initializer {name!r} needs external data {path}, which does not exist")


def _undefined(node: onnx_ir.Node, position: int, value: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> str:
    where = f"{called(node)}: input {position} {value.name!r}"
    producer = value.producer()
    if producer is None:
        return f"{where} is neither a graph input, an initializer nor the output of a node"
    if any(producer is other for other in nodes):
        return f"{where} is used before its producer {called(producer)}"
    return f"{where} is produced by {called(producer)}, which is not in the graph"


#: onnx takes no larger version of an opset.
_MOST_VERSION = 1 << 31


@dataclasses.dataclass(frozen=True)
class _Signature:
    least_inputs: int
    most_inputs: int
    attributes: frozenset[str]


@functools.cache
def _signature(op_type: str, version: int) -> _Signature | None:
    """Return the inputs and attributes that ONNX allows for an operator; None if the opset does not have the operator.

    The result is cached, because asking ONNX for every node takes time.
    """
    if not 0 < version < _MOST_VERSION:
        return None
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return _Signature(schema.min_input, schema.max_input, frozenset(schema.attributes))


def _verify_operator(
    node: onnx_ir.Node, model: onnx_ir.Model, opsets: Mapping[str, int], index: int, fail: object
) -> None:
    assert callable(fail)
    if model.functions and node.op_identifier() in model.functions:
        return
    version = opsets.get(node.domain)
    if version is None:
        raise fail(index, f"{called(node)}: domain {node.domain!r} has no opset import")
    if node.domain:
        return
    signature = _signature(node.op_type, version)
    if signature is None and is_runtime_operator(node, version):
        return
    if signature is None:
        raise fail(index, f"{called(node)}: no such operator in opset {version}")
    count = len(node.inputs)
    if not signature.least_inputs <= count <= signature.most_inputs:
        expected = f"{signature.least_inputs} to {signature.most_inputs}"
        raise fail(index, f"{called(node)}: has {count} inputs, the operator takes {expected}")
    unknown = node.attributes.data.keys() - signature.attributes
    if unknown:
        raise fail(index, f"{called(node)}: unknown attributes {sorted(unknown)} in opset {version}")


def _verify_types(
    node: onnx_ir.Node, model: onnx_ir.Model, opsets: Mapping[str, int], index: int, fail: object
) -> None:
    """Check that the stated dtypes of a node's outputs are those that the operator gives.

    This is not done for every node: inference over a large graph takes seconds, and this runs after every pass.
    """
    assert callable(fail)
    for value, given in zip(node.outputs, _given_dtypes(node, model, opsets), strict=True):
        if given is not None and value.dtype is not None and value.dtype != given:
            what = "graph output" if value.is_graph_output() else "output"
            raise fail(
                index,
                f"{called(node)}: {what} {value.name!r} is declared {value.dtype.name}, "
                f"the operator gives {given.name}",
            )


def _given_dtypes(
    node: onnx_ir.Node, model: onnx_ir.Model, opsets: Mapping[str, int]
) -> Sequence[onnx_ir.DataType | None]:
    """Return the dtypes that inference finds for a node's outputs, with None for those that it does not find."""
    unknown = [None] * len(node.outputs)
    if node.domain or node.op_identifier() in model.functions or next(bodies(node), None) is not None:
        return unknown
    target = node.attributes.get("to") if node.op_type == "Cast" else None
    if target is not None and not target.is_ref():
        return [onnx_ir.DataType(target.as_int())]
    stated = [(value.type, value.shape) for value in node.outputs]
    try:
        for value in node.outputs:
            value.type = None
        infer_types(node, opsets[""], RunContext.of(model).types)
        return [value.dtype for value in node.outputs]
    except VerifyError:
        return unknown  # The shapes that an exporter stated may contradict each other; no pass is to blame for that.
    finally:
        for value, (kind, shape) in zip(node.outputs, stated, strict=True):
            value.type, value.shape = kind, shape


def _around(nodes: list[onnx_ir.Node], index: int) -> str:
    first, last = max(0, index - _CONTEXT), min(len(nodes), index + _CONTEXT + 1)
    lines = []
    for position in range(first, last):
        node = nodes[position]
        outputs = ", ".join(value.name or "?" for value in node.outputs)
        inputs = ", ".join((value.name or "?") if value is not None else "''" for value in node.inputs)
        mark = "-->" if position == index else "   "
        lines.append(f"  {mark} {position:5d}  {outputs} = {node.op_type}({inputs})")
    return "\n".join(lines)
