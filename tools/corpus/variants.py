"""Write a model in other ways that mean the same: inputs as constants, symbolic lengths, inside of a body, and so on.

A variant returns None where it does not apply, as for the symbolic lengths of a model without inputs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx

from cases import Case

#: The opset of a model that imports none of the default domain but gets nodes of it.
_OPSET = 17


@dataclasses.dataclass(frozen=True)
class Written:
    """A model as a variant writes it.

    Attributes:
        model: The model.
        feeds: Sets of inputs; the model may be fed other lengths too where its lengths are symbolic.
        is_external: Whether the constants are written to a file beside the model.
    """

    model: onnx.ModelProto
    feeds: Sequence[Mapping[str, Any]]
    is_external: bool = False


Variant: TypeAlias = Callable[[Case], "Written | None"]


def plain(case: Case) -> Written | None:
    """Return the model as it is."""
    return Written(case.model, [case.feeds])


def constants(case: Case) -> Written | None:
    """Turn all inputs that are tensors into initializers."""
    return _with_constants(case, first=0)


def parameters(case: Case) -> Written | None:
    """Turn all inputs but the first into initializers, as weights and axes mostly are."""
    return _with_constants(case, first=1)


def external(case: Case) -> Written | None:
    """Turn all inputs but the first into initializers whose data stand in a file of their own."""
    written = _with_constants(case, first=1)
    if written is None or any(
        tensor.data_type == onnx.TensorProto.STRING for tensor in written.model.graph.initializer
    ):
        return None
    return dataclasses.replace(written, is_external=True)


def _with_constants(case: Case, first: int) -> Written | None:
    model = copy.deepcopy(case.model)
    kept, feeds = [], dict(case.feeds)
    given = {tensor.name for tensor in model.graph.initializer}
    for index, value in enumerate(case.model.graph.input):
        array = feeds.get(value.name)
        if index < first or not isinstance(array, np.ndarray) or not value.type.HasField("tensor_type"):
            kept.append(value)
            continue
        if value.name not in given:
            model.graph.initializer.append(_tensor(array, value))
        feeds.pop(value.name)
    if len(kept) == len(model.graph.input):
        return None
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    _hand_outputs_on(model)
    return Written(model, [feeds])


def _hand_outputs_on(model: onnx.ModelProto) -> None:
    """Put an Identity before every output, because passes leave the producers of outputs alone in some ways."""
    _import_default(model)
    version = next(item.version for item in model.opset_import if item.domain in {"", "ai.onnx"})
    made = {name for node in model.graph.node for name in node.output}
    for value in model.graph.output:
        is_tensor = value.type.HasField("tensor_type")
        if value.name not in made or version < (1 if is_tensor else 16):
            continue
        inner = f"{value.name}_inner"
        _rename(model.graph.node, value.name, inner)
        model.graph.node.append(onnx.helper.make_node("Identity", [inner], [value.name]))


def _tensor(array: np.ndarray[Any, np.dtype[Any]], value: onnx.ValueInfoProto) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(array, value.name)
    declared = value.type.tensor_type.elem_type
    if tensor.data_type != declared:
        tensor = onnx.helper.make_tensor(value.name, declared, array.shape, array.tobytes(), raw=True)
    return tensor


def symbolic(case: Case) -> Written | None:
    """Give every axis of every input a symbol of its own, and leave the shapes of outputs open."""
    model = copy.deepcopy(case.model)
    changed = False
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.Clear()
            dim.dim_param = f"{_identifier(value.name)}_{axis}"
            changed = True
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    del model.graph.value_info[:]
    return Written(model, [case.feeds, *_other_lengths(case.feeds)]) if changed else None


def _identifier(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _other_lengths(feeds: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return feeds in which one length of the tensors is another one; the model may refuse them."""
    arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray) and value.ndim}
    lengths = sorted({length for array in arrays.values() for length in array.shape}, reverse=True)
    found: list[Mapping[str, Any]] = []
    for old, new in [(length, other) for length in lengths[:3] for other in (length + 1, 1, 0) if other != length]:
        changed = {name: _resized(value, old, new) for name, value in arrays.items() if value.dtype.kind == "f"}
        if changed:
            found.append({**feeds, **changed})
    return found


def _resized(array: np.ndarray[Any, np.dtype[Any]], old: int, new: int) -> np.ndarray[Any, np.dtype[Any]]:
    shape = [new if length == old else length for length in array.shape]
    if not array.size or not np.prod(shape):
        return np.zeros(shape, array.dtype)
    return np.resize(array, shape)


def body(case: Case) -> Written | None:
    """Put the whole graph into both branches of an If, which read the inputs from outside."""
    model = copy.deepcopy(case.model)
    outputs = [copy.deepcopy(value) for value in model.graph.output]
    branches = {side: _branch(model.graph, side) for side in ("then", "else")}
    condition = onnx.helper.make_tensor_value_info("corpus_condition", onnx.TensorProto.BOOL, [])
    node = onnx.helper.make_node(
        "If",
        ["corpus_condition"],
        [value.name for value in outputs],
        then_branch=branches["then"],
        else_branch=branches["else"],
    )
    inputs = [condition, *model.graph.input]
    graph = onnx.helper.make_graph([node], model.graph.name, inputs, outputs, list(model.graph.initializer))
    model.graph.CopyFrom(graph)
    _import_default(model)
    return Written(model, [{**case.feeds, "corpus_condition": np.array(side)} for side in (True, False)])


def _branch(graph: onnx.GraphProto, side: str) -> onnx.GraphProto:
    """Return a graph without inputs, whose outputs have names of their own."""
    nodes, outputs = [copy.deepcopy(node) for node in graph.node], [copy.deepcopy(value) for value in graph.output]
    made = {name for node in nodes for name in node.output}
    for value in outputs:
        inner = f"{value.name}_{side}"
        if value.name not in made:
            nodes.append(onnx.helper.make_node("Identity", [value.name], [inner]))
        _rename(nodes, value.name, inner) if value.name in made else None
        value.name = inner
    return onnx.helper.make_graph(nodes, f"{graph.name}_{side}", [], outputs)


def _rename(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, old, new)


def _import_default(model: onnx.ModelProto) -> None:
    if not any(item.domain in {"", "ai.onnx"} for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", _OPSET))


def function(case: Case) -> Written | None:
    """Make the nodes a local function, which the graph calls once, with the constants inside."""
    model = copy.deepcopy(case.model)
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    asked = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(asked)
    inputs, outputs = [value.name for value in graph.input], [value.name for value in graph.output]
    if set(inputs) & set(outputs) or not graph.node:
        return None
    stored = [onnx.helper.make_node("Constant", [], [item.name], value=item) for item in graph.initializer]
    if stored:
        _import_default(model)
    nodes = [*stored, *graph.node]
    made = onnx.helper.make_function("own", "Whole", inputs, outputs, nodes, list(model.opset_import))
    call = onnx.helper.make_node("Whole", inputs, outputs, domain="own")
    model.graph.CopyFrom(onnx.helper.make_graph([call], graph.name, list(graph.input), list(graph.output)))
    model.functions.append(made)
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    _import_default(model)
    model.ir_version = max(model.ir_version, 8)
    return Written(model, [case.feeds])


def alias(case: Case) -> Written | None:
    """Call the default domain "ai.onnx", in the import and in every second node."""
    model = copy.deepcopy(case.model)
    imports = [item for item in model.opset_import if item.domain == ""]
    for item in imports:
        item.domain = "ai.onnx"
    for node in [node for node in model.graph.node if node.domain == ""][::2]:
        node.domain = "ai.onnx"
    return Written(model, [case.feeds]) if imports else None


VARIANTS: Mapping[str, Variant] = {
    made.__name__: made for made in (plain, symbolic, constants, parameters, body, external, function, alias)
}
