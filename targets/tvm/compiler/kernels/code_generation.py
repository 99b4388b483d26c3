"""How TVM makes machine code of TIR functions: kernels are tested in the same context as models are compiled in."""

from __future__ import annotations

import contextlib
from typing import Any

#: This pass shrinks buffers to what is read of them, and takes most of the time that a kernel takes to compile. Kernels
#: and TVM's small operators ask for no more than they need. Schedules for a GPU do need it.
COMPACTION = "s_tir.CompactBufferAllocation"
#: This pass moves conditions out of loops, which LLVM does as well, and takes a sixth of the remaining time.
HOISTING = "s_tir.HoistIfThenElse"


def code_generation(target: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context for `tvm.compile` and `relax.build`, which for a CPU leaves out passes that change nothing."""
    import tvm

    left_out = [COMPACTION, HOISTING] if str(target.kind.name) == "llvm" else []
    return tvm.transform.PassContext(disabled_pass=left_out)  # type: ignore[no-any-return]
