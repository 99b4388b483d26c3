"""What several kernels emit: declarations, vectors of consecutive numbers, exp, sums over lanes, loops over spans.

Each function emits into the PrimFunc that is being built (`tvm.script.ir_builder`), or returns an expression for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from passopt.targets.tvm.machines import Isa

#: `noalias`: outputs never overlap inputs. `op_pattern` 8: opaque, never fused with others.
FUNCTION_ATTRIBUTES = {"tirx.noalias": True, "op_pattern": 8}

#: Below this many numbers a loop runs on the calling thread: waking the others costs more than they save.
SMALL_WORK = 1 << 16

#: Up to here TVM keeps a buffer on the stack.
_STACK_BYTES = 1024

LINE_BYTES = 64
#: fp32 numbers per cache line.
CACHE_LINE = LINE_BYTES // 4

#: `exp` is exact between these two, where e^x is a normal number of fp32.
LOWEST_EXPONENT = -87.33
HIGHEST_EXPONENT = 88.37

# e^r = 1 + r + r²·(c₃ + c₂·r + c₁·r² + c₀·r³) for |r| ≤ ln(2)/2: minimax, relative error 1.1e-7.
_EXP_COEFFICIENTS = (8.31252505e-3, 4.18901138e-2, 1.66671145e-1, 4.99992318e-1, 1.0, 1.0)
_LOG2_E = 1.4426950408889634
# ln(2) in two parts; the high one has few bits, so that its product with an integer is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


def symbol(name: str) -> Any:
    """A symbolic length or count."""
    import tvm

    return tvm.tirx.Var(name, "int64")


def argument(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Any:
    """Declares the next tensor argument."""
    from tvm.script.ir_builder import tirx as T

    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


@contextlib.contextmanager
def root_block() -> Iterator[None]:
    """The block around a kernel's body, without which a pass of Relax crashes."""
    from tvm.script.ir_builder import tirx as T

    with T.sblock("root"):
        T.reads([])
        T.writes([])
        yield


def local(*shape: int, dtype: str = "float32") -> Any:
    """A buffer below 1 KiB: registers, if every index into it is known once the code is unrolled.

    For TVM 0.27 a small "global" buffer lies on the stack, which LLVM turns into registers. A "local" one is memory of
    its own, in registers only within a loop that does nothing else with memory: a prefetch makes it spill.
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
    """Memory of the thread for fp32 numbers, for as long as the loop around it takes."""
    from tvm.script.ir_builder import tirx as T

    return T.alloc_buffer(shape, "float32", scope="global")


def bind(value: Any) -> Any:
    """A name for `value`, which is then computed once."""
    from tvm.script.ir_builder import tirx as T

    return T.Bind(value)


def opaque(number: Any) -> Any:
    """A name for the int64 `number` that TVM's analyzer cannot look behind: over long conditions it takes minutes."""
    from tvm.script.ir_builder import tirx as T

    held = local(1, dtype="int64")
    T.buffer_store(held, number, [0])
    return T.Bind(held[0])


def span(start: Any, lanes: int, stride: int = 1) -> Any:
    """The index of `lanes` elements from `start`."""
    from tvm.script.ir_builder import tirx as T

    return start if lanes == 1 else T.Ramp(start, stride, lanes)


def load(buffer: Any, indices: Sequence[Any], lanes: int) -> Any:
    """`lanes` elements of `buffer`, consecutive along its last axis from `indices` on."""
    *rest, last = indices
    return buffer[(*rest, span(last, lanes))]


def load_float32(buffer: Any, indices: Sequence[Any], lanes: int, isa: Isa) -> Any:
    """As `load`, in fp32 whatever is stored."""
    return to_float32(load(buffer, indices, lanes), str(buffer.dtype), lanes, isa)


def store(buffer: Any, value: Any, indices: Sequence[Any], lanes: int) -> None:
    """The `lanes` elements of `value`, written where `load` reads them."""
    from tvm.script.ir_builder import tirx as T

    *rest, last = indices
    T.buffer_store(buffer, value, [*rest, span(last, lanes)])


def store_float32(buffer: Any, value: Any, indices: Sequence[Any], lanes: int) -> None:
    """As `store`, of fp32 numbers, rounded to what the buffer holds."""
    from tvm.script.ir_builder import tirx as T

    rounded = value if buffer.dtype == "float32" else T.Cast(typed(buffer.dtype, lanes), value)
    store(buffer, rounded, indices, lanes)


#: Which cache a prefetched line goes to, as LLVM numbers them.
L1, L2 = 3, 2


def prefetch(buffer: Any, indices: Sequence[Any], locality: int = L1, *, write: bool = False) -> None:
    """Asks for the cache line of an element, to be used soon. Nothing is read: it may lie behind the buffer's end."""
    from tvm.script.ir_builder import tirx as T

    address = T.address_of(buffer[tuple(indices)])
    kind, data = T.int32(int(write)), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, kind, T.int32(locality), data))


#: Bytes from a weight that is used to the one that is asked for. What the CPU itself reads ahead ends with the page of
#: 4 KiB; it takes about as many bytes to hide the wait for memory at the next one.
AHEAD_BYTES = 4096


def prefetch_ahead(weights: Any, position: Any, count: int, item_bytes: int) -> None:
    """Asks for what lies `AHEAD_BYTES` behind elements `position` to `position + count` of a flat buffer."""
    line = LINE_BYTES // item_bytes
    for start in range(0, count, line):
        prefetch(weights, [position + AHEAD_BYTES // item_bytes + start], L2)


def typed(dtype: Any, lanes: int) -> str:
    """The name of a vector's type."""
    return str(dtype) if lanes == 1 else f"{dtype}x{lanes}"


def spread(value: Any, lanes: int) -> Any:
    """A number in every lane."""
    from tvm.script.ir_builder import tirx as T

    scalar = T.float32(value) if isinstance(value, float) else value
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def to_float32(value: Any, dtype: str, lanes: int, isa: Isa) -> Any:
    """`value`, a vector of `dtype` (float32, float16, bfloat16 or int8), as fp32."""
    from tvm.script.ir_builder import tirx as T

    if dtype == "float32":
        return value
    if dtype == "float16" and "f16c" not in isa.features and not isa.is_gpu:
        return _half_by_bits(value, lanes)
    if dtype == "bfloat16":
        # Never a cast: bound to a name, TVM 0.27 makes it one of the bits as an integer.
        bits = T.Cast(typed("uint32", lanes), T.reinterpret(typed("uint16", lanes), value))
        return T.reinterpret(typed("float32", lanes), T.shift_left(bits, spread(T.uint32(16), lanes)))
    return T.Cast(typed("float32", lanes), value)


def _half_by_bits(value: Any, lanes: int) -> Any:
    """fp16 to fp32 by integers, exact for finite numbers: without F16C, LLVM would call a library function."""
    from tvm.script.ir_builder import tirx as T

    whole, real = typed("uint32", lanes), typed("float32", lanes)
    bits = T.Cast(whole, T.reinterpret(typed("uint16", lanes), value))
    sign = T.shift_left(T.bitwise_and(bits, spread(T.uint32(0x8000), lanes)), spread(T.uint32(16), lanes))
    magnitude = T.shift_left(T.bitwise_and(bits, spread(T.uint32(0x7FFF), lanes)), spread(T.uint32(13), lanes))
    # The exponents' biases differ by 112; the product also normalises subnormal numbers.
    scaled = T.reinterpret(real, magnitude) * spread(2.0**112, lanes)
    return T.reinterpret(real, T.bitwise_or(T.reinterpret(whole, scaled), sign))


def exp(x: Any, lanes: int) -> Any:
    """e^x with relative error 2e-7; x is bounded by LOWEST_EXPONENT and HIGHEST_EXPONENT first."""
    from tvm.script.ir_builder import tirx as T

    def same(value: float) -> Any:
        return spread(value, lanes)

    integer, real = typed("int32", lanes), typed("float32", lanes)
    bounded = bind(T.min(T.max(x, same(LOWEST_EXPONENT)), same(HIGHEST_EXPONENT)))
    # Positive, so that cutting off the fraction rounds to nearest: 127 is the bias of fp32's exponents.
    exponent = bind(T.Cast(integer, bounded * same(_LOG2_E) + same(127.5)))
    whole = bind(T.Cast(real, exponent) - same(127.0))
    rest = bind((bounded - whole * same(_LN2_HIGH)) - whole * same(_LN2_LOW))
    polynomial = same(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        polynomial = polynomial * rest + same(coefficient)
    return polynomial * T.reinterpret(real, T.shift_left(exponent, spread(T.int32(23), lanes)))


def fold_lanes(buffer: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """One number from a local vector of `lanes` (a power of two), which is overwritten: its sum, or its largest."""
    width = lanes
    while width > 1:
        width //= 2
        store(buffer, combine(load(buffer, [0], width), load(buffer, [width], width)), [0], width)
    return buffer[0]


def spans(length: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, lanes) of what whole `width`s leave over of `length`: powers of two, widest first."""
    return spans_between(length - length % width, length)


def spans_between(start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, lanes) from `start` to `end`: powers of two, widest first."""
    while start < end:
        lanes = 1 << ((end - start).bit_length() - 1)
        yield start, lanes
        start += lanes


def each_span(length: int, width: int, body: Callable[[Any, int], None]) -> None:
    """`body(start, lanes)` over `length` numbers: a loop over whole `width`s, then the rest in narrower vectors."""
    from tvm.script.ir_builder import tirx as T

    if length >= width:
        with T.serial(0, length // width) as step:
            body(step * width, width)
    for start, lanes in spans(length, width):
        body(start, lanes)


def each_span_of(length: Any, width: int, body: Callable[[Any, int], None]) -> None:
    """As `each_span` for a symbolic `length`; the rest is done one by one."""
    from tvm.script.ir_builder import tirx as T

    with T.serial(0, length // width) as step:
        body(step * width, width)
    with T.serial(0, length % width) as rest:
        body(length // width * width + rest, 1)


def each_row(rows: Any, row_size: Any, body: Callable[[Any], None]) -> None:
    """`body(row)` for each of `rows` rows of `row_size` numbers; on all threads if that is much work."""
    from tvm.script.ir_builder import tirx as T

    with T.If(rows * row_size < SMALL_WORK):
        with T.Then(), T.serial(0, rows) as row:
            body(row)
        with T.Else(), T.parallel(0, rows) as row:
            body(row)
