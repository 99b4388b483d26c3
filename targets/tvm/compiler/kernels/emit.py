"""Emit the code that several kernels share: declarations, loads and stores of vectors, exp, loops over spans.

Each function emits statements into the PrimFunc that is being built (with `tvm.script.ir_builder`), or returns an
expression for it. `lanes` is always the number of elements of a vector; 1 means a single number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from passopt.targets.tvm.machines import Isa

#: `noalias` says that outputs never overlap inputs; `op_pattern` 8 means opaque, that is never fused with others.
FUNCTION_ATTRIBUTES = {"tirx.noalias": True, "op_pattern": 8}

#: A loop over fewer numbers than this runs on the calling thread: waking others would cost more than they save.
SMALL_WORK = 1 << 16

#: The size in bytes up to which TVM keeps a buffer on the stack.
_STACK_BYTES = 1024

LINE_BYTES = 64
#: The number of fp32 numbers per cache line.
CACHE_LINE = LINE_BYTES // 4

#: `exp` is accurate between these two, where e^x is a normal number of fp32; it clamps its argument to them.
LOWEST_EXPONENT = -87.33
HIGHEST_EXPONENT = 88.37

# e^r = 1 + r + r²·(c₃ + c₂·r + c₁·r² + c₀·r³) for |r| ≤ ln(2)/2: minimax, relative error 1.1e-7.
_EXP_COEFFICIENTS = (8.31252505e-3, 4.18901138e-2, 1.66671145e-1, 4.99992318e-1, 1.0, 1.0)
_LOG2_E = 1.4426950408889634
# ln(2) in two parts; the high one has few bits, so that its product with an integer is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


def symbol(name: str) -> Any:
    """Return a symbolic length or count, an int64 that is known only when the kernel runs."""
    import tvm

    return tvm.tirx.Var(name, "int64")


def argument(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Any:
    """Declare the next tensor argument of the function that is being built, and return its buffer."""
    from tvm.script.ir_builder import tirx as T

    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


@contextlib.contextmanager
def root_block() -> Iterator[None]:
    """Open the block around a kernel's body, without which a pass of Relax crashes."""
    from tvm.script.ir_builder import tirx as T

    with T.sblock("root"):
        T.reads([])
        T.writes([])
        yield


def local(*shape: int, dtype: str = "float32") -> Any:
    """Return a buffer of at most 1 KiB that becomes registers, if all indices are known once the code is unrolled.

    In TVM 0.27 a small "global" buffer lies on the stack, which LLVM turns into registers. A "local" buffer is separate
    memory, which stays in registers only within loops that do nothing else with memory: a prefetch makes it spill.
    Raises ValueError for larger buffers.
    """
    import tvm
    from tvm.script.ir_builder import tirx as T

    nbytes = math.prod(shape) * tvm.DataType(dtype).itemsize
    if nbytes > _STACK_BYTES:
        raise ValueError(
            f"a local buffer {list(shape)} of {dtype} takes {nbytes} bytes; beyond {_STACK_BYTES} it is memory"
        )
    return T.alloc_buffer(shape, dtype, scope="global")


def scratch(*shape: int) -> Any:
    """Return an fp32 buffer in memory of the thread; it lives as long as the loop around it runs."""
    from tvm.script.ir_builder import tirx as T

    return T.alloc_buffer(shape, "float32", scope="global")


def bind(value: Any) -> Any:
    """Bind `value` to a variable and return it, so that it is computed only once."""
    from tvm.script.ir_builder import tirx as T

    return T.Bind(value)


def opaque(number: Any) -> Any:
    """Bind the int64 `number` to a variable whose value TVM's analyzer cannot see, and return it.

    The analyzer would take minutes over long conditions if it saw the expression.
    """
    from tvm.script.ir_builder import tirx as T

    held = local(1, dtype="int64")
    T.buffer_store(held, number, [0])
    return T.Bind(held[0])


def span(start: Any, lanes: int, stride: int = 1) -> Any:
    """Return the index of `lanes` elements from `start` on, `stride` apart."""
    from tvm.script.ir_builder import tirx as T

    return start if lanes == 1 else T.Ramp(start, stride, lanes)


def load(buffer: Any, indices: Sequence[Any], lanes: int) -> Any:
    """Return `lanes` elements of `buffer`, consecutive along its last axis from `indices` on."""
    *rest, last = indices
    return buffer[(*rest, span(last, lanes))]


def load_float32(buffer: Any, indices: Sequence[Any], lanes: int, isa: Isa) -> Any:
    """Load as `load` does, and convert to fp32 from the dtype of the buffer."""
    return to_float32(load(buffer, indices, lanes), str(buffer.dtype), lanes, isa)


def store(buffer: Any, value: Any, indices: Sequence[Any], lanes: int) -> None:
    """Write the `lanes` elements of `value` to where `load` with the same indices reads them."""
    from tvm.script.ir_builder import tirx as T

    *rest, last = indices
    T.buffer_store(buffer, value, [*rest, span(last, lanes)])


def store_float32(buffer: Any, value: Any, indices: Sequence[Any], lanes: int) -> None:
    """Write fp32 numbers as `store` does, rounded to the dtype of the buffer."""
    from tvm.script.ir_builder import tirx as T

    rounded = value if buffer.dtype == "float32" else T.Cast(typed(buffer.dtype, lanes), value)
    store(buffer, rounded, indices, lanes)


#: LLVM's numbers for the cache that a prefetched line goes to.
L1, L2 = 3, 2


def prefetch(buffer: Any, indices: Sequence[Any], locality: int = L1, *, write: bool = False) -> None:
    """Prefetch the cache line of an element that is used soon.

    Nothing is read, so the element may lie behind the end of the buffer.
    """
    from tvm.script.ir_builder import tirx as T

    address = T.address_of(buffer[tuple(indices)])
    kind, data = T.int32(int(write)), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, kind, T.int32(locality), data))


#: How many bytes ahead of the weights in use `prefetch_ahead` prefetches. The CPU's own prefetching stops at the end of
#: a page of 4 KiB, and about as many bytes are needed to hide the wait for memory at the start of the next page.
AHEAD_BYTES = 4096


def prefetch_ahead(weights: Any, position: Any, count: int, item_bytes: int) -> None:
    """Prefetch what lies `AHEAD_BYTES` bytes behind elements `position` to `position + count` of a flat buffer.

    `item_bytes` is the size of an element in bytes.
    """
    line = LINE_BYTES // item_bytes
    for start in range(0, count, line):
        prefetch(weights, [position + AHEAD_BYTES // item_bytes + start], L2)


def typed(dtype: Any, lanes: int) -> str:
    """Return TVM's name of a vector type, such as float32x16."""
    return str(dtype) if lanes == 1 else f"{dtype}x{lanes}"


def spread(value: Any, lanes: int) -> Any:
    """Return a vector with the number `value` in every lane."""
    from tvm.script.ir_builder import tirx as T

    scalar = T.float32(value) if isinstance(value, float) else value
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def to_float32(value: Any, dtype: str, lanes: int, isa: Isa) -> Any:
    """Convert `value`, a vector of `dtype` (float32, float16, bfloat16 or int8), to fp32."""
    from tvm.script.ir_builder import tirx as T

    if dtype == "float32":
        return value
    if dtype == "float16" and "f16c" not in isa.features and not isa.is_gpu:
        return _half_by_bits(value, lanes)
    if dtype == "bfloat16":
        # Not a plain cast: if that is bound to a variable, TVM 0.27 converts the bits as if they were an integer.
        bits = T.Cast(typed("uint32", lanes), T.reinterpret(typed("uint16", lanes), value))
        return T.reinterpret(typed("float32", lanes), T.shift_left(bits, spread(T.uint32(16), lanes)))
    return T.Cast(typed("float32", lanes), value)


def _half_by_bits(value: Any, lanes: int) -> Any:
    """Convert fp16 to fp32 with integer instructions; exact for finite numbers.

    Without the feature F16C, LLVM would call a library function for the conversion.
    """
    from tvm.script.ir_builder import tirx as T

    whole, real = typed("uint32", lanes), typed("float32", lanes)
    bits = T.Cast(whole, T.reinterpret(typed("uint16", lanes), value))
    sign = T.shift_left(T.bitwise_and(bits, spread(T.uint32(0x8000), lanes)), spread(T.uint32(16), lanes))
    magnitude = T.shift_left(T.bitwise_and(bits, spread(T.uint32(0x7FFF), lanes)), spread(T.uint32(13), lanes))
    # The biases of the two exponents differ by 112; the product also normalises subnormal numbers.
    scaled = T.reinterpret(real, magnitude) * spread(2.0**112, lanes)
    return T.reinterpret(real, T.bitwise_or(T.reinterpret(whole, scaled), sign))


def exp(x: Any, lanes: int) -> Any:
    """Return e^x with a relative error of 2e-7; x is first clamped to LOWEST_EXPONENT … HIGHEST_EXPONENT."""
    from tvm.script.ir_builder import tirx as T

    def same(value: float) -> Any:
        return spread(value, lanes)

    integer, real = typed("int32", lanes), typed("float32", lanes)
    bounded = bind(T.min(T.max(x, same(LOWEST_EXPONENT)), same(HIGHEST_EXPONENT)))
    # 127 is the bias of fp32's exponents. It makes the number positive, so that cutting off the fraction after adding
    # one half rounds to the nearest integer.
    exponent = bind(T.Cast(integer, bounded * same(_LOG2_E) + same(127.5)))
    whole = bind(T.Cast(real, exponent) - same(127.0))
    rest = bind((bounded - whole * same(_LN2_HIGH)) - whole * same(_LN2_LOW))
    polynomial = same(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        polynomial = polynomial * rest + same(coefficient)
    return polynomial * T.reinterpret(real, T.shift_left(exponent, spread(T.int32(23), lanes)))


def fold_lanes(buffer: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes of a local buffer to one number, such as their sum or maximum, and return it.

    `lanes` is a power of two. The buffer is overwritten.
    """
    width = lanes
    while width > 1:
        width //= 2
        store(buffer, combine(load(buffer, [0], width), load(buffer, [width], width)), [0], width)
    return buffer[0]


def spans(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, lanes) for the rest of `length` after as many vectors of `width` as fit.

    Lanes are powers of two, the widest first.
    """
    return spans_between(length - length % width, length)


def spans_between(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, lanes) that cover `start` to `end`; lanes are powers of two, the widest first."""
    while start < end:
        lanes = 1 << ((end - start).bit_length() - 1)
        yield start, lanes
        start += lanes


def each_span(length: int, width: int, body: Callable[[Any, int], None]) -> None:
    """Emit `body(start, lanes)` for `length` numbers: a loop over vectors of `width`, then narrower ones."""
    from tvm.script.ir_builder import tirx as T

    if length >= width:
        with T.serial(0, length // width) as step:
            body(step * width, width)
    for start, lanes in spans(length, width):
        body(start, lanes)


def each_span_of(length: Any, width: int, body: Callable[[Any, int], None]) -> None:
    """Emit a loop as `each_span` does, for a symbolic `length`; the rest is done number by number."""
    from tvm.script.ir_builder import tirx as T

    with T.serial(0, length // width) as step:
        body(step * width, width)
    with T.serial(0, length % width) as rest:
        body(length // width * width + rest, 1)


def each_row(rows: Any, row_size: Any, body: Callable[[Any], None]) -> None:
    """Emit `body(row)` for each of `rows` rows of `row_size` numbers, on all threads if that is much work."""
    from tvm.script.ir_builder import tirx as T

    with T.If(rows * row_size < SMALL_WORK):
        with T.Then(), T.serial(0, rows) as row:
            body(row)
        with T.Else(), T.parallel(0, rows) as row:
            body(row)
