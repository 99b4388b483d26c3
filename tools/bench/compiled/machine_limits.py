"""Measure what the machine can do: the bytes it reads per second, and its fp32 and int8 arithmetic in registers.

Every figure is the best of several kernels and repeats, since it is a limit to compare with and not an average.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from compiled.shapes import Array, timed
from passopt.targets.tvm.compiler.kernels.emit import AHEAD_BYTES, CACHE_LINE, L2, prefetch
from passopt.targets.tvm.compiler.kernels.standalone import build_kernel
from passopt.targets.tvm.machines import Cpu, Isa, find_cpu

#: Bytes to read: 1.5 GiB, which is more than any cache holds.
READ_BYTES = 3 << 29
#: Number of pieces of the buffer, which the threads share out among themselves.
PIECES = 96
#: Numbers of vectors that each step of a kernel loads. Each has a sum of its own, so that no sum waits for another.
STREAMS = (4, 8, 16)
#: How often a kernel of arithmetic repeats its step.
STEPS = 1 << 22
Step: TypeAlias = Callable[[Any, Any, Any], Any]


def read_kernel(lanes: int, streams: int, *, ahead: bool) -> Any:
    """Return a kernel that sums the int32 numbers of x [PIECES, steps, streams, lanes] into y [PIECES, lanes].

    With `ahead` it prefetches what it will read, as passopt's linears do.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    steps = READ_BYTES // (4 * PIECES * streams * lanes)
    distance = AHEAD_BYTES // (4 * streams * lanes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, is_private=True):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(T.arg("x", T.handle()), (PIECES, steps, streams, lanes), "int32")
            y = T.match_buffer(T.arg("y", T.handle()), (PIECES, lanes), "int32")
            with T.sblock("root"):
                T.reads([])
                T.writes([])
                with T.parallel(0, PIECES) as piece:
                    sums = T.alloc_buffer((streams, lanes), "int32", scope="local")
                    for stream in range(streams):
                        with T.vectorized(0, lanes) as lane:
                            T.buffer_store(sums, 0, [stream, lane])
                    with T.serial(0, steps) as step:
                        for stream in range(streams):
                            if ahead and stream * lanes % CACHE_LINE == 0:
                                prefetch(x, [piece, step + distance, stream, 0], L2)
                            with T.vectorized(0, lanes) as lane:
                                T.buffer_store(sums, sums[stream, lane] + x[piece, step, stream, lane], [stream, lane])
                    for stream in range(1, streams):
                        with T.vectorized(0, lanes) as lane:
                            T.buffer_store(sums, sums[0, lane] + sums[stream, lane], [0, lane])
                    with T.vectorized(0, lanes) as lane:
                        T.buffer_store(y, sums[0, lane], [piece, lane])
        return builder.get()


def register_kernel(isa: Isa, pieces: int, dtype: str, step: Step) -> Any:
    """Return a kernel that computes sum = step(sum, x[0], x[1]) `STEPS` times for each of many sums.

    The sums are y [pieces, sums, lanes], and x is [2, lanes]. The sums of a piece fill two thirds of all registers.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    count, lanes = sums_of(isa), isa.lanes
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, is_private=True):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(T.arg("x", T.handle()), (2, lanes), dtype)
            y = T.match_buffer(T.arg("y", T.handle()), (pieces, count, lanes), dtype)
            with T.sblock("root"):
                T.reads([])
                T.writes([])
                with T.parallel(0, pieces) as piece:
                    sums = T.alloc_buffer((count, lanes), dtype, scope="local")
                    whole = T.ramp(0, 1, lanes)
                    for index in range(count):
                        T.buffer_store(sums, y[piece, index, whole], [index, whole])
                    with T.serial(0, STEPS):
                        for index in range(count):
                            T.buffer_store(sums, step(sums[index, whole], x[0, whole], x[1, whole]), [index, whole])
                    for index in range(count):
                        T.buffer_store(y, sums[index, whole], [piece, index, whole])
        return builder.get()


def sums_of(isa: Isa) -> int:
    """Return how many vectors of sums fill two thirds of the registers."""
    return 2 * isa.registers // 3


def integer_steps(isa: Isa) -> list[tuple[int, Step]]:
    """Return the ways to multiply bytes with this instruction set, as (operations per lane of 32 bits, step).

    One operand of each product is the sum itself: a product of constants could be moved out of the loop.
    """
    from tvm.script.ir_builder import tirx as T

    lanes = isa.lanes
    vector, half, bytes_ = f"int32x{lanes}", f"int16x{2 * lanes}", f"int8x{4 * lanes}"

    def call(dtype: str, name: str, *operands: Any) -> Any:
        return T.call_llvm_pure_intrin(dtype, f"llvm.x86.{name}", *operands)

    def byte_dot(total: Any, left: Any, right: Any) -> Any:
        operands = (T.reinterpret(bytes_, item) for item in (left, right))
        return call(vector, "avx512.vpdpbusd.512", total, *operands)

    def words(total: Any, left: Any, right: Any) -> Any:
        return total + call(vector, "avx2.pmadd.wd", T.reinterpret(half, total), T.reinterpret(half, right))

    def saturating_bytes(total: Any, left: Any, right: Any) -> Any:
        unsigned, signed = (T.reinterpret(bytes_, item) for item in (total, right))
        pairs = call(half, "avx2.pmadd.ub.sw", unsigned, signed)
        return total + call(vector, "avx2.pmadd.wd", pairs, T.reinterpret(half, left))

    if isa.has_byte_dot:
        return [(8, byte_dot)]
    return [(4, words), (8, saturating_bytes)] if isa.name == "avx2" else []


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return bytes and operations per second, measured with as many threads as the environment gives TVM."""
    (threads,) = job["threads"]
    cpu = find_cpu()
    arithmetic = [("fp32", "float32", 2, lambda total, left, right: total * left + right)]
    arithmetic += [("int8", "int32", operations, step) for operations, step in integer_steps(cpu.isa)]
    best: dict[str, float] = {"read": read_speed(cpu, job["seconds"])}
    for name, dtype, operations, step in arithmetic:
        pieces = threads
        run = build_kernel(register_kernel(cpu.isa, pieces, dtype, step), cpu)
        sizes = (pieces, sums_of(cpu.isa), cpu.isa.lanes)
        x, y = tensor(np.full((2, cpu.isa.lanes), 0.5, np.float32).astype(dtype)), tensor(np.zeros(sizes, dtype))
        seconds = min(timed(lambda run=run, x=x, y=y: run(x, y), seconds=job["seconds"]))  # type: ignore[misc]
        best[name] = max(best.get(name, 0.0), STEPS * float(np.prod(sizes)) * operations / seconds)
    return {f"{name} 0 {threads}": [speed] for name, speed in best.items()}


def read_speed(cpu: Cpu, seconds: float) -> float:
    """Return the bytes read per second by the fastest of the kernels; raise SystemExit if a sum is wrong."""
    best = 0.0
    for streams, ahead in itertools.product(STREAMS, (False, True)):
        run = build_kernel(read_kernel(cpu.isa.lanes, streams, ahead=ahead), cpu)
        steps = READ_BYTES // (4 * PIECES * streams * cpu.isa.lanes)
        x = tensor(np.ones((PIECES, steps, streams, cpu.isa.lanes), np.int32))
        y = tensor(np.zeros((PIECES, cpu.isa.lanes), np.int32))
        times = timed(lambda run=run, x=x, y=y: run(x, y), seconds=seconds)  # type: ignore[misc]
        if int(y.numpy().sum()) != READ_BYTES // 4:
            raise SystemExit(
                f"bench-tvm: the sum over {READ_BYTES} bytes is {y.numpy().sum()}, expected {READ_BYTES // 4}"
            )
        best = max(best, READ_BYTES / min(times))
    return best


def tensor(array: Array) -> Any:
    """Return a copy of an array as a tensor of TVM."""
    import tvm

    return tvm.runtime.tensor(array)
