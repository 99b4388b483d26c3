"""Hide operators from guests that look at names only: these fold and merge what they think they know.

Hidden are operators of other domains, random ones, and those that hold a negative zero, which guests take for a
positive one. Calls of local functions keep their names, unless ONNX has an operator of the same name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx

from passopt.ir.graph.operators import RANDOM
from passopt.passes.guests.weight_handles import bodies

#: The domain that hidden operators are in: onnx's checker knows the operators of some others, such as ai.onnx.ml.
_DOMAIN = "passopt.hidden"
_SUFFIX = "_of_another_domain"
_HIDDEN = re.compile(rf"{_SUFFIX}\Z")
#: The first opset in which a Dropout says by an input whether it drops anything.
_DROPOUT_BY_INPUT = 12
#: The first opset in which a Dropout drops nothing unless it is told to.
_DROPOUT_OFF = 7
Hidden = Mapping[str, tuple[str, str]]


def hide_foreign_names(model: onnx.ModelProto) -> Hidden:
    """Give every operator that a guest must not judge by its name a name of its own, so that no two look equal.

    Args:
        model: The model, which is changed in place, as are the names of local functions that ONNX has too.

    Returns:
        For each new name the domain and the name before.
    """
    opset = next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), 0)
    known = _plain_functions(model, opset)
    hidden = {}
    for index, node in enumerate(list(_nodes(model))):
        if (node.domain, node.op_type) in known:
            node.op_type += _SUFFIX if node.op_type in _standard_names() else ""
        elif not _is_plain(node, opset):
            name = f"{node.op_type}{_SUFFIX}_{index}"
            hidden[name] = node.domain, node.op_type
            node.domain, node.op_type = _DOMAIN, name
    for function in model.functions:
        if function.name in _standard_names():
            function.name += _SUFFIX
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        if hidden:
            imports.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return hidden


def show_foreign_names(model: onnx.ModelProto, hidden: Hidden) -> None:
    """Undo `hide_foreign_names`.

    Args:
        model: The model, which is changed in place.
        hidden: What `hide_foreign_names` returned.
    """
    for node in _nodes(model):
        if node.domain == _DOMAIN:
            node.domain, node.op_type = hidden[node.op_type]
        node.op_type = _HIDDEN.sub("", node.op_type)
    for function in model.functions:
        function.name = _HIDDEN.sub("", function.name)
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        kept = [item for item in imports if item.domain != _DOMAIN]
        del imports[:]
        imports.extend(kept)


def has_negative_zero(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor in the file holds a -0.0, which equals 0.0 but divides to another infinity.

    Args:
        tensor: A tensor whose numbers are in the model itself.

    Returns:
        True if it holds one.
    """
    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype.kind in "biuOSU":
        return False
    parts = (array.real, array.imag) if array.dtype.kind == "c" else (array,)
    return any(bool((np.signbit(wide) & (wide == 0)).any()) for wide in (part.astype(np.float64) for part in parts))


def _plain_functions(model: onnx.ModelProto, opset: int) -> set[tuple[str, str]]:
    """Return the local functions whose calls are equal if their inputs are: all that they hold is plain."""
    waiting = {(function.domain, function.name): function for function in model.functions}
    known: set[tuple[str, str]] = set()
    while True:
        found = {
            name
            for name, function in waiting.items()
            if all(
                (node.domain, node.op_type) in known or _is_plain(node, opset) for node in _with_bodies(function.node)
            )
        }
        if not found:
            return known
        known |= found
        waiting = {name: function for name, function in waiting.items() if name not in found}


def _is_plain(node: onnx.NodeProto, opset: int) -> bool:
    """Return whether a node is of an operator of ONNX that gives the same for what a guest takes for the same."""
    return not node.domain and not _is_random(node, opset) and not _holds_negative_zero(node)


def _with_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of all graphs inside of them."""
    graph = onnx.GraphProto(node=nodes)
    for inner in (graph, *bodies(graph)):
        yield from inner.node


def _holds_negative_zero(node: onnx.NodeProto) -> bool:
    """Return whether an attribute is, or holds, a -0.0."""
    for attribute in node.attribute:
        tensors = [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        if any(number == 0 and np.signbit(number) for number in (attribute.f, *attribute.floats)):
            return True
        if any(has_negative_zero(tensor) for tensor in tensors if not tensor.external_data):
            return True
    return False


def _is_random(node: onnx.NodeProto, opset: int) -> bool:
    """Return whether two equal nodes may give different results: random operators, and a Dropout in training."""
    if node.op_type != "Dropout":
        return node.op_type in RANDOM
    if opset < _DROPOUT_OFF:
        return not any(attribute.name == "is_test" and attribute.i for attribute in node.attribute)
    return opset >= _DROPOUT_BY_INPUT and len(node.input) > 2 and bool(node.input[2])


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in (model.graph, *bodies(model.graph)):
        yield from graph.node
    for function in model.functions:
        yield from function.node


@functools.cache
def _standard_names() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain)
