"""Check the parts of a model file that are believed later on: tensors, opsets, and that what is read is made.

onnx-ir reads tensors when they are used, so a wrong length would end a pass far away from the file that it is in. What
the graph may hold beyond that, such as cycles, is checked by `ir.graph.verifier`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.provenance import described

#: The largest version of an opset or length of an axis that any file may name; ONNX stores both in 64 bits.
_MOST_VERSION, _MOST_LENGTH = 1 << 31, 1 << 62
#: Field → the dtypes whose elements it holds.
_FIELDS = {
    "float_data": {"FLOAT", "COMPLEX64"},
    "double_data": {"DOUBLE", "COMPLEX128"},
    "int64_data": {"INT64"},
    "uint64_data": {"UINT64", "UINT32"},
    "string_data": {"STRING"},
}
_GRAPH = onnx.AttributeProto.GRAPH
_NEXT = "The file is damaged, or its writer is wrong: write it again"


def check_proto(model: onnx.ModelProto) -> None:
    """Check a model right after it was parsed.

    Args:
        model: The model; external data is not looked at.

    Raises:
        ModelError: A tensor has another number of bytes than its shape, a dtype that does not exist, or a negative
            length; an opset has no possible version; or a node reads what nothing makes. The message does not name the
            file.
    """
    for where, imports in _opset_imports(model):
        for item in imports:
            if not 0 < item.version < _MOST_VERSION:
                raise ModelError(f"{where} imports opset {item.version} of domain {item.domain!r}. {_NEXT}")
    for where, tensor in _tensors_of_graph(model.graph):
        _check_tensor(where, tensor)
    _check_names(model.graph, frozenset(), "")
    for function in model.functions:
        inside = f"function {function.name!r}, "
        for where, tensor in _tensors_of_nodes(function.node):
            _check_tensor(f"{inside}{where}", tensor)
        _check_reads(function.node, frozenset(function.input), function.output, inside)


def _opset_imports(model: onnx.ModelProto) -> Iterator[tuple[str, Iterable[onnx.OperatorSetIdProto]]]:
    yield "the model", model.opset_import
    for function in model.functions:
        yield f"function {function.name!r}", function.opset_import


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the tensors of a graph and of its bodies, each with a description of where it is."""
    for tensor in graph.initializer:
        yield f"initializer {tensor.name!r}", tensor
    for sparse in graph.sparse_initializer:
        yield f"sparse initializer {sparse.values.name!r}", sparse.values
        yield f"the indices of sparse initializer {sparse.values.name!r}", sparse.indices
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            where = f"{described(node.op_type, node.name, node.output)}, attribute {attribute.name!r}"
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield where, attribute.t
            for tensor in attribute.tensors:
                yield where, tensor
            if attribute.type == _GRAPH:
                yield from _tensors_of_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _tensors_of_graph(graph)


def _check_names(graph: onnx.GraphProto, outside: frozenset[str], inside: str) -> None:
    """Raise ModelError if the graph reads or returns a value that neither it nor what is around it has."""
    weights = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    known = outside.union((item.name for item in graph.input), (item.name for item in weights))
    _check_reads(graph.node, known, [item.name for item in graph.output], inside)


def _check_reads(nodes: Sequence[onnx.NodeProto], known: frozenset[str], outputs: Iterable[str], inside: str) -> None:
    known = known.union(name for node in nodes for name in node.output)
    for node in nodes:
        where = f"{inside}{described(node.op_type or 'a node', node.name, node.output)}"
        if not node.op_type:
            raise ModelError(f"{where} has no operator. {_NEXT}")
        missing = [name for name in node.input if name and name not in known]
        if missing:
            raise ModelError(f"{where} reads {missing[0]!r}, which nothing makes. {_NEXT}")
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type == _GRAPH else attribute.graphs:
                _check_names(body, known, f"{where}, {attribute.name}: ")
    absent = [name for name in outputs if name and name not in known]
    if absent:
        raise ModelError(f"{inside}the output {absent[0]!r} is made by nothing. {_NEXT}")


def _check_tensor(where: str, tensor: onnx.TensorProto) -> None:
    """Raise ModelError if the data of a tensor does not fit its shape and dtype."""
    dtype = _dtype(where, tensor.data_type)
    if any(not 0 <= length < _MOST_LENGTH for length in tensor.dims):
        raise ModelError(f"{where} has shape {list(tensor.dims)}. {_NEXT}")
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_place(where, tensor)
        return
    if tensor.HasField("raw_data"):
        expected, found, unit = math.ceil(count * dtype.bitwidth / 8), len(tensor.raw_data), "bytes of raw_data"
    else:
        expected, (found, unit) = _elements(dtype, count), _stored(tensor, dtype)
    if expected != found:
        shape = list(tensor.dims)
        raise ModelError(f"{where} is {dtype.name} {shape}: expected {expected} {unit}, found {found}. {_NEXT}")


def _dtype(where: str, number: int) -> onnx_ir.DataType:
    try:
        found = onnx_ir.DataType(number)
    except ValueError:
        found = onnx_ir.DataType.UNDEFINED
    if found == onnx_ir.DataType.UNDEFINED:
        raise ModelError(f"{where} has dtype number {number}, which does not exist. {_NEXT}")
    return found


def _elements(dtype: onnx_ir.DataType, count: int) -> int:
    """Return how many numbers of the typed field hold `count` elements."""
    if dtype.name.startswith("COMPLEX"):
        return 2 * count
    return math.ceil(count * dtype.bitwidth / 8) if dtype != onnx_ir.DataType.STRING and dtype.bitwidth < 8 else count


def _stored(tensor: onnx.TensorProto, dtype: onnx_ir.DataType) -> tuple[int, str]:
    """Return how many numbers the typed field for this dtype holds, and the name of the field."""
    field = next((name for name, dtypes in _FIELDS.items() if dtype.name in dtypes), "int32_data")
    return len(getattr(tensor, field)), f"numbers in {field}"


def _check_place(where: str, tensor: onnx.TensorProto) -> None:
    """Raise ModelError if it is not said where external data is."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place.get("location") or "\0" in place["location"]:
        raise ModelError(f"{where} is external data of no file. {_NEXT}")
    for key in ("offset", "length"):
        text = place.get(key, "0")
        if not (text.isascii() and text.isdigit()) or int(text) >= _MOST_LENGTH:
            raise ModelError(f"{where} has external data with {key} {text!r}, expected a number of bytes. {_NEXT}")
