"""Give a traced graph the names that every pass and target relies on: inputs, outputs, initializers, dimensions.

The exporter's own metadata goes; a node keeps `passopt.module` (`model.layers.0.self_attn`) and `passopt.source`
(`modeling_baichuan.py:130`), which errors and reports quote.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir

from passopt.frontends.baichuan2 import CONSTANTS
from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.errors import ModelError

#: The attribute of the wrapper that holds the stock model: the prefix of every traced name.
_PREFIX = "stock"

_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
#: What the exporter calls nodes that come from no module.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"

_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+)')


def apply_contract(model: onnx_ir.Model, checkpoint: Checkpoint, layers: int) -> None:
    """Rename in place. Raises ModelError if the graph's inputs and outputs are not those of a step."""
    _name_inputs(model.graph, layers)
    _name_outputs(model.graph, layers)
    _name_dimensions(model.graph)
    _name_initializers(model.graph)
    _condense_metadata(model, str(checkpoint.directory))


def cache_names(kind: str, layers: int) -> list[str]:
    """`past` or `present`: per layer the key, then the value."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _name_inputs(graph: onnx_ir.Graph, layers: int) -> None:
    names = ["input_ids", "attention_mask", *cache_names("past", layers)]
    if len(graph.inputs) == len(names) + 1:
        names.append("position_ids")
    _rename(graph.inputs, names)
    # The traced signature has the optional argument last; the contract has it before the cache.
    if names[-1] == "position_ids":
        graph.inputs.insert(2, graph.inputs.pop())


def _name_outputs(graph: onnx_ir.Graph, layers: int) -> None:
    _rename(graph.outputs, ["logits", *cache_names("present", layers)])


def _rename(values: Sequence[onnx_ir.Value], names: list[str]) -> None:
    if len(values) != len(names):
        raise ModelError(f"traced {len(values)} inputs or outputs, expected {len(names)}: {', '.join(names[:4])}…")
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_dimensions(graph: onnx_ir.Graph) -> None:
    names = _symbol_names(graph)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_named(dimension, names) for dimension in value.shape])
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    assert mask.shape is not None
    if str(mask.shape[1]) != "past+seq":
        raise ModelError(f"attention_mask was traced with {mask.shape[1]} columns instead of past+seq")


def _symbol_names(graph: onnx_ir.Graph) -> dict[str, str]:
    """The tracer's symbols, as they stand in the inputs' shapes: it has several for one length."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        axes = {0: "batch", 2: "past"} if value.name.startswith("past.") else {0: "batch", 1: "seq"}
        if value.name == "attention_mask":
            axes[1] = "past+seq"
        for axis, name in axes.items():
            symbol = str(value.shape[axis])
            if _SYMBOL.fullmatch(symbol):
                names[symbol] = name
    return names


def _named(dimension: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """`s62 + s70` → `past+seq`; summands in alphabetical order, no spaces."""
    if isinstance(dimension, int) or dimension.value is None:
        return dimension if isinstance(dimension, int) else None
    text = _SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), str(dimension.value))
    if unknown := _SYMBOL.search(text):
        raise ModelError(f"the traced graph has a dimension {dimension} whose {unknown[0]} is of none of its inputs")
    return "+".join(sorted(part.replace(" ", "") for part in text.split(" + ")))


def _name_initializers(graph: onnx_ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix(f"{_PREFIX}.")
        value.name = CONSTANTS.get(name, name)


def _condense_metadata(model: onnx_ir.Model, directory: str) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.meta.clear()
    for node in model.graph.all_nodes():
        origin = _origin(node, directory)
        node.doc_string = None
        node.meta.clear()
        node.metadata_props.clear()
        node.metadata_props.update(origin)


def _origin(node: onnx_ir.Node, directory: str) -> dict[str, str]:
    properties = node.metadata_props
    scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "[]"))
    module = scopes[-2].removeprefix(_PREFIX).removeprefix(".") if len(scopes) > 1 else ""
    module = "" if module == _NO_MODULE else module
    frames = _FRAME.finditer(properties.get("pkg.torch.onnx.stack_trace", ""))
    lines = [frame for frame in frames if frame["path"].startswith(f"{directory}/")]
    origin = {"passopt.module": module} if module else {}
    if lines:
        origin["passopt.source"] = f"{lines[-1]['path'].rpartition('/')[2]}:{lines[-1]['line']}"
    return origin


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
