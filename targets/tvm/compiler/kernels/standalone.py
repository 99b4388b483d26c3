"""One kernel compiled by itself and called on numpy arrays: for tests, benchmarks and whoever writes a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from passopt.targets.tvm.compiler.code_generation import code_generation
from passopt.targets.tvm.machines import Cpu, level

#: A plain member of each level, so that LLVM is given nothing besides.
_MEMBERS = {"avx512-vnni": "icelake-server", "avx2": "x86-64-v3", "plain": "x86-64"}


def member_of(level_name: str) -> Cpu:
    """A CPU that has the instructions of a level and no more."""
    return Cpu(_MEMBERS[level_name], level(level_name))


def compile_kernel(function: Any, cpu: Cpu) -> Callable[..., None]:
    """`function` (a PrimFunc) for `cpu`; the result takes arrays (written in place) and integers."""
    import tvm

    built = build_kernel(function, cpu)

    def call(*arguments: np.ndarray[Any, Any] | int) -> None:
        # Copies, since TVM takes only data that is aligned to 64 bytes.
        tensors: list[Any] = [item if isinstance(item, int) else tvm.runtime.tensor(item) for item in arguments]
        built(*tensors)
        for array, tensor in zip(arguments, tensors, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable:
                np.copyto(array, tensor.numpy())

    return call


def build_kernel(function: Any, cpu: Cpu) -> Callable[..., None]:
    """As `compile_kernel`; the result takes TVM's tensors, which are not copied."""
    return _module(function, cpu)["kernel"]  # type: ignore[no-any-return]


def assembly(function: Any, cpu: Cpu) -> str:
    """The assembly of `function`, to see which instructions LLVM chose; the host need not have them."""
    return str(_module(function, cpu).mod.inspect_source("s"))


def _module(function: Any, cpu: Cpu) -> Any:
    import tvm

    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    target = cpu.target()
    with code_generation(target):
        return tvm.compile(module, target=target)
