"""Lower single nodes with TVM's own ONNX importer: small operators without a converter of ours, and fallbacks."""

from __future__ import annotations

from typing import Any

import onnx_ir

from passopt.targets.tvm.compiler.lowering.values import Tvm, Unsupported, Values


def import_node(at: Values, node: onnx_ir.Node, opset: int) -> None:
    """Lower one node as TVM's importer does, or raise Unsupported if it cannot; `opset` is that of the graph."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map()
    if node.domain or node.op_type not in known:
        raise Unsupported("neither passopt nor TVM's importer lowers this operator")
    try:
        inputs = onnx_frontend.onnx_input([_input(at, value) for value in node.inputs])
        convert = known[node.op_type].get_converter(opset)
        result = convert(at.builder, inputs, _attributes(node), [{}, {}])
    except Unsupported:
        raise
    except Exception as error:  # TVM's errors have no common base; the caller adds the node's name to the message.
        raise Unsupported(f"TVM's importer: {type(error).__name__}: {str(error).strip().splitlines()[-1]}") from error
    results = [result[index] for index in range(len(node.outputs))] if len(node.outputs) > 1 else [result]
    for value, item in zip(node.outputs, results, strict=True):
        found = at.emit(item)
        if not hasattr(found.ty, "dtype"):
            raise Unsupported(f"TVM's importer makes a {type(found.ty).__name__} of it, no tensor")
        at.set(value, at.widened(found))


def _input(at: Values, value: onnx_ir.Value | None) -> Tvm:
    return None if value is None else at.tensor(value)


def _attributes(node: onnx_ir.Node) -> dict[str, Any]:
    found: dict[str, Any] = {"tvm_custom": {"name": node.name, "num_outputs": len(node.outputs)}}
    for name, item in node.attributes.items():
        value = item.value
        found[name] = value.numpy() if hasattr(value, "numpy") else value
        if isinstance(value, tuple | list):
            found[name] = list(value)
        elif isinstance(value, str):
            found[name] = value.encode()  # The importer expects bytes, which is what protobuf returns.
    return found
