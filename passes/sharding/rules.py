"""Define the sharding rules of operators, and propagate specs through a model by them.

A forward rule gives the specs of the outputs from those of the inputs; a backward rule demands of the inputs what a
sharded output needs. An operator without a rule is fine while all its inputs are replicated; if one is sharded, that is
an error which names the operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.decoder import INPUT_IDS
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.sharding.axes import (
    ELEMENTWISE,
    attribute_axis,
    constant_axes,
    moved_axis,
    ndim_of,
    products,
    selects_along,
    slice_bounds,
    sliced_position,
    source_axis,
)
from passopt.passes.sharding.fused_operators import FUSED_BACKWARD, FUSED_FORWARD
from passopt.passes.sharding.matmul import gemm_forward, matmul_backward, matmul_forward
from passopt.passes.sharding.placement import (
    ONE,
    REPLICATED,
    LocalDims,
    Product,
    Replicated,
    Seed,
    Sharded,
    Spec,
    VocabMasked,
)
from passopt.passes.sharding.propagate import Backward, Conflict, Propagation, is_constant
from passopt.passes.sharding.quantized_activations import integer_matmul_forward, reduces_local_rows
from passopt.passes.sharding.rank_lengths import READS_LOCAL_DIMS, SHAPE_ARITHMETIC, local_dims
from passopt.passes.sharding.reshaping import expand_backward, expand_forward, reshape_backward, reshape_forward
from passopt.passes.sharding.subgraph_captures import check_captures

Rule: TypeAlias = Callable[[Propagation, onnx_ir.Node], "Spec | list[Spec]"]

#: The dtypes of tables, as codes or as numbers, that are sharded by rows as embeddings.
_CODES = frozenset({onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8})
#: Operators that do not change token ids; some models flatten their leading axes before the look-up.
_SAME_IDS = frozenset({"Reshape", "Identity", "Cast"})
_PASSES_MASKED_ROWS = frozenset({"Cast", "Unsqueeze", "Mul"})
_REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceProd", "ArgMax"}
)


def propagate(model: onnx_ir.Model) -> Propagation:
    """Infer how every value of the model lies on the ranks.

    Args:
        model: The model, with complete types; it is not changed.

    Returns:
        The finished propagation.

    Raises:
        PassError: If a node has no consistent spec, or the body of an If, Loop or Scan reads a sharded value.
    """
    units: dict[Seed, int] = {}
    while True:
        state = Propagation(model, shard_forward, shard_backward, units).run()
        if not state.coarser:
            check_captures(state)
            return state
        units.update(state.coarser)


def shard_forward(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    """Return the specs of a node's outputs; raise Conflict or ValueError if it cannot work on inputs sharded so."""
    specs = [state.spec(node, index) for index in range(len(node.inputs))]
    if node.domain and _key(node) not in _FORWARD and not all(isinstance(spec, Replicated) for spec in specs):
        hint = "; run decompose-contrib first" if node.domain == MICROSOFT else ""
        raise Conflict(f"no sharding rule for operators of {node.domain}{hint}; its inputs are {_listed(specs)}")
    if any(isinstance(spec, VocabMasked) for spec in specs):
        specs = _settle_masked_rows(state, node, specs)
        if any(isinstance(spec, VocabMasked) for spec in specs):
            return [next(spec for spec in specs if isinstance(spec, VocabMasked))] * len(node.outputs)
    if any(isinstance(spec, LocalDims) for spec in specs) and node.op_type in SHAPE_ARITHMETIC - {"Reshape"}:
        return [local_dims(state, node)]
    if node.op_type == "Equal" and any(isinstance(spec, LocalDims) for spec in specs) and _never_equal(node):
        return [REPLICATED]
    rule = _FORWARD.get(_key(node))
    if rule is None or (node.op_type not in _SEEDING and all(isinstance(spec, Replicated) for spec in specs)):
        if all(isinstance(spec, Replicated) for spec in specs):
            return [REPLICATED] * len(node.outputs)
        raise Conflict(f"no sharding rule for this operator; its inputs are {_listed(specs)}")
    if any(isinstance(spec, LocalDims) for spec in specs) and node.op_type not in READS_LOCAL_DIMS:
        raise Conflict("computes with the length of a sharded axis")
    found = rule(state, node)
    return found if isinstance(found, list) else [found] * len(node.outputs)


def shard_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand of a node's inputs what its output needs to be sharded as `wanted`; raise Conflict if it cannot be."""
    rule = _BACKWARD.get(_key(node))
    if rule is None:
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, and {node.op_type} has no rule to get there")
    rule(state, node, wanted)


def _never_equal(node: onnx_ir.Node) -> bool:
    """Return True if an Equal compares lengths with negative numbers, as exporters do to find the -1 of an Expand."""
    constants = [small_constant(value) for value in node.inputs]
    return any(array is not None and bool((array < 0).all()) for array in constants)


def _listed(specs: Sequence[Spec]) -> str:
    return ", ".join(map(str, specs))


def _key(node: onnx_ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _settle_masked_rows(state: Propagation, node: onnx_ir.Node, specs: Sequence[Spec]) -> list[Spec]:
    """Return the specs of a node's inputs after masked rows were summed over ranks where the node needs them complete.

    Only casts to floats, Unsqueeze, and products of rows that the same ids looked up can work on masked rows.
    """
    computed = [
        spec for spec, value in zip(specs, node.inputs, strict=True) if value is not None and not is_constant(value)
    ]
    keeps = node.op_type in _PASSES_MASKED_ROWS and (node.op_type != "Cast" or node.outputs[0].dtype in FLOATS)
    if keeps and all(spec == computed[0] for spec in computed):
        return list(specs)
    settled = list(specs)
    for index, (value, spec) in enumerate(zip(node.inputs, specs, strict=True)):
        if value is not None and isinstance(spec, VocabMasked):
            state.resolve_mask(value)
            settled[index] = REPLICATED
    return settled


def _elementwise(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec on which all inputs agree, and demand it of those that are not sharded yet."""
    specs = []
    for index, value in enumerate(node.inputs):
        spec = state.spec(node, index)
        if isinstance(spec, Sharded) and value is not None:
            axis = moved_axis(node, index, spec.axis)
            assert axis is not None
            spec = spec.at(axis)
        specs.append(spec)
    if node.op_type == "CastLike":
        return specs[0]
    wanted = state.one_sharded(specs)
    if wanted is None:
        return REPLICATED
    _demand_of_all(state, node, wanted)
    return wanted


def _demand_of_all(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand that all inputs are sharded alike that have the sharded axis and do not broadcast along it."""
    count = 1 if node.op_type == "CastLike" else len(node.inputs)
    for index in range(count):
        state.demand_broadcast(node, index, wanted)


def _moving(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec after an operator that moves the sharded axis as a whole, such as Transpose or Unsqueeze."""
    spec = state.one_sharded([state.spec(node, 0)])
    if spec is None:
        return REPLICATED
    if selects_along(node, 0, spec.axis):
        hint = "; if these are parts of a packed projection, run split-packed-qkv before" * (node.op_type == "Slice")
        raise Conflict(f"picks elements along axis {spec.axis}, which is {spec}{hint}")
    axis = moved_axis(node, 0, spec.axis)
    if axis is None:
        raise Conflict(f"axis {spec.axis}, which is {spec}, does not survive this operator")
    return spec.at(axis)


def _slice(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a Slice, which may take whole segments of the sharded axis: every rank takes its share."""
    spec = state.spec(node, 0)
    if not isinstance(spec, Sharded) or not selects_along(node, 0, spec.axis) or spec.segments == ONE:
        return _moving(state, node)
    bounds, length = slice_bounds(node, spec.axis), products(node.inputs[0])[spec.axis]
    width = length.divided_by(spec.segments) if length is not None else None
    if bounds is None or width is None or any(bound % width.number for bound in bounds):
        raise Conflict(f"picks {bounds} along axis {spec.axis}, which is {spec}")
    start, end = bounds
    position = sliced_position(node, spec.axis)
    for index, bound in ((1, start), (2, end)):
        if 0 < bound < length.number:  # type: ignore[union-attr]
            state.shrink_target(node, position, spec, index)
    return dataclasses.replace(spec, segments=Product((end - start) // width.number))


def _squeeze(state: Propagation, node: onnx_ir.Node) -> Spec:
    spec = state.spec(node, 0)
    written = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    if isinstance(spec, Sharded) and not written and products(node.inputs[0])[spec.axis] == Product(spec.units):
        raise Conflict(f"expected axes, found none: one rank may hold a single element of axis {spec.axis}")
    return _moving(state, node)


def _moving_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    axis = source_axis(node, 0, wanted.axis)
    if axis is None:
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, which its input has no axis for")
    if selects_along(node, 0, axis):
        raise Conflict(f"picks elements along axis {axis} of {node.inputs[0]}, which must be {wanted}")
    state.demand(node, 0, wanted.at(axis))


def _softmax(state: Propagation, node: onnx_ir.Node) -> Spec:
    spec = _moving(state, node)
    if isinstance(spec, Sharded) and attribute_axis(node, -1, ndim_of(node.inputs[0])) == spec.axis:
        raise Conflict(f"normalises over axis {spec.axis}, which is {spec}")
    return spec


def _gather(state: Propagation, node: onnx_ir.Node) -> Spec:
    table = node.inputs[0]
    if node.op_type == "Gather" and table is not None and is_constant(table) and not is_constant(node.inputs[1]):  # type: ignore[arg-type]
        return _table(state, node, table)
    if not isinstance(state.spec(node, 1), Replicated):
        raise Conflict("the indices are sharded")
    return _moving(state, node)


def _table(state: Propagation, node: onnx_ir.Node, table: onnx_ir.Value) -> Spec:
    """Return the spec of a look-up in a constant table.

    The table of a token embedding is sharded by rows; any other table, such as one of rotary angles, is replicated.
    """
    if node not in state.tables and not _is_embedding(state, node, table):
        return _moving(state, node)
    rows = products(table)[0]
    assert rows is not None
    state.demand(node, 0, Sharded(0, ONE, rows.number))
    ids = node.inputs[1]
    assert ids is not None
    spec = VocabMasked(rows.number, ids.name or "")
    state.tables[node] = spec
    if ndim_of(table) == 1 or table.dtype in _CODES:
        return spec  # Codes and scales are multiplied before anything else needs their rows.
    state.masked[node.outputs[0]] = spec
    return REPLICATED


def _is_embedding(state: Propagation, node: onnx_ir.Node, table: onnx_ir.Value) -> bool:
    """Return True if rows of the table are looked up by token ids, which are a graph input, perhaps reshaped or cast.

    Only in a decoder is the name of that input known; in any other model every input may hold token ids.
    """
    ids = node.inputs[1]
    while ids is not None and (source := ids.producer()) is not None and source.op_type in _SAME_IDS:
        ids = source.inputs[0]
    by_rows = attribute_axis(node, 0, ndim_of(table)) == 0
    if not by_rows or ids is None or not ids.is_graph_input() or table.dtype not in _CODES | FLOATS:
        return False
    if ids.name == INPUT_IDS:
        return ndim_of(table) in {1, 2}
    return state.decoder is None and ndim_of(table) == 2


def _concat(state: Propagation, node: onnx_ir.Node) -> Spec:
    wanted = state.one_sharded([state.spec(node, index) for index in range(len(node.inputs))])
    if wanted is None:
        return REPLICATED
    _concat_backward(state, node, wanted)
    return wanted


def _concat_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    if attribute_axis(node, 0, ndim_of(node.inputs[0])) == wanted.axis:
        raise Conflict(f"joins along axis {wanted.axis}, which is {wanted}")
    for index in range(len(node.inputs)):
        state.demand(node, index, wanted)


def _split(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    spec = state.spec(node, 0)
    if not isinstance(spec, Sharded) or not selects_along(node, 0, spec.axis):
        return [_moving(state, node)] * len(node.outputs)
    sizes = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if spec.segments.symbols or spec.fixed_segments != len(node.outputs):
        raise Conflict(f"splits axis {spec.axis} into {len(node.outputs)} parts, but it is {spec}")
    if sizes is not None and len(set(sizes.tolist())) != 1:
        raise Conflict(f"splits a sharded axis into unequal parts {sizes.tolist()}")
    if sizes is not None:
        state.shrink_target(node, -1, spec)
    return [dataclasses.replace(spec, segments=ONE)] * len(node.outputs)


def _reduction(state: Propagation, node: onnx_ir.Node) -> Spec:
    spec = state.one_sharded([state.spec(node, 0)])
    if spec is None:
        return REPLICATED
    ndim = ndim_of(node.inputs[0])
    axes = constant_axes(node, 1, ndim)
    if axes == [spec.axis] and reduces_local_rows(node):
        return REPLICATED
    if axes is None or spec.axis in axes:
        raise Conflict(f"reduces over axis {spec.axis}, which is {spec}")
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    return spec if keeps else spec.at(spec.axis - sum(axis < spec.axis for axis in axes))


def _reduction_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    axes = constant_axes(node, 1, ndim_of(node.inputs[0]))
    if axes is None or ndim_of(node.outputs[0]) != ndim_of(node.inputs[0]) or wanted.axis in axes:
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, which a reduction does not give")
    state.demand(node, 0, wanted)


def _dequantize(state: Propagation, node: onnx_ir.Node) -> Spec:
    spec = state.spec(node, 0)
    if isinstance(spec, Sharded):
        _dequantize_backward(state, node, spec)
    return spec


def _dequantize_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand data that is sharded as the output, and scales and zero points too if it is sharded by channels.

    Scales of blocks have all axes of the data, and are sharded alike: those of a weight, and of the rows of a cache in
    8 bits.
    """
    data, block = node.inputs[0], node.attributes.get("block_size")
    assert data is not None
    channel = attribute_axis(node, 1, ndim_of(data))
    if block is not None and block.as_int():
        _blocks_backward(state, node, wanted)
        return
    state.demand(node, 0, wanted)
    for index in range(1, len(node.inputs)):
        per_channel = node.inputs[index] is not None and ndim_of(node.inputs[index]) == 1
        if per_channel and channel == wanted.axis:
            state.demand(node, index, wanted.at(0))


def _blocks_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand codes, scales and zero points that are sharded alike; along the axis of blocks, units are whole blocks."""
    codes, scales = node.inputs[:2]
    if attribute_axis(node, 1, ndim_of(codes)) == wanted.axis:
        length, count = products(codes)[wanted.axis], products(scales)[wanted.axis]
        block = node.attributes["block_size"].as_int()
        if length is None or count is None or length != count.times(Product(block)):
            raise Conflict(f"expected full blocks of {block}, found {count} of axis {wanted.axis} ({length})")
        blocks = count.divided_by(wanted.segments)
        if blocks is None or blocks.symbols:
            raise Conflict(f"has {count} blocks, which are not divided by what is {wanted}")
        state.divide_into(wanted, blocks.number, f"blocks of {block}")
    for index in range(len(node.inputs)):
        state.demand(node, index, wanted)


#: Operators that may make sharded outputs of replicated inputs: by the shard of a weight, or by repeating to the length
#: on one rank.
_SEEDING = frozenset({"MatMul", "MatMulInteger", "Gemm", "Gather", "Expand"})
_FORWARD: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("Transpose", "Unsqueeze"), _moving),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Softmax": _softmax,
    **dict.fromkeys(("Gather", "GatherND"), _gather),
    "Concat": _concat,
    "Split": _split,
    "Reshape": reshape_forward,
    "Expand": expand_forward,
    "Shape": local_dims,
    "MatMul": matmul_forward,
    "MatMulInteger": integer_matmul_forward,
    "Gemm": gemm_forward,
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _dequantize),
    **FUSED_FORWARD,
}
_BACKWARD: dict[str, Backward] = {
    **dict.fromkeys(ELEMENTWISE, _demand_of_all),
    **dict.fromkeys(_REDUCTIONS, _reduction_backward),
    **dict.fromkeys(("Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather", "GatherND", "Softmax"), _moving_backward),
    "Concat": _concat_backward,
    "Reshape": reshape_backward,
    "Expand": expand_backward,
    **dict.fromkeys(("MatMul", "MatMulInteger"), matmul_backward),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _dequantize_backward),
    **FUSED_BACKWARD,
}
