"""Print and parse the canonical text of a model in ONNX's syntax, as `passopt print` shows and golden tests compare.

Constants of at most 16 elements are printed in full; other tensors as dtype, shape and a digest of their expression
over tensor names. Identical decoder layers are printed once. Node metadata and doc strings are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.completion import complete_outputs
from passopt.ir.graph.repeated_layers import Run, longest_run
from passopt.ir.serialization.domains import normalize_domains
from passopt.ir.serialization.proto_check import check_proto
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of

INLINE_ELEMENTS = 16
#: Dtypes of at most 8 bits whose elements ONNX text writes as numbers; others are bytes of their packed form.
_WHOLE_BYTES = frozenset({onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8, onnx_ir.DataType.BOOL})
#: Dtypes of less than a byte, by their numbers.
_PACKED = frozenset(onnx_ir.DataType[name].value for name in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1"))
#: Dtypes that ONNX text has no literals for; their tensors are printed as digests.
_WITHOUT_LITERALS = frozenset(
    onnx_ir.DataType[name] for name in ("COMPLEX64", "COMPLEX128", "FLOAT6E2M3", "FLOAT6E3M2")
)
#: A constant in the attribute of a node that the text leaves the numbers of out.
WITHOUT_NUMBERS = re.compile(
    rf"= ({'|'.join(kind.name.lower() for kind in sorted(_WITHOUT_LITERALS))})\[[^\]]*\]\s*\w*\.\.\."
)
_TYPE_NAMES = frozenset({"seq", "optional", "map", "sparse_tensor", *(kind.name.lower() for kind in onnx_ir.DataType)})
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_NODE_NAME = re.compile(r"^\s*\[[^\]]*\] ")


def print_model(model: onnx_ir.Model, *, fold: bool = True, canonical: bool = False) -> str:
    """Return the canonical text of a model.

    Args:
        model: The model, which is not changed.
        fold: Print identical decoder layers once. Without folding, a model of small tensors parses back to an equal
            one.
        canonical: Name values and constants by operator and position, so that graphs of equal structure have equal
            texts, whatever names an exporter gave.
    """
    if canonical:
        model = _renamed(model)
    graph = model.graph
    nodes = list(graph)
    run = longest_run(nodes) if fold else None
    hidden = _hidden_names(nodes, run)
    imports = ", ".join(f'"{domain}" : {version}' for domain, version in sorted(graph.opset_imports.items()))
    inputs = _declarations(graph.inputs, hidden)
    outputs = _declarations(graph.outputs, hidden)
    lines = [
        f"<ir_version: {model.ir_version}, opset_import: [{imports}]>",
        f"{_quoted(graph.name or 'graph')} (",
        *_commas(inputs),
        ") => (",
        *_commas(outputs),
        ")",
    ]
    initializers = [_initializer(value) for value in graph.initializers.values() if value.name not in hidden]
    if initializers:
        lines += ["<", *_commas(initializers), ">"]
    lines += ["{", *_body(nodes, run), "}"]
    lines += [_function_text(function) for function in model.functions.values()]
    return "\n".join(lines) + "\n"


def _renamed(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a copy in depth-first order, with values named `operator.N` and small constants `constant.N`."""
    copy = model.clone()
    nodes = _depth_first(copy.graph)
    copy.graph.remove(list(copy.graph))
    copy.graph.extend(nodes)
    constants = [value for node in copy.graph for value in node.inputs if value is not None and _is_nameless(value)]
    for index, value in enumerate(dict.fromkeys(constants)):
        value.name = f"constant.{index}"
    used = set(constants)
    for name, value in list(copy.graph.initializers.items()):
        del copy.graph.initializers[name]
        if value in used or value.uses():
            copy.graph.initializers[value.name or name] = value
    for index, node in enumerate(copy.graph):
        for output in node.outputs:
            if not output.is_graph_output():
                suffix = f".{output.index()}" if len(node.outputs) > 1 else ""
                output.name = f"{node.op_type.lower()}.{index}{suffix}"
    order = {value: index for index, value in enumerate(dict.fromkeys(constants))}
    rest = [value for value in copy.graph.initializers.values() if value not in order]
    for value in (*rest, *order):
        del copy.graph.initializers[value.name or ""]
        copy.graph.initializers[value.name or ""] = value
    return copy


def _depth_first(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """Return the nodes in an order that depends on the structure alone.

    That is what each output needs, inputs first, then the unused nodes.
    """
    order: dict[onnx_ir.Node, None] = {}
    roots = [value.producer() for value in graph.outputs]
    for root in (*roots, *graph):
        stack = [root] if root is not None else []
        while stack:
            node = stack[-1]
            waiting = [
                producer
                for value in reversed(node.inputs)
                if value is not None and (producer := value.producer()) is not None and producer not in order
            ]
            if waiting and node not in order:
                stack.append(waiting[-1])
            else:
                order.setdefault(stack.pop())
    return list(order)


def _is_nameless(value: onnx_ir.Value) -> bool:
    """Return whether a constant is one that an exporter or pass wrote as a number, so that its name says nothing."""
    tensor = value.const_value
    if tensor is None or isinstance(tensor, LazyWeight) or not value.is_initializer():
        return False
    return bool(tensor.size <= 1 or tensor.dtype == onnx_ir.DataType.INT64)


def parse_model(text: str) -> onnx_ir.Model:
    """Return the model that ONNX text describes, with the types of its graph outputs completed.

    Args:
        text: ONNX text, such as `print_model` returns without folding.

    Raises:
        ModelError: If the text is not a model; the message has the parser's position.
    """
    try:
        proto = onnx.parser.parse_model(text)
        _refuse_digests(proto)
        check_proto(proto)
        model = onnx_ir.from_proto(proto)
    except onnx.parser.ParseError as error:
        _refuse_dots(text)
        message = error.args[0]
        detail = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
        raise ModelError(f"not ONNX text: {detail}") from None
    except onnx_ir.serde.SerdeError as error:
        raise ModelError(f"not a model: {error.__cause__ or error}") from error
    normalize_domains(model)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    complete_outputs(model)
    return model


def _refuse_digests(proto: onnx.ModelProto) -> None:
    """Raise ModelError if a tensor was printed as its digest, because its numbers are not in the text."""
    digests = (entry.key == "digest" for tensor in proto.graph.initializer for entry in tensor.external_data)
    if any(digests):
        names = [tensor.name for tensor in proto.graph.initializer if tensor.external_data]
        raise ModelError(
            f"the text has digests in place of the numbers of {', '.join(names[:3])}{' …' if len(names) > 3 else ''}, "
            "because a text holds small tensors only; use the model.onnx that it was printed from"
        )


def _refuse_dots(text: str) -> None:
    """Raise ModelError if a constant was printed as three dots, because ONNX text has no literals of its dtype."""
    if found := WITHOUT_NUMBERS.search(text):
        raise ModelError(
            f"the text has three dots in place of the numbers of a {found[1]} constant, because ONNX text has no "
            "literals of that dtype; use the model.onnx that it was printed from"
        )


def _body(nodes: list[onnx_ir.Node], run: Run | None) -> list[str]:
    if run is None:
        return [_node(node) for node in nodes]
    carried = ", ".join(f"{first} → {later}" for first, later in run.carried)
    end = run.start + run.period
    return [
        *(_node(node) for node in nodes[: run.start]),
        f"   # layer: the next {run.period} nodes stand × {run.count}" + (f"; carried: {carried}" if carried else ""),
        *(_node(node) for node in nodes[run.start : end]),
        f"   # × {run.count}",
        *(_node(node) for node in nodes[run.stop :]),
    ]


def _hidden_names(nodes: list[onnx_ir.Node], run: Run | None) -> set[str]:
    """Return the names of leaves and graph outputs that only folded layers use."""
    if run is None:
        return set()
    folded = nodes[run.start + run.period : run.stop]
    shown = nodes[: run.start + run.period] + nodes[run.stop :]
    used = {value.name for node in folded for value in (*node.inputs, *node.outputs) if value is not None}
    kept = {value.name for node in shown for value in (*node.inputs, *node.outputs) if value is not None}
    return {name for name in used - kept if name}


def _declarations(values: Iterable[onnx_ir.Value], hidden: set[str]) -> list[str]:
    return [f"   {_type(value)} {_quoted(value.name)}" for value in values if value.name not in hidden]


def _type(value: onnx_ir.Value) -> str:
    """Return the type as ONNX text writes it, such as `seq(float[n,2])`."""
    kind, wrappers = value.type, ""
    while isinstance(kind, (onnx_ir.SequenceType, onnx_ir.OptionalType)):
        wrappers += "seq(" if isinstance(kind, onnx_ir.SequenceType) else "optional("
        kind = kind.elem_type
    return wrappers + _tensor_type(value) + ")" * wrappers.count("(")


def _tensor_type(value: onnx_ir.Value) -> str:
    if value.dtype is None:
        return "?"
    name = onnx.TensorProto.DataType.Name(value.dtype.value).lower()
    if value.shape is None:
        return f"{name}[]"
    if not len(value.shape):
        return name
    return f"{name}[{','.join(_dim(dim) for dim in value.shape.dims)}]"


def _dim(dim: int | onnx_ir.SymbolicDim) -> str:
    if isinstance(dim, int):
        return str(dim)
    return _quoted(dim.value) if dim.value else "?"


def _quoted(name: str | None) -> str:
    return name if name and _IDENTIFIER.match(name) else _quoted_string(name or "")


def _initializer(value: onnx_ir.Value) -> str:
    tensor = value.const_value
    declared = f"   {_type(value)} {_quoted(value.name)}"
    is_short = tensor is not None and not isinstance(tensor, LazyWeight) and tensor.size <= INLINE_ELEMENTS
    if tensor is not None and is_short and tensor.dtype not in _WITHOUT_LITERALS and not _holds_bytes(tensor):
        return f"{declared} = {{{_elements(tensor)}}}"
    expression = expression_of(value)
    assert expression is not None
    return f'{declared} = ["digest": "{expression.digest()}"]'


def _holds_bytes(tensor: onnx_ir.TensorProtocol) -> bool:
    """Return whether texts of a tensor are bytes that no text can hold: other codes than UTF-8, or a zero."""
    if tensor.dtype != onnx_ir.DataType.STRING:
        return False
    strings: list[bytes] = tensor.string_data()  # type: ignore[attr-defined]
    return any(b"\0" in item or item.decode(errors="replace").encode() != item for item in strings)


def _elements(tensor: onnx_ir.TensorProtocol) -> str:
    if tensor.dtype == onnx_ir.DataType.STRING:
        strings: list[bytes] = tensor.string_data()  # type: ignore[attr-defined]
        return ",".join(_quoted_string(item.decode()) for item in strings)
    if tensor.dtype.bitwidth <= 8 and tensor.dtype not in _WHOLE_BYTES:
        return ",".join(str(byte) for byte in tensor.tobytes())  # The parser takes these as they are packed.
    array = tensor.numpy().reshape(-1)
    if tensor.dtype in {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16}:
        return ",".join(str(bits) for bits in array.view(np.uint16))  # ONNX text writes 16-bit floats as bit patterns.
    if array.dtype == np.bool_:
        return ",".join(str(int(item)) for item in array)
    return ",".join(str(item) for item in array)


def _quoted_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _node(node: onnx_ir.Node) -> str:
    proto = onnx_ir.to_proto(node)
    _drop_quoted_names([proto])
    text = onnx.printer.to_text(proto).rstrip()
    return "   " + _NODE_NAME.sub("", _with_packed(text, proto)).strip()


def _drop_quoted_names(nodes: Iterable[onnx.NodeProto]) -> None:
    """Take the names off tensors in attributes that must be quoted: they mean nothing, and the parser takes no quotes.

    Nodes of bodies are changed too.
    """
    for node in nodes:
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors):
                if tensor.name and not _IDENTIFIER.match(tensor.name):
                    tensor.name = ""
            for body in (attribute.g, *attribute.graphs):
                _drop_quoted_names(body.node)


def _with_packed(text: str, proto: onnx.NodeProto) -> str:
    """Return the text of a node with the bytes of packed tensors, which onnx prints as three dots but reads."""
    for attribute in proto.attribute:
        tensor = attribute.t
        is_packed = attribute.HasField("t") and tensor.data_type in _PACKED
        if is_packed and (data := onnx_ir.serde.TensorProtoTensor(tensor).tobytes()):
            dots = f"{tensor.name}..." if tensor.name else "..."
            text = text.replace(dots, f"{tensor.name} {{{','.join(map(str, data))}}}", 1)
    return text


def _function_text(function: onnx_ir.Function) -> str:
    proto = onnx_ir.to_proto(function)
    _drop_quoted_names(proto.node)
    text = str(onnx.printer.to_text(proto)).rstrip()
    plain, quoted = _header(proto, lambda name: name), _header(proto, _quoted_unlike_type)
    return text.replace(plain, quoted, 1)


def _header(proto: onnx.FunctionProto, quote: Callable[[str], str]) -> str:
    return " => ".join(f"({', '.join(map(quote, names))})" for names in (proto.input, proto.output))


def _quoted_unlike_type(name: str) -> str:
    """Return a name as a function's header needs it: the parser takes `seq` or `float` for the start of a type."""
    return f'"{name}"' if name in _TYPE_NAMES else name


def _commas(lines: list[str]) -> list[str]:
    return [line + "," for line in lines[:-1]] + lines[-1:]
