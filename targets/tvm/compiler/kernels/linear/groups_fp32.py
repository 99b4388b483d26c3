"""Emit linear layers with weights of 4 bits in groups of inputs, and fp32 activations.

With few rows, memory is the limit, so weights are read once as they lie, two codes a byte. As for int8 weights, a row
of x becomes one scale times integers within ±LIMIT, of three bytes each; here the bytes are signed digits, since the
codes are the unsigned side of the dot products. The sums of a group are exact in int32; their zero point times the sum
of the digits is taken off before they are joined, times the scale of the group, in fp32.

With many rows, the weights of a chunk are dequantised once for all rows, which then multiply in fp32.

Of every eight inputs, the codes of the first four lie in the low bits of the four bytes of an output, those of the
last four in the high bits. So one mask and one shift give the operands of two dot products, and in a word of four
bytes each lane has all eight codes of an output.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.groups import FOUR_BITS, MIDDLE, nibbles, unsigned
from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.linear.byte_linear import Outputs
from passopt.targets.tvm.compiler.kernels.linear.float_panels import PARALLEL_WEIGHTS, PanelLinear
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.linear.panel_layout import Panels
from passopt.targets.tvm.compiler.kernels.linear.prefetch import NextPanel
from passopt.targets.tvm.compiler.kernels.quantize_rows import ROUNDING, ROUNDING_BITS, absmax_bits
from passopt.targets.tvm.machines import Isa

#: For each plane of digits, how many bits lie below its byte, the highest first.
SHIFTS = (16, 8, 0)
#: With this added to an integer, the bytes of the sum are its digits with 128 added to each.
_DIGIT_ZEROS = 0x808080
LIMIT = (1 << 22) - 1
#: The smallest scale of a row, as for int8 weights.
_SMALLEST = 2.0**-126
#: Inputs whose products fit int16 on AVX2, where 8 pairs of a code up to 15 and a digit down to -128 are added.
RUN = 32
#: Codes in a word of a byte per output: the inputs of a step.
_STEP = 8
_SCALE_DTYPES = {DataType.FLOAT: "float32", DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


def refusal(codes: Expression, scales: Expression, zeros: Expression | None, isa: Isa) -> str:
    """Return why there is no kernel for codes [N, K], scales and zero points [N, groups]; "" if there is one."""
    if isa.name not in {"avx512-vnni", "avx2"}:
        return (
            f"weights of 4 bits have kernels for avx512-vnni and avx2, not for {isa.name}: quantise to int8 there, or "
            f"run the model in onnxruntime"
        )
    group = codes.shape[1] // scales.shape[1]
    if group % RUN:
        return f"weights of 4 bits have kernels for groups of a multiple of {RUN} inputs, not {group}: quantise so"
    if zeros is None and codes.dtype == DataType.UINT4:
        return "codes in uint4 without zero points, which no weight has that is stored symmetrically"
    return "" if scales.dtype in _SCALE_DTYPES else f"scales of {scales.dtype.name}: cast the model to fp32 or fp16"


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes of a linear: N outputs, K inputs, inputs per group; whether zero points differ; the dtype of scales."""

    n: int
    k: int
    group: int
    has_zeros: bool
    scales: str
    isa: Isa

    @property
    def panels(self) -> Panels:
        return Panels.of(self.n, self.k, "uint8", self.isa)

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def few_rows(self) -> int:
        """Return up to how many rows the codes are multiplied as they lie."""
        return 20 if self.isa.has_byte_dot else 8


def groups_kernel(codes: Expression, scales: Expression, zeros: Expression | None, isa: Isa) -> LinearKernel:
    """Return the kernel for y = x · ((codes - zeros) · scales)ᵀ with codes of 4 bits [N, K].

    Its function takes (x f32[M, K], *weights, [residual f32[M, N],] y f32[M, N]).

    Args:
        codes: The codes.
        scales: The scales [N, groups].
        zeros: The zero points [N, groups]; None for zeros.
        isa: The instruction level.

    Raises:
        ModelError: If there is no such kernel (`refusal` says why), or the shapes do not fit.
    """
    n, k = codes.shape
    if codes.dtype not in FOUR_BITS or scales.shape[0] != n or k % scales.shape[1]:
        raise ModelError(f"codes {codes.dtype.name}{list(codes.shape)} do not fit scales {list(scales.shape)}")
    if reason := refusal(codes, scales, zeros, isa):
        raise ModelError(reason)
    has_zeros = zeros is not None
    shape = _Shape(n, k, k // scales.shape[1], has_zeros, _SCALE_DTYPES[scales.dtype], isa)
    width = shape.panels.width
    weights = [
        ("packed", nibbles(unsigned(codes), _STEP // 2).pack(width, _STEP // 2)),
        ("scales", scales.pack(width, 1)),
    ]
    if zeros is not None:
        weights.append(("zeros", unsigned(zeros).pack(width, 1)))
    suffix = "" if shape.scales == "float32" else f"_{shape.scales}"
    name = f"linear_int4_{n}_{k}_g{shape.group}{'_zeros' if has_zeros else ''}{suffix}"
    return LinearKernel(name, tuple(weights), partial(linear_groups, shape), "groups")


def linear_groups(shape: _Shape, residual: bool = False) -> Any:
    """Return the PrimFunc that `groups_kernel` describes."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    panels = shape.panels
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        rows = emit.symbol("rows")
        x = emit.argument("x", (rows, shape.k))
        packed = emit.argument("packed", (panels.count, shape.k // _STEP, panels.width, _STEP // 2), "uint8")
        parts = (panels.count, shape.groups, panels.width, 1)
        scales = emit.argument("scales", parts, shape.scales)
        zeros = emit.argument("zeros", parts, "uint8") if shape.has_zeros else None
        before = emit.argument("residual", (rows, shape.n)) if residual else None
        y = emit.argument("y", (rows, shape.n))
        with emit.root_block():
            weights = _Weights(shape, packed, scales, zeros)
            with T.If(rows <= shape.few_rows):
                with T.Then():
                    _FewRows(shape, rows, x, weights, y, before).emit()
                with T.Else():
                    _ManyRows(shape, rows, x, weights, y, before).many_rows()
    return builder.get()


class _Weights:
    """The weights of a linear, as flat buffers in the order of memory."""

    def __init__(self, shape: _Shape, packed: Any, scales: Any, zeros: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        self.shape = shape
        count, width = shape.panels.count, shape.panels.width
        self.width = width
        bytes_of_codes = count * shape.k * width // 2
        self.bytes = T.decl_buffer((bytes_of_codes,), "uint8", data=packed.data)
        self.words = T.decl_buffer((bytes_of_codes // 4,), "int32", data=packed.data)
        parts = count * shape.groups * width
        self._scales = T.decl_buffer((parts,), shape.scales, data=scales.data)
        self._zeros = None if zeros is None else T.decl_buffer((parts,), "uint8", data=zeros.data)

    def step_start(self, panel: Any, step: Any) -> Any:
        """Return the byte at which a step of a panel starts."""
        return (panel * (self.shape.k // _STEP) + step) * (self.width * _STEP // 2)

    def scale(self, panel: Any, group: Any, column: int) -> Any:
        """Return the scales of a vector of outputs in fp32."""
        lanes = self.shape.isa.lanes
        start = (panel * self.shape.groups + group) * self.width + column
        return emit.load_float32(self._scales, [start], lanes, self.shape.isa)

    def zero(self, panel: Any, group: Any, column: int) -> Any:
        """Return the zero points of a vector of outputs as int32."""
        from tvm.script.ir_builder import tirx as T

        lanes = self.shape.isa.lanes
        if self._zeros is None:
            return emit.spread(T.int32(MIDDLE), lanes)
        start = (panel * self.shape.groups + group) * self.width + column
        return emit.load(self._zeros, [start], lanes).astype(emit.typed("int32", lanes))


@dataclasses.dataclass(frozen=True)
class _FewRows:
    """Emit the code for few rows: digits of x times codes as they lie, and one output row after the other per panel."""

    shape: _Shape
    rows: Any
    x: Any
    weights: _Weights
    y: Any
    residual: Any

    def emit(self) -> None:
        from tvm.script.ir_builder import tirx as T

        shape, planes = self.shape, len(SHIFTS)
        digits = T.alloc_buffer((self.rows * planes, shape.k), "int8", scope="global")
        sums = T.alloc_buffer((self.rows * planes, shape.groups), "int32", scope="global")
        row_scales = T.alloc_buffer((self.rows,), "float32", scope="global")
        with T.serial(0, self.rows) as row:
            _split_row(self.x, digits, sums, row_scales, shape, row)
        scaled = partial(_scaled, row_scales)
        outputs = Outputs(shape.n, self.y, self.residual, scaled)
        count = T.int64(shape.panels.count)
        small = shape.n * shape.k < PARALLEL_WEIGHTS
        with T.serial(0, count) if small else T.parallel(0, count) as panel, T.serial(0, self.rows) as row:
            outputs.store(row, panel, [self._row(digits, sums, row, panel)], shape.isa.lanes)

    def _row(self, digits: Any, sums: Any, row: Any, panel: Any) -> list[Any]:
        """Emit the sums of one row with a panel, and return them as fp32 vectors."""
        from tvm.script.ir_builder import tirx as T

        shape, lanes, planes = self.shape, self.shape.isa.lanes, range(len(SHIFTS))
        vectors = range(shape.panels.vectors)
        totals = [emit.local(lanes) for _ in vectors]
        for total in totals:
            emit.store(total, emit.spread(T.float32(0), lanes), [0], lanes)
        with T.serial(0, shape.groups) as group:
            tile = [[emit.local(lanes, dtype="int32") for _ in vectors] for _ in planes]
            self._take_zeros_off(tile, sums, row, panel, group)
            with T.serial(0, shape.group // RUN) as run:
                self._add_run(tile, digits, row, panel, group * (shape.group // RUN) + run)
            for vector, total in enumerate(totals):
                joined = _joined([emit.load(tile[plane][vector], [0], lanes) for plane in planes], lanes)
                scale = self.weights.scale(panel, group, vector * lanes)
                emit.store(total, emit.load(total, [0], lanes) + joined * scale, [0], lanes)
        return [emit.load(total, [0], lanes) for total in totals]

    def _take_zeros_off(self, tile: list[list[Any]], sums: Any, row: Any, panel: Any, group: Any) -> None:
        """Start the int32 sums [planes][vectors] of a group with its zero points times the sums of the digits."""
        from tvm.script.ir_builder import tirx as T

        lanes = self.shape.isa.lanes
        taken = [emit.bind(-sums[row * len(SHIFTS) + plane, group]) for plane in range(len(SHIFTS))]
        if not self.shape.has_zeros:  # One number for all outputs is cheaper than a product of vectors for each.
            same = [emit.bind(emit.spread(number * T.int32(MIDDLE), lanes)) for number in taken]
        for vector in range(self.shape.panels.vectors):
            zero = emit.bind(self.weights.zero(panel, group, vector * lanes)) if self.shape.has_zeros else None
            for plane, number in enumerate(taken):
                start = same[plane] if zero is None else emit.spread(number, lanes) * zero
                emit.store(tile[plane][vector], start, [0], lanes)

    def _add_run(self, tile: list[list[Any]], digits: Any, row: Any, panel: Any, run: Any) -> None:
        """Add the products of RUN inputs to the int32 sums [planes][vectors]."""
        shape, lanes = self.shape, self.shape.isa.lanes
        width = lanes * 4
        steps = RUN // _STEP
        first = emit.bind(self.weights.step_start(panel, run * steps))
        emit.prefetch_ahead(self.weights.bytes, first, shape.panels.width * RUN // 2, 1)
        sums = _Sums.of(tile, shape.isa)
        for step in range(steps):
            at = run * RUN + step * _STEP
            words = [
                [self._digits(digits, row * len(SHIFTS) + plane, at + half * (_STEP // 2)) for half in (0, 1)]
                for plane in range(len(SHIFTS))
            ]
            for vector in range(shape.panels.vectors):
                start = first + (step * shape.panels.width + vector * lanes) * (_STEP // 2)
                both = emit.bind(emit.load(self.weights.bytes, [start], width))
                for half, codes in enumerate(_halves(both, width)):
                    for plane in range(len(SHIFTS)):
                        sums.add(plane, vector, codes, words[plane][half])
        sums.finish()

    def _digits(self, digits: Any, row: Any, start: Any) -> Any:
        """Return four digits of a plane, repeated in all lanes."""
        from tvm.script.ir_builder import tirx as T

        lanes = self.shape.isa.lanes
        word = T.reinterpret("int32", emit.load(digits, [row, start], 4))
        return emit.bind(T.reinterpret(emit.typed("int8", lanes * 4), T.broadcast(word, lanes)))


def _halves(both: Any, width: int) -> tuple[Any, Any]:
    """Return the codes in the low and those in the high bits of bytes."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    mask, four = (T.broadcast(tirx.const(number, "uint8"), width) for number in (15, 4))
    return emit.bind(both & mask), emit.bind(T.shift_right(both, four))


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Adds dot products of four codes and four digits to int32 sums; `narrow` are int16 sums of pairs on AVX2."""

    tile: list[list[Any]]
    lanes: int
    narrow: list[list[Any]] | None = None

    @classmethod
    def of(cls, tile: list[list[Any]], isa: Isa) -> _Sums:
        from tvm.script.ir_builder import tirx as T

        if isa.has_byte_dot:
            return cls(tile, isa.lanes)
        pairs = 2 * isa.lanes
        narrow = [[emit.local(pairs, dtype="int16") for _ in vectors] for vectors in tile]
        for sums in (item for vectors in narrow for item in vectors):
            emit.store(sums, T.broadcast(T.int16(0), pairs), [0], pairs)
        return cls(tile, isa.lanes, narrow)

    def add(self, plane: int, vector: int, codes: Any, digits: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        if self.narrow is None:
            into, lanes = self.tile[plane][vector], self.lanes
            name = "llvm.x86.avx512.vpdpbusd.512"
            value = T.call_llvm_pure_intrin("int32x16", name, emit.load(into, [0], lanes), codes, digits)
        else:
            into, lanes = self.narrow[plane][vector], 2 * self.lanes
            products = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, digits)
            value = emit.load(into, [0], lanes) + products
        emit.store(into, value, [0], lanes)

    def finish(self) -> None:
        from tvm.script.ir_builder import tirx as T

        if self.narrow is None:
            return
        lanes, ones = self.lanes, T.broadcast(T.int16(1), 2 * self.lanes)
        for plane, vectors in enumerate(self.narrow):
            for vector, sums in enumerate(vectors):
                into, pairs = self.tile[plane][vector], emit.load(sums, [0], 2 * lanes)
                wide = T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ones)
                emit.store(into, emit.load(into, [0], lanes) + wide, [0], lanes)


def _split_row(x: Any, digits: Any, sums: Any, scales: Any, shape: _Shape, row: Any) -> None:
    """Emit the split of a row of x into planes of digits, their sums by group, and the scale of the row."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    lanes, planes = shape.isa.lanes, len(SHIFTS)

    def load(start: Any, count: int) -> Any:
        return emit.load(x, [row, start], count)

    absmax = emit.bind(T.reinterpret("float32", absmax_bits(load, shape.k, lanes)))
    quotient, smallest = emit.bind(absmax / T.float32(LIMIT)), T.float32(_SMALLEST)
    scale = emit.bind(tirx.Select(quotient < smallest, smallest, quotient))
    T.buffer_store(scales, scale, [row])

    def number(value: int) -> Any:
        return emit.spread(T.int32(value), lanes)

    with T.serial(0, shape.groups) as group:
        held = [emit.local(lanes, dtype="int32") for _ in range(planes)]
        for total in held:
            emit.store(total, number(0), [0], lanes)
        with T.serial(0, shape.group // lanes) as part:
            start = emit.bind(group * shape.group + part * lanes)
            limit, rounding = (emit.spread(float(value), lanes) for value in (LIMIT, ROUNDING))
            clipped = T.max(T.min(load(start, lanes) / emit.spread(scale, lanes), limit), -limit)
            # The second addition is one of integers, so that no simplification of floating-point code cancels the two.
            integer = T.reinterpret(emit.typed("int32", lanes), clipped + rounding)
            shifted = emit.bind(integer + number(_DIGIT_ZEROS - ROUNDING_BITS))
            for plane, shift in enumerate(SHIFTS):
                digit = emit.bind((T.shift_right(shifted, number(shift)) & number(255)) - number(128))
                emit.store(digits, digit.astype(emit.typed("int8", lanes)), [row * planes + plane, start], lanes)
                emit.store(held[plane], emit.load(held[plane], [0], lanes) + digit, [0], lanes)
        for plane, total in enumerate(held):
            T.buffer_store(sums, emit.fold_lanes(total, lanes, _plus), [row * planes + plane, group])


def _plus(one: Any, other: Any) -> Any:
    return one + other


def _joined(planes: list[Any], lanes: int) -> Any:
    """Return in fp32 the sums of three planes, joined by place value."""
    from tvm.script.ir_builder import tirx as T

    first, *others = (plane.astype(emit.typed("float32", lanes)) for plane in planes)
    for part in others:
        first = first * emit.spread(T.float32(256), lanes) + part
    return first


def _scaled(row_scales: Any, row: Any, totals: list[Any], _: Any, lanes: int) -> Any:
    return totals[0] * emit.spread(row_scales[row], lanes)


class _ManyRows(PanelLinear):
    """Emit the code for many rows: chunks of weights are dequantised once, and multiplied in fp32."""

    def __init__(self, shape: _Shape, m: Any, x: Any, weights: _Weights, y: Any, residual: Any) -> None:
        self.panels, self.m, self.x, self.y = shape.panels, m, x, y
        self.scales, self.residual = None, residual
        self.shape, self.weights, self.flat = shape, weights, weights.bytes
        self.lanes = shape.isa.lanes
        self.vectors = range(self.panels.vectors)
        self.columns = range(0, self.panels.width, self.lanes)
        self.chunk, self.span = self.panels.chunk, self.panels.blocks_per_span
        self.chunks = -(-self.panels.inputs // self.chunk)

    def _converted(self, place: Any, start: Any, k: Any) -> list[Any]:
        from tvm.script.ir_builder import tirx as T

        lanes, weights, four = self.lanes, self.weights, _STEP // 2
        k = emit.bind(place.chunk * self.chunk + k)
        place_in_word = (k % four) * 8 + (k % _STEP) // four * 4
        shift = emit.bind(emit.spread(place_in_word.astype("int32"), lanes))
        group = emit.bind(k // self.shape.group)
        first = emit.bind((place.panel * (self.shape.k // _STEP) + k // _STEP) * self.panels.width)
        found = []
        for column in self.columns:
            word = emit.load(weights.words, [first + column], lanes)
            code = T.shift_right(word, shift) & emit.spread(T.int32(15), lanes)
            number = (code - weights.zero(place.panel, group, column)).astype(emit.typed("float32", lanes))
            found.append(number * weights.scale(place.panel, group, column))
        return found

    def _following(self, first: Any, panel: Any, chunk: Any, last: Any) -> NextPanel:
        from tvm.script.ir_builder import tirx as T

        more = chunk + 1 < self.chunks
        next_panel = T.if_then_else(T.And(last, more), first, panel + 1)
        next_chunk = T.if_then_else(last, T.if_then_else(more, chunk + 1, 0), chunk)
        at = (next_panel * self.panels.inputs + next_chunk * self.chunk) * self.panels.width // 2
        return NextPanel(self.flat, emit.opaque(at), self._length(chunk), self.panels.width // 2, 1)
