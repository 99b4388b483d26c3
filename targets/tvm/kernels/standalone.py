"""One kernel compiled by itself and called on numpy arrays: for tests, benchmarks and whoever writes a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from passopt.targets.tvm.features import Cpu


def compile_kernel(function: Any, cpu: Cpu) -> Callable[..., None]:
    """`function` (a PrimFunc) for `cpu`; the result takes arrays (written in place) and integers."""
    import tvm

    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    built = tvm.compile(module, target=cpu.target())["kernel"]

    def call(*arguments: np.ndarray[Any, Any] | int) -> None:
        # Copies, since TVM takes only data that is aligned to 64 bytes.
        tensors: list[Any] = [item if isinstance(item, int) else tvm.runtime.tensor(item) for item in arguments]
        built(*tensors)
        for array, tensor in zip(arguments, tensors, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable:
                np.copyto(array, tensor.numpy())

    return call


def assembly(function: Any, cpu: Cpu) -> str:
    """The assembly of `function`, to see which instructions LLVM chose; the host need not have them."""
    import tvm

    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return str(tvm.compile(module, target=cpu.target()).mod.inspect_source("s"))
