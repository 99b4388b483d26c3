"""Run passes of onnx-ir (`onnx_ir.passes.PassBase`) on the model itself, in place or functional."""

from __future__ import annotations

import onnx_ir
import onnx_ir.passes

from passopt.ir.errors import PassError
from passopt.passes.framework.records import PassResult
from passopt.passes.guests.restore_metadata import Snapshot, take_over


def run_ir_pass(model: onnx_ir.Model, author: str, guest: onnx_ir.passes.PassBase) -> PassResult:
    """Run `guest` on `model`, which becomes the result.

    Raises PassError if `guest` is no onnx-ir pass, or where onnx-ir says that its conditions do not hold.
    """
    if not isinstance(guest, onnx_ir.passes.PassBase):
        raise PassError(f"{author}: made a {type(guest).__name__}, expected an onnx_ir.passes.PassBase")
    before = Snapshot(model)
    try:
        changed = guest(model).model
    except (onnx_ir.passes.PassError, onnx_ir.passes.InvariantError) as error:
        raise PassError(f"{author}: {error}" + (f": {error.__cause__}" if error.__cause__ else "")) from error
    result = before.finish(changed, author)
    take_over(model, changed)
    return result
