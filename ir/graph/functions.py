"""Define passopt's own operators: ONNX local functions in domain `passopt`, with bodies of standard operators.

A target that knows an operator's name may run a kernel of its own for it; every other tool runs the body. Shapes use
b batch, h heads, q positions of this step, p positions in the cache, t = p + q, d channels of a head.
"""

from __future__ import annotations

import onnx
import onnx_ir

DOMAIN = "passopt"
ALIBI_ATTENTION = "AlibiAttention"
ALIBI_ATTENTION_NO_CACHE = "AlibiAttentionNoCache"

#: The oldest opset that has the Attention operator which the bodies call.
OLDEST_OPSET = 23

#: The bias is clamped to half of fp32's lowest number, which still masks. At the lowest number itself, Attention would
#: return 0 for a fully masked row.
_CORE = """
    axes = Constant <value_ints = [1, 2]> ()
    columns = Unsqueeze (positions, axes)
    alibi = Mul (slopes, columns)
    bias = Add (alibi, mask)
    lowest = Constant <value_float = -1.7014117e38> ()
    finite = Max (bias, lowest)
    wide_query = Cast <to = 1> (query)
    wide_key = Cast <to = 1> ({key})
    wide_value = Cast <to = 1> ({value})
    wide = Attention <scale: float = @scale> (wide_query, wide_key, wide_value, finite)
    y = CastLike (wide, query)"""

_BODIES = {
    ALIBI_ATTENTION: f"""
AlibiAttention <scale> (query, key, value, slopes, positions, mask, past_key, past_value)
    => (y, present_key, present_value) {{
    present_key = Concat <axis = 2> (past_key, key)
    present_value = Concat <axis = 2> (past_value, value){_CORE.format(key="present_key", value="present_value")}
}}""",
    ALIBI_ATTENTION_NO_CACHE: f"""
AlibiAttentionNoCache <scale> (query, key, value, slopes, positions, mask) => (y) {{
{_CORE.format(key="key", value="value")}
}}""",
}


def local_function(op_type: str, opset: int) -> onnx_ir.Function | None:
    """Return the definition of an operator of domain `passopt` over `opset`, or None if there is none.

    There is none for an unknown name, nor for an opset below 23.

    AlibiAttention computes y = softmax(query·keyᵀ·scale + slopes·positions + mask)·value in fp32, because in fp16
    column 4095 of the bias would be off by 2. Its inputs are query `[b, h, q, d]`, key and value `[b, h_kv, q, d]`;
    slopes `[h, 1, 1]`, positions `[1 or b, t]` and mask `[1 or b, 1, q, t]`, all three in fp32; past_key and past_value
    `[b, h_kv, p, d]`. Its attribute is scale. Its outputs are y `[b, h, q, d]` and the grown cache, present_key and
    present_value `[b, h_kv, t, d]`. AlibiAttentionNoCache is the same with neither past nor present.
    """
    body = _BODIES.get(op_type)
    if body is None or opset < OLDEST_OPSET:
        return None
    proto = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>{body}')
    return onnx_ir.serde.deserialize_function(proto)


def infer_function_types(node: onnx_ir.Node) -> None:
    """Set types and shapes of the outputs of a call of a passopt function.

    The result y has the shape of the query, but the width of the values; the cache grows by the new positions.
    """
    if node.op_type not in _BODIES:
        return
    query, value = node.inputs[0], node.inputs[2]
    assert query is not None
    assert value is not None
    rows, columns = query.shape, value.shape
    known = rows is not None and columns is not None and len(rows) == len(columns) == 4
    _set(node.outputs[0], query.type, onnx_ir.Shape([*rows[:3], columns[3]]) if known else None)  # type: ignore[index]
    for new, past, output in zip(node.inputs[1:3], node.inputs[6:8], node.outputs[1:3]):
        if new is not None and past is not None:
            _set(output, new.type, grown(past.shape, new.shape))


def grown(past: onnx_ir.Shape | None, new: onnx_ir.Shape | None) -> onnx_ir.Shape | None:
    """Return the shape of a past `[b, h, p, d]` and new positions `[b, h, q, d]` joined along the positions.

    Symbols are summed in alphabetical order, as exports do. The result is None unless both shapes have four known axes.
    """
    if past is None or new is None or len(past) != 4 or len(new) != 4:
        return None
    lengths = [past[2], new[2]]
    numbers = [length for length in lengths if isinstance(length, int)]
    names = [length.value for length in lengths if not isinstance(length, int)]
    total: int | str | None
    if len(numbers) == len(lengths):
        total = sum(numbers)
    elif numbers or None in names:
        total = None
    else:
        total = "+".join(sorted(str(name) for name in names))
    dims = [first if isinstance(first, int) or first.value is not None else other for first, other in zip(new, past)]
    return onnx_ir.Shape([dims[0], dims[1], total, dims[3]])


def _set(value: onnx_ir.Value, kind: onnx_ir.TypeProtocol | None, shape: onnx_ir.Shape | None) -> None:
    value.type = kind
    value.shape = shape


def called_functions(model: onnx_ir.Model) -> set[onnx_ir.OperatorIdentifier]:
    """Return the identifiers of the functions that the graph calls, directly or through other functions."""
    called: set[onnx_ir.OperatorIdentifier] = set()
    work = list(model.graph.all_nodes())
    while work:
        identifier = work.pop().op_identifier()
        if identifier in model.functions and identifier not in called:
            called.add(identifier)
            work.extend(model.functions[identifier].all_nodes())
    return called
