"""Bridge to onnx_graphsurgeon: a model goes out as its Graph, with weights as handles, and comes back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import onnx_ir
from onnx_graphsurgeon.ir.tensor import LazyValues  # type: ignore[import-untyped]

from passopt.ir.errors import PassError
from passopt.ir.graph.provenance import called
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import SMALL_BYTES, LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.framework.records import PassResult
from passopt.passes.guests.restore_metadata import Snapshot, take_over
from passopt.passes.guests.weight_handles import (
    LOCATION,
    Array,
    Handles,
    defaulted_inputs,
    from_proto,
    lift_initializers,
    restore_defaults,
    to_proto,
    without_defaults,
)

_Type = onnx_ir.AttributeType
#: Attributes that graphsurgeon's importer skips with a warning, so that a model would come back without them.
_LOST_ATTRIBUTES = {
    _Type.TENSORS,
    _Type.GRAPHS,
    _Type.SPARSE_TENSOR,
    _Type.SPARSE_TENSORS,
    _Type.TYPE_PROTO,
    _Type.TYPE_PROTOS,
}


def run_graphsurgeon(model: onnx_ir.Model, author: str, change: Callable[[Any], Any]) -> PassResult:
    """Let `change` work on the model as a graphsurgeon Graph.

    Args:
        model: The model, which is changed in place.
        author: The name of the pass.
        change: Changes the Graph in place, or returns the Graph to go on with. What it prints goes to stderr.

    Returns:
        Whether the model changed, and how many nodes were made, changed or removed.

    Raises:
        PassError: If a node has an attribute that graphsurgeon would drop, or if `change` returns something else.
    """
    _check_attributes(model, author)
    before, handles, defaults = Snapshot(model), Handles(), defaulted_inputs(model)
    proto = to_proto(model, handles)
    without_defaults(proto, defaults)
    with contextlib.redirect_stdout(sys.stderr):
        graph = gs.import_onnx(proto)
        _give_handles(graph, handles)
        returned = change(graph)
        if returned is not None and not isinstance(returned, gs.Graph):
            raise PassError(f"{author}: returned {type(returned).__name__}, expected a graphsurgeon Graph or None")
        graph = returned if returned is not None else graph
        _take_handles(graph, handles)
        exported = gs.export_onnx(graph, do_type_check=False)
    lift_initializers(exported.graph, model.graph.initializers)
    changed = from_proto(exported, handles)
    _name_nodes(changed)
    restore_defaults(changed, defaults)
    before.put_back_initializers(changed.graph)
    result = before.finish(changed, author)
    if result.modified:
        take_over(model, changed)
    return result


class HandleValues(LazyValues):  # type: ignore[misc]
    """A weight that nobody has read yet: graphsurgeon calls `load` when a pass asks for the numbers."""

    def __init__(self, proto: onnx.TensorProto, handles: Handles) -> None:
        super().__init__(proto)
        self.handles = handles

    @property
    def weight(self) -> Expression:
        """Return the weight as an expression, without reading it."""
        return self.handles.weight(_handle_index(self.tensor))

    def load(self) -> Array:
        """Return the numbers of the weight, read-only."""
        return self.handles.load(_handle_index(self.tensor))


def lazy_weight(constant: Any) -> Expression:
    """Return the expression of a graphsurgeon Constant, for edits that read nothing.

    Edit it by its methods, such as `slice`, `split`, `transpose`, `cast` and `pad`, and make a Constant of the result
    by `lazy_constant`. `constant.values` would load the whole weight instead.
    """
    if isinstance(constant._values, HandleValues):
        return constant._values.weight
    return Literal.of(np.asarray(constant.values))


def lazy_constant(name: str, weight: Expression) -> Any:
    """Return a new graphsurgeon Constant of an expression, without reading any of it."""
    handles = Handles()
    return gs.Constant(name, HandleValues(_reference(name, weight, handles), handles))


def _check_attributes(model: onnx_ir.Model, author: str) -> None:
    """Raise PassError if a node has an attribute that graphsurgeon would drop."""
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type in _LOST_ATTRIBUTES:
                raise PassError(
                    f"{author}: {called(node)} has attribute {name} of type {attribute.type.name}, "
                    f"which onnx_graphsurgeon would drop; run this pass on a model without such nodes"
                )


def _constants(graph: Any) -> Iterator[Any]:
    """Yield the Constants of a graph and of its subgraphs."""
    for inner in (graph, *graph.subgraphs(recursive=True)):
        for tensor in inner.tensors().values():
            if isinstance(tensor, gs.Constant):
                yield tensor


def _give_handles(graph: Any, handles: Handles) -> None:
    """Let Constants that stand for handles load their numbers only when asked."""
    for constant in _constants(graph):
        values = constant._values
        if isinstance(values, LazyValues) and _is_handle(values.tensor):
            constant._values = HandleValues(values.tensor, handles)


def _take_handles(graph: Any, handles: Handles) -> None:
    """Turn arrays that a pass loaded or made back into handles, so that no weight is serialised."""
    for constant in _constants(graph):
        values = constant._values
        if isinstance(values, HandleValues) and values.handles is not handles:
            constant._values = HandleValues(_reference(constant.name, values.weight, handles), handles)
        if not isinstance(values, np.ndarray) or values.nbytes <= SMALL_BYTES or constant.export_dtype != values.dtype:
            continue
        constant._values = HandleValues(_reference(constant.name, handles.expression(values), handles), handles)


def _reference(name: str, expression: Expression, handles: Handles) -> onnx.TensorProto:
    return onnx_ir.to_proto(handles.add(LazyWeight(expression, name)))


def _is_handle(tensor: onnx.TensorProto) -> bool:
    return any(entry.key == "location" and entry.value == LOCATION for entry in tensor.external_data)


def _handle_index(tensor: onnx.TensorProto) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")


def _name_nodes(model: onnx_ir.Model) -> None:
    """Name the nodes that have no name, after their first output.

    A graphsurgeon pass need not name its nodes, but passopt's messages find nodes by name.
    """
    taken = {node.name for node in model.graph.all_nodes()}
    for node in model.graph.all_nodes():
        if not node.name:
            hint = f"{node.outputs[0].name if node.outputs else ''}/{node.op_type}"
            name, count = hint, 1
            while name in taken:
                count += 1
                name = f"{hint}.{count}"
            node.name = name
            taken.add(name)
