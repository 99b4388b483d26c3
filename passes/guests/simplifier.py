"""Run onnxsim on a graph without weights: those enter as inputs, and become initializers again afterwards."""

from __future__ import annotations

import importlib.util

import onnx
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.weights.lazy_weight import constant_tensor
from passopt.passes.framework.records import PassResult
from passopt.passes.guests.foreign_names import has_negative_zero, hide_foreign_names, show_foreign_names
from passopt.passes.guests.onnxsim_process import OnnxsimError, simplified
from passopt.passes.guests.restore_metadata import Snapshot, take_over
from passopt.passes.guests.weight_handles import (
    LOCATION,
    Handles,
    bodies,
    defaulted_inputs,
    from_proto,
    restore_defaults,
    to_proto,
    without_defaults,
)

if importlib.util.find_spec("onnxsim") is None:  # it is imported where it runs, in a process of its own
    raise ModuleNotFoundError("No module named 'onnxsim'", name="onnxsim")

#: Optimizers that are left out: fusions into operators that later passes do not look for, one that needs the numbers
#: of weights, and one that writes a 0 for a computed length in targets of Reshape; fusions of norms, activations and
#: attention, for which there are passes that look at shapes, as the weight of an RMSNormalization may not be larger
#: than its input; one that joins reductions of all axes and of one, and so loses an axis; and one that takes a softmax
#: over a single element for 1, which is NaN where that element is masked out; and two that rename an input of the model
#: where a sequence or optional only hands it on to an output. onnxsim's folding of constants is left out too: it gives
#: computed shapes wrong lengths.
_SKIPPED = (
    "eliminate_nop_softmax",
    "eliminate_optional_get_element",
    "eliminate_sequence_at_construct",
    "fuse_attention",
    "fuse_concat_into_reshape",
    "fuse_consecutive_reduce",
    "fuse_gelu",
    "fuse_gqa",
    "fuse_layer_norm",
    "fuse_lp_normalization",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_rms_norm",
    "fuse_rope",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_transpose_into_gemm",
    "fuse_qkv",
    "fuse_bn_into_conv",
)
#: The first version of ONNX's format in which a constant need not be an input too; onnxsim refuses constants before.
_IR_VERSION = 4
_QUANTISATION = {"DequantizeLinear", "QuantizeLinear"}


def run_onnxsim(model: onnx_ir.Model, author: str, limit: int) -> PassResult:
    """Simplify `model` in place by onnxsim.

    Args:
        model: The model, which is changed in place.
        author: The name of the pass.
        limit: Bytes of the largest constant that folding may make.

    Returns:
        Whether the model changed, and how many nodes were made, changed or removed.

    Raises:
        PassError: If onnxsim fails, calls its own result invalid, or changes the inputs and outputs.
    """
    before, handles, defaults = Snapshot(model), Handles(), defaulted_inputs(model)
    quantised = _read_by_quantisation(model)
    proto = to_proto(model, handles)
    without_defaults(proto, defaults)
    interface = _interface(proto.graph)
    held = _hold_out(proto, quantised, author)
    hidden = hide_foreign_names(proto)
    stated, proto.ir_version = proto.ir_version, max(proto.ir_version, _IR_VERSION)
    made = _call(proto, author, limit)
    made.ir_version = stated
    show_foreign_names(made, hidden)
    _put_back(made.graph, held)
    if _interface(made.graph) != interface:
        raise PassError(
            f"{author}: onnxsim changed the inputs and outputs from {interface} to {_interface(made.graph)}; "
            f"this is a defect of onnxsim. Leave out the pass for this model."
        )
    del made.metadata_props[:]  # onnxsim's list of changed nodes; passopt records in its own way what made a node
    changed = from_proto(made, handles)
    _name_new_values(changed, _value_names(model))
    _name_nodes(changed, model)
    _restore_shapes(changed, model)
    restore_defaults(changed, defaults)
    before.put_back_initializers(changed.graph)
    result = before.finish(changed, author, ignores_order=True)
    if result.modified:
        take_over(model, changed)
    return result


def _restore_shapes(changed: onnx_ir.Model, model: onnx_ir.Model) -> None:
    """Give inputs and outputs the shapes that they had, and drop all others.

    onnxsim takes lengths for equal that are so only where nothing is broadcast; our own inference finds what is sure.
    """
    for node in changed.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    old = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in (*changed.graph.inputs, *changed.graph.outputs):
        before = old[value.name]  # the names were compared before
        value.type, value.shape = before.type or value.type, before.shape


def _call(proto: onnx.ModelProto, author: str, limit: int) -> onnx.ModelProto:
    """Run onnxsim, which sees no weight and folds nothing."""
    try:
        made, valid = simplified(
            proto, skipped_optimizers=list(_SKIPPED), tensor_size_threshold=f"{limit}B", skip_constant_folding=True
        )
    except OnnxsimError as error:
        raise PassError(f"{author}: onnxsim failed with {error}. Leave out the pass for this model.") from error
    if not valid:
        raise PassError(f"{author}: onnxsim says that its own result is not valid. Leave out the pass for this model.")
    return made


def _read_by_quantisation(model: onnx_ir.Model) -> set[str]:
    """Return the names of constants that a QuantizeLinear or DequantizeLinear reads.

    Folding these would undo the quantisation.
    """
    found: set[str] = set()
    for node in model.graph.all_nodes():
        if node.op_type in _QUANTISATION:
            constants = [value for value in node.inputs if value is not None and constant_tensor(value) is not None]
            found.update(value.name for value in constants if value.name)
    return found


def _hold_out(proto: onnx.ModelProto, quantised: set[str], author: str) -> dict[str, onnx.TensorProto]:
    """Turn handles and some small constants into graph inputs, in whatever body they stand; return these by name.

    The constants are those of quantisation, and those with a negative zero: onnxsim takes it for a positive one.
    """
    held: dict[str, onnx.TensorProto] = {}
    for graph in (proto.graph, *bodies(proto.graph)):
        kept = []
        for tensor in graph.initializer:
            if not _is_handle(tensor) and tensor.name not in quantised and not has_negative_zero(tensor):
                kept.append(tensor)
                continue
            if tensor.name in held:
                raise PassError(f"{author}: two bodies have a weight {tensor.name!r}; rename one of them")
            held[tensor.name] = tensor
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)) for name, tensor in held.items()
    )
    return held


def _put_back(graph: onnx.GraphProto, held: dict[str, onnx.TensorProto]) -> None:
    """Turn the inputs that stood for weights back into weights, except for those that no node reads any more."""
    read = {name for inner in (graph, *bodies(graph)) for node in inner.node for name in node.input}
    read.update(value.name for inner in (graph, *bodies(graph)) for value in inner.output)
    inputs = [value for value in graph.input if value.name not in held]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.initializer.extend(tensor for name, tensor in held.items() if name in read)


def _is_handle(tensor: onnx.TensorProto) -> bool:
    return any(entry.key == "location" and entry.value == LOCATION for entry in tensor.external_data)


def _name_new_values(model: onnx_ir.Model, old: set[str]) -> None:
    """Call each new value after the value that it is computed for.

    onnxsim itself numbers what it makes, through the whole graph.
    """
    taken = old | _value_names(model)
    for node in reversed(list(model.graph)):
        hint = node.outputs[0].name if node.outputs else node.name
        for value in node.inputs:
            if value is None or value.name in old or value.is_graph_input() or value.is_graph_output():
                continue
            producer = value.producer()
            kind = producer.op_type.lower() if producer is not None else "constant"
            value.name = _unique(f"{hint}.{kind}", taken)
            old.add(value.name)


def _name_nodes(changed: onnx_ir.Model, model: onnx_ir.Model) -> None:
    """Give nodes that were there before the names they had, and new ones names after their outputs; none twice.

    onnxruntime refuses some models with two nodes of one name. Both branches of an If may call a value the same, so an
    output stands for as many nodes as make one of its name; they get their names in the order of the graph.
    """
    before: dict[str, list[str | None]] = {}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name:
                before.setdefault(value.name, []).append(node.name)
    taken = {name for names in before.values() for name in names if name}
    given: set[str] = set()
    for node in changed.graph.all_nodes():
        outputs = [value.name for value in node.outputs if value.name]
        names = next((before[output] for output in outputs if output in before), [])
        name = next((name for name in names if name not in given), names[0] if names else None)
        if outputs and outputs[0] in before and (not name or name not in given):
            node.name = name
        else:
            node.name = _unique(f"{outputs[0] if outputs else 'node'}/{node.op_type}", taken)
        given.add(node.name or "")


def _unique(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}.{count}"
    taken.add(found)
    return found


def _value_names(model: onnx_ir.Model) -> set[str]:
    leaves = (value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values()))
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    return {value.name for values in (leaves, made) for value in values if value.name}


def _interface(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and of the outputs."""
    return [value.name for value in graph.input], [value.name for value in graph.output]
