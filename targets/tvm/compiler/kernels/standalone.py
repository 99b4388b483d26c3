"""Compile a single kernel and call it on numpy arrays: for tests, benchmarks and authors of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from passopt.targets.tvm.compiler.kernels.code_generation import code_generation
from passopt.targets.tvm.machines import Cpu, level

#: For each instruction level, LLVM's name of a basic CPU of that level.
_MEMBERS = {"avx512-vnni": "icelake-server", "avx2": "x86-64-v3", "plain": "x86-64"}


def member_of(level_name: str) -> Cpu:
    """Return a basic CPU of an instruction level, so that tests run code as it is generated for that level."""
    return Cpu(_MEMBERS[level_name], level(level_name))


def compile_kernel(function: Any, cpu: Cpu) -> Callable[..., None]:
    """Compile `function` (a PrimFunc) for `cpu` and return it as a function of numpy arrays and integers.

    Arrays that are writable receive what the kernel has written to them.
    """
    import tvm

    built = build_kernel(function, cpu)

    def call(*arguments: np.ndarray[Any, Any] | int) -> None:
        # The arrays are copied, since TVM takes only data that is aligned to 64 bytes.
        tensors: list[Any] = [item if isinstance(item, int) else tvm.runtime.tensor(item) for item in arguments]
        built(*tensors)
        for array, tensor in zip(arguments, tensors, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable:
                np.copyto(array, tensor.numpy())

    return call


def build_kernel(function: Any, cpu: Cpu) -> Callable[..., None]:
    """Compile `function` as `compile_kernel` does, but return a function of TVM's tensors, which are not copied."""
    return _module(function, cpu)["kernel"]  # type: ignore[no-any-return]


def assembly(function: Any, cpu: Cpu) -> str:
    """Return the assembly of `function`, to see which instructions LLVM chose; this machine need not have them."""
    return str(_module(function, cpu).mod.inspect_source("s"))


def _module(function: Any, cpu: Cpu) -> Any:
    import tvm

    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    target = cpu.target()
    with code_generation(target):
        return tvm.compile(module, target=target)
