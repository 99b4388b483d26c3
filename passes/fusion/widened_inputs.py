"""Look behind the Cast that a model in half precision puts before a norm."""

from __future__ import annotations

import onnx_ir


def before_widening(x: onnx_ir.Value, w: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return what a half-precision model cast to fp32 before the norm of weight `w`; None if it did not.

    The operators of norms widen their input themselves.
    """
    node = x.producer()
    if node is None or node.op_type != "Cast" or x.dtype != onnx_ir.DataType.FLOAT:
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == w.dtype else None
