"""How TVM makes machine code of TIR functions: kernels are tested in the same context as models are compiled in."""

from __future__ import annotations

import contextlib
from typing import Any

#: It shrinks buffers to what is read of them. Ours are exact and TVM's small operators read all, so that the code is
#: the same without it, and it takes five sixths of the time. Schedules of a GPU do need it.
_LEFT_OUT_ON_CPU = "s_tir.CompactBufferAllocation"


def code_generation(target: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context for `tvm.compile` and `relax.build` with this target."""
    import tvm

    left_out = [_LEFT_OUT_ON_CPU] if str(target.kind.name) == "llvm" else []
    return tvm.transform.PassContext(disabled_pass=left_out)  # type: ignore[no-any-return]
