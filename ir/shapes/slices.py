"""Tell for which Slices runtimes do not agree with ONNX."""

from __future__ import annotations

import numpy as np
import onnx_ir

from passopt.ir.weights.lazy_weight import small_constant

_GREATEST = (np.iinfo(np.int32).max, np.iinfo(np.int64).max)


def is_disputed(node: onnx_ir.Node) -> bool:
    """Return whether a Slice goes backwards, and ends at the greatest number of a dtype.

    For ONNX that number is the end of the axis, so that nothing is taken; for onnxruntime it is the start.
    """
    if node.op_type != "Slice" or len(node.inputs) < 5 or node.inputs[4] is None or node.inputs[2] is None:
        return False
    ends, steps = (small_constant(node.inputs[index]) for index in (2, 4))
    if ends is None or steps is None:
        return False
    return any(step < 0 and end in _GREATEST for end, step in zip(ends.reshape(-1), steps.reshape(-1), strict=False))
