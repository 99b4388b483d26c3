"""Write sparse tensors of a model file densely, as runtimes do when they load it; passes know dense tensors only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx

from passopt.ir.errors import ModelError
from passopt.ir.graph.provenance import described

#: A sparse tensor that takes more bytes than this once it is dense is refused.
_LARGEST = 1 << 30


def make_dense(model: onnx.ModelProto) -> None:
    """Replace sparse initializers and the sparse values of Constant nodes by dense ones, in bodies and functions too.

    Raises:
        ModelError: If a sparse tensor does not describe a dense one, would be too large, or has its values in a file.
    """
    _make_dense_nodes(model.graph.node)
    _make_dense_initializers(model.graph)
    for function in model.functions:
        _make_dense_nodes(function.node)


def _make_dense_initializers(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse, f"sparse initializer {sparse.values.name!r}"))
    graph.ClearField("sparse_initializer")


def _make_dense_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _make_dense_nodes(graph.node)
                _make_dense_initializers(graph)
            if not attribute.HasField("sparse_tensor") and not attribute.sparse_tensors:
                continue
            where = f"{described(node.op_type, node.name, node.output)}: attribute {attribute.name!r}"
            if node.op_type != "Constant" or attribute.name != "sparse_value":
                raise ModelError(f"{where} is a sparse tensor, which is supported in Constant nodes only")
            dense = _dense(attribute.sparse_tensor, where)
            attribute.Clear()
            attribute.CopyFrom(onnx.helper.make_attribute("value", dense))


def _dense(sparse: onnx.SparseTensorProto, where: str) -> onnx.TensorProto:
    """Return the dense tensor of the same name; `where` says in errors which tensor it is."""
    shape = tuple(sparse.dims)
    for part in (sparse.values, sparse.indices):
        if part.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"{where} has its data in a file, which is supported for dense tensors only")
    try:
        values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {error}") from error
    size = math.prod(shape)
    if any(length < 0 for length in shape) or size * values.dtype.itemsize > _LARGEST:
        raise ModelError(f"{where} of shape {list(shape)} takes more than {_LARGEST >> 30} GiB once it is dense")
    flat = _positions(indices, values.size, shape, where)
    dense = np.zeros(size, values.dtype)
    dense[flat] = values.reshape(-1)
    return onnx.numpy_helper.from_array(dense.reshape(shape), sparse.values.name)


def _positions(
    indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]], count: int, shape: tuple[int, ...], where: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return where each value stands in the flat tensor: indices are flat themselves, or have a column per axis."""
    expected = f"expected {count} numbers, or {count} rows of {len(shape)}, within {list(shape)}"
    if indices.shape == (count,):
        inside = bool(np.all((indices >= 0) & (indices < math.prod(shape))))
        flat = indices
    elif indices.shape == (count, len(shape)):
        inside = bool(np.all((indices >= 0) & (indices < np.array(shape, np.int64))))
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        flat = indices @ np.array(steps, np.int64)
    else:
        raise ModelError(f"{where}: sparse indices of shape {list(indices.shape)}, {expected}")
    if not inside:
        raise ModelError(f"{where}: sparse indices lie outside, {expected}")
    return flat
