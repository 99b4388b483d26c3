"""Give a traced graph the names that every pass and target relies on: inputs, outputs, initializers, dimensions.

The exporter's own metadata is removed. A node keeps `passopt.module` (such as `model.layers.0.self_attn`) and
`passopt.source` (such as `modeling_baichuan.py:130`), which errors and reports quote.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir

from passopt.frontends.options import Phase
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from passopt.ir.graph.provenance import MODULE, SOURCE

#: The attribute of the step that holds the stock model; it is the prefix of every traced name.
PREFIX = "stock"

#: The number of columns of attention_mask, as a symbol.
COLUMNS: Mapping[Phase, str] = {"merged": "past+seq", "prefill": "seq", "decode": "past+1"}

_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
#: The module name that the dynamo exporter gives nodes that come from no module.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"

#: The frames of stack traces, as dynamo (outermost first) and torchscript (innermost first) write them.
_DYNAMO_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+)')
_TORCHSCRIPT_FRAME = re.compile(r"^(?P<path>[^\n(]+)\((?P<line>\d+)\): ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Contract:
    """The form that a traced graph must get: `constants` maps traced constants, by attribute, to initializer names."""

    layers: int
    phase: Phase
    source_root: Path
    constants: Mapping[str, str]


def apply_contract(model: onnx_ir.Model, contract: Contract) -> None:
    """Rename inputs, outputs, initializers and dimensions in place, and condense the metadata of nodes.

    Raises:
        ModelError: If the graph's inputs and outputs are not those of a step.
    """
    cached = 0 if contract.phase == "prefill" else contract.layers
    positions = len(model.graph.inputs) > len(input_names(cached, positions=False))
    _rename(model.graph.inputs, input_names(cached, positions=positions))
    # The traced signature has position_ids last, since they are optional; the contract has them before the cache.
    if positions:
        model.graph.inputs.insert(2, model.graph.inputs.pop())
    _rename(model.graph.outputs, output_names(contract.layers))
    name_dimensions(model.graph, contract.phase)
    _name_initializers(model.graph, contract.constants)
    _condense_metadata(model, f"{contract.source_root}/")


def cache_names(kind: str, layers: int) -> list[str]:
    """Return the names of the cache tensors of `kind` (`past` or `present`): per layer the key, then the value."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def input_names(layers: int, *, positions: bool) -> list[str]:
    """Return the names of the inputs in the order of the traced signature."""
    return [INPUT_IDS, ATTENTION_MASK, *cache_names("past", layers), *([POSITION_IDS] if positions else [])]


def output_names(layers: int) -> list[str]:
    """Return the names of the outputs: the logits, then the present keys and values."""
    return [LOGITS, *cache_names("present", layers)]


def _rename(values: Sequence[onnx_ir.Value], names: list[str]) -> None:
    if len(values) != len(names):
        raise ModelError(f"traced {len(values)} inputs or outputs, expected {len(names)}: {', '.join(names[:4])}…")
    for value, name in zip(values, names, strict=True):
        value.name = name


def name_dimensions(graph: onnx_ir.Graph, phase: Phase) -> None:
    """Rename the symbolic dimensions in place to batch, seq and past, and sums of them.

    Raises:
        ModelError: If a dimension contains an unknown symbol, or if attention_mask has other columns than expected.
    """
    names = _symbol_names(graph, phase)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_named(dimension, names) for dimension in value.shape])
    mask = next(value for value in graph.inputs if value.name == ATTENTION_MASK)
    assert mask.shape is not None
    if str(mask.shape[1]) != COLUMNS[phase]:
        raise ModelError(f"attention_mask was traced with {mask.shape[1]} columns instead of {COLUMNS[phase]}")


def _symbol_names(graph: onnx_ir.Graph, phase: Phase) -> dict[str, str]:
    """Return the contract's name for each symbol in the inputs' shapes.

    The tracer may have several symbols for one length.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        axes = {0: "batch", 2: "past"} if value.name.startswith("past.") else {0: "batch", 1: "seq"}
        if value.name == ATTENTION_MASK:
            axes[1] = COLUMNS[phase]
        for axis, name in axes.items():
            symbol = str(value.shape[axis])
            if _SYMBOL.fullmatch(symbol):
                names[symbol] = name
    return names


def _named(dimension: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """Return a dimension in the contract's names: `s62 + s70` becomes `past+seq`.

    Summands are in alphabetical order, numbers last, without spaces.
    """
    if isinstance(dimension, int) or dimension.value is None:
        return dimension if isinstance(dimension, int) else None
    text = _SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), _divided(str(dimension.value)))
    if unknown := _SYMBOL.search(text):
        raise ModelError(f"the traced graph has a dimension {dimension}, whose {unknown[0]} is the length of no input")
    summands = [part.replace(" ", "") for part in text.split("+")]
    return "+".join(sorted(summands, key=lambda part: (part.isdigit(), part)))


def _divided(text: str) -> str:
    """Carry out divisions that leave no remainder: `((s70**2)//s70)`, which torch writes for views, becomes `s70`."""
    if "//" not in text:
        return text
    import sympy  # type: ignore[import-untyped]

    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in _SYMBOL.findall(text)}
    simple = str(sympy.parse_expr(text, local_dict=symbols))
    return text if "floor" in simple else simple


def _name_initializers(graph: onnx_ir.Graph, constants: Mapping[str, str]) -> None:
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix(f"{PREFIX}.")
        value.name = constants.get(name, name)


def _condense_metadata(model: onnx_ir.Model, root: str) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.meta.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        origin = _origin(node, root)
        node.doc_string = None
        node.meta.clear()
        node.metadata_props.clear()
        node.metadata_props.update(origin)


def _origin(node: onnx_ir.Node, root: str) -> dict[str, str]:
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        parts = ast.literal_eval(scopes)
        module = parts[-2] if len(parts) > 1 else ""
        frames = list(_DYNAMO_FRAME.finditer(node.metadata_props.get("pkg.torch.onnx.stack_trace", "")))[::-1]
    else:
        module = ".".join((node.name or "").split("/")[1:-1])
        frames = list(_TORCHSCRIPT_FRAME.finditer(node.doc_string or ""))
    module = module.removeprefix(PREFIX).removeprefix(".")
    line = next((frame for frame in frames if frame["path"].startswith(root)), None)
    origin = {MODULE: module} if module and module != _NO_MODULE else {}
    if line is not None:
        origin[SOURCE] = f"{line['path'].rpartition('/')[2]}:{line['line']}"
    return origin


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
