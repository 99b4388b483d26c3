"""What a converter works with: the values lowered so far, the symbols of lengths, the parameters that weights become.

A value is a Relax tensor, or small integers known as arithmetic over lengths (`numbers`), or a constant, or a weight;
it turns from the one into the other when somebody asks. Floating tensors are fp32 whatever the graph says: rounding
between operators is left out, weights and caches keep their dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.lazy_weight import expression_of, small_constant
from passopt.targets.tvm.compiled_folder import Quantized
from passopt.targets.tvm.compiler.kernels.computed_rows import ComputedRows, rows_kernel
from passopt.targets.tvm.machines import Machine

#: A Relax or TIR object; tvm carries no types.
Tvm: TypeAlias = Any
#: An integer, or arithmetic over the symbols of lengths.
Length: TypeAlias = Any

_NAMES = {
    DataType.FLOAT: "float32",
    DataType.FLOAT16: "float32",
    DataType.BFLOAT16: "float32",
    DataType.DOUBLE: "float64",
    DataType.INT64: "int64",
    DataType.INT32: "int32",
    DataType.INT8: "int8",
    DataType.UINT8: "uint8",
    DataType.BOOL: "bool",
}
_STORED = {**_NAMES, DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


class Unsupported(Exception):
    """A node that has no lowering: what is wrong with it, in words that follow "node 'x' (Op): "."""


class Delegated(Exception):
    """A node that TVM's own importer lowers as well as we would, and why."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """An int64 scalar (`scalar`) or vector whose elements are known as arithmetic over lengths."""

    items: tuple[Length, ...]
    scalar: bool


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight as the library takes it: laid out by `expression`, given to `variable`."""

    name: str
    expression: Expression
    variable: Tvm


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """Keys and values of one layer as they lie in memory, with room for more positions than are filled."""

    key: Tvm
    value: Tvm
    dtype: str


@dataclasses.dataclass(frozen=True)
class Cache:
    """The slots by the graph input that holds the keys so far; `past` counts the filled positions."""

    slots: dict[onnx_ir.Value, CacheSlot]
    past: Tvm


@dataclasses.dataclass(frozen=True)
class RowsToCome:
    """The rows [count, kernel.width] of `value`, not computed yet: who reads them chooses where they go."""

    value: onnx_ir.Value
    kernel: ComputedRows
    arguments: tuple[Tvm, ...]
    count: Length


def product(lengths: Sequence[Length]) -> Length:
    total: Length = 1
    for length in lengths:
        total = total * length
    return total


def dtype_name(dtype: DataType) -> str:
    """Relax's name of the dtype that values have in the library. Raises Unsupported."""
    if dtype not in _NAMES:
        raise Unsupported(f"dtype {dtype.name} has no lowering")
    return _NAMES[dtype]


def stored_name(dtype: DataType) -> str:
    """Relax's name of the dtype that weights, inputs and caches lie in. Raises Unsupported."""
    if dtype not in _STORED:
        raise Unsupported(f"dtype {dtype.name} has no lowering")
    return _STORED[dtype]


class Values:
    """The state of one lowering; converters take it as `at`."""

    def __init__(self, builder: Tvm, machine: Machine, per_rank: frozenset[str] = frozenset()) -> None:
        from tvm.sym import Analyzer

        self.builder = builder
        self.machine = machine
        self._per_rank = per_rank
        self.symbols: dict[str, Tvm] = {}
        self.parameters: dict[str, Parameter] = {}
        self.notes: dict[str, int] = {}
        #: What the linears that were lowered have in int8.
        self.quantized: set[Quantized] = set()
        self.analyzer = Analyzer()
        self._tensors: dict[onnx_ir.Value, Tvm] = {}
        self._numbers: dict[onnx_ir.Value, Numbers] = {}
        self._viewed: dict[Tvm, Tvm] = {}
        self._made: dict[tuple[object, ...], Tvm] = {}
        self._deferred: dict[onnx_ir.Value, Callable[[], Tvm]] = {}
        self._functions: dict[str, Tvm] = {}
        self._heads: dict[onnx_ir.Value, Tvm] = {}
        #: Sequences of tensors, as some exports split into.
        self.sequences: dict[onnx_ir.Value, list[Tvm]] = {}
        self._rows: dict[onnx_ir.Value, RowsToCome] = {}
        self._stated: dict[onnx_ir.Value, list[Length]] = {}
        #: How the cache is kept; set by whoever lowers a graph with one.
        self.cache: Cache | None = None

    # Lengths.

    def symbol(self, name: str) -> Tvm:
        """The variable of a length, such as `batch`; a name like `past+seq` is the sum of its parts."""
        from tvm import tirx

        if "+" in name:
            total: Tvm = 0
            for part in name.split("+"):
                total = total + self.symbol(part.strip())
            return total
        if name.isdigit():
            return tirx.IntImm("int64", int(name))
        return self.symbols.setdefault(name, tirx.Var(name, "int64"))

    def simplified(self, length: Length) -> Length:
        """An int where it is one."""
        if isinstance(length, int):
            return length
        found = self.analyzer.simplify(length)
        return int(found.value) if type(found).__name__ == "IntImm" else found

    def equal(self, first: Length, second: Length) -> bool:
        return bool(self.analyzer.can_prove_equal(first, second))

    def same_lengths(self, first: Sequence[Length], second: Sequence[Length]) -> bool:
        return len(first) == len(second) and all(map(self.equal, first, second))

    # Reading.

    def shape(self, value: onnx_ir.Value | None) -> list[Length]:
        if value is not None and value in self._stated:
            return self._stated[value]
        return self.shape_of(self.tensor(value))

    def state_shape(self, value: onnx_ir.Value, dims: Sequence[Length]) -> None:
        """The shape of a value that has no tensor, such as a cache that is kept in place."""
        self._stated[value] = [self.simplified(dim) for dim in dims]

    def shape_of(self, tensor: Tvm) -> list[Length]:
        return [self.simplified(dim) for dim in tensor.ty.shape.values]

    def _small(self, value: onnx_ir.Value) -> np.ndarray[Any, Any] | None:
        return None if value.name in self._per_rank else small_constant(value)

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
        """A small constant, also one that arithmetic over lengths came down to."""
        if value is None:
            return None
        array = self._small(value)
        if array is not None:
            return array
        numbers = self._numbers.get(value)
        if numbers is None or not all(isinstance(item, int) for item in numbers.items):
            return None
        return np.array(numbers.items[0] if numbers.scalar else numbers.items, np.int64)

    def numbers(self, value: onnx_ir.Value | None) -> Numbers | None:
        """The elements of a small int64 (or bool) value, if they are known."""
        if value is None:
            return None
        if value not in self._numbers:
            array = self._small(value)
            if array is None or array.dtype.kind not in "iub" or array.ndim > 1 or array.size > 16:
                return None
            items = tuple(item.item() for item in array.reshape(-1))
            self._numbers[value] = Numbers(items, array.ndim == 0)
        return self._numbers[value]

    def integers(self, value: onnx_ir.Value | None, what: str) -> tuple[Length, ...]:
        found = self.numbers(value)
        if found is None:
            raise Unsupported(f"{what} is computed from data, not from lengths")
        return found.items

    def tensor(self, value: onnx_ir.Value | None) -> Tvm:
        """The Relax tensor of a value, made when first asked for. Raises Unsupported."""
        if value is None:
            raise Unsupported("an input is missing")
        if value not in self._tensors:
            self._tensors[value] = self._make(value)
        return self._tensors[value]

    def _make(self, value: onnx_ir.Value) -> Tvm:
        deferred = self._deferred.pop(value, None)
        if deferred is not None:
            return deferred()
        numbers = self._numbers.get(value)
        if numbers is not None:
            return self.spelled(numbers)
        array = self._small(value)
        if array is not None:
            return self.literal(array)
        expression = expression_of(value)
        if expression is None:
            raise Unsupported(f"{value.name!r} was not lowered")
        return self.widened(self.parameter(str(value.name), expression))

    def spelled(self, numbers: Numbers) -> Tvm:
        """Arithmetic over lengths as a tensor."""
        from tvm import relax

        if all(isinstance(item, (int, bool)) for item in numbers.items):
            kind = np.bool_ if numbers.items and isinstance(numbers.items[0], bool) else np.int64
            return self.literal(np.array(numbers.items[0] if numbers.scalar else numbers.items, kind))
        found = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr(list(numbers.items))))
        return self.emit(relax.op.reshape(found, [])) if numbers.scalar else found

    def stored(self, value: onnx_ir.Value | None) -> Tvm:
        """A weight as the variable of its parameter, in its own dtype; anything else as its tensor."""
        if value is None or value in self._tensors or self._small(value) is not None:
            return self.tensor(value)
        expression = expression_of(value)
        return self.tensor(value) if expression is None else self.parameter(str(value.name), expression)

    # [b, h, s, d] by way of [b, s, h, d], the order in which kernels of heads work.

    def set_heads(self, value: onnx_ir.Value, tensor: Tvm) -> None:
        """`tensor` is [b, s, h, d]; the value, [b, h, s, d], is made only for readers that insist on it."""
        from tvm import relax

        self._heads[value] = tensor if _is_variable(tensor) else self.emit(tensor)
        self.defer(value, lambda: self.emit(relax.op.permute_dims(self._heads[value], [0, 2, 1, 3])))

    def heads(self, value: onnx_ir.Value | None) -> Tvm:
        """A value [b, h, s, d] as [b, s, h, d]."""
        from tvm import relax

        if value is None:
            raise Unsupported("an input is missing")
        if value not in self._heads:
            self._heads[value] = self.emit(relax.op.permute_dims(self.tensor(value), [0, 2, 1, 3]))
        return self._heads[value]

    def has_heads(self, value: onnx_ir.Value) -> bool:
        return value in self._heads

    # Writing.

    def emit(self, expression: Tvm) -> Tvm:
        return self.builder.emit(expression)

    def view(self, tensor: Tvm, dims: Sequence[Length]) -> Tvm:
        """The tensor in another shape: never a copy, and a view of a view is one of the tensor behind it."""
        from tvm import relax

        base = self._viewed.get(tensor, tensor)
        now = self.shape_of(base)
        if self.same_lengths(now, dims):
            return base
        shape = tuple(self.simplified(dim) for dim in dims)
        found = self.once(("view", base, str(shape)), lambda: self.emit(relax.op.reshape(base, list(shape))))
        self._viewed[found] = base
        return found

    def once(self, key: tuple[object, ...], make: Callable[[], Tvm]) -> Tvm:
        """The result of `make`, shared by all that ask with the same key, such as layers that share a mask."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def set(self, value: onnx_ir.Value, tensor: Tvm) -> None:
        self._tensors[value] = tensor if _is_variable(tensor) else self.emit(tensor)

    def set_numbers(self, value: onnx_ir.Value, items: Sequence[Length], *, scalar: bool) -> None:
        self._numbers[value] = Numbers(
            tuple(item if isinstance(item, bool) else self.simplified(item) for item in items), scalar
        )

    def defer(self, value: onnx_ir.Value, make: Callable[[], Tvm]) -> None:
        """`make` when somebody asks for the value: most have a reader that knows a better way."""
        self._deferred[value] = make

    def set_rows(self, rows: RowsToCome, dims: Sequence[Length]) -> None:
        """The rows' value has shape `dims`; they go to memory for a reader that asks for its tensor."""

        def make() -> Tvm:
            kernel, shape = rows.kernel, [rows.count, rows.kernel.width]
            self.note(f"rows: {kernel.name}")
            return self.view(self.call(kernel.name, lambda: rows_kernel(kernel), rows.arguments, shape), dims)

        self._rows[rows.value] = rows
        self.state_shape(rows.value, dims)
        self.defer(rows.value, make)

    def pass_on(self, source: onnx_ir.Value | None, result: onnx_ir.Value) -> None:
        """`result` is `source` under another name, so also the rows that it may be."""
        rows = self.rows_to_come(source)
        if rows is None:
            self.set(result, self.tensor(source))
            return
        self._rows[result] = rows
        self.state_shape(result, self.shape(source))
        self.defer(result, lambda: self.tensor(source))

    def rows_to_come(self, value: onnx_ir.Value | None) -> RowsToCome | None:
        """The rows that the value is, if it is rows of a kernel and nobody has asked for its tensor."""
        return self._rows.get(value) if value is not None and value in self._deferred else None

    def literal(self, array: np.ndarray[Any, Any]) -> Tvm:
        """A small constant inside the library; floats in fp32."""
        from tvm import relax

        wide = array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.itemsize == 2 else array
        return relax.const(np.ascontiguousarray(wide) if wide.ndim else wide, str(wide.dtype))

    def parameter(self, name: str, expression: Expression) -> Tvm:
        """The variable of a weight in its stored dtype. The same name always means the same expression."""
        from tvm import relax

        known = self.parameters.get(name)
        if known is not None:
            if known.expression != expression:
                raise ModelError(f"weight {name!r} would mean two things; rename one of them")
            return known.variable
        variable = relax.Var(name.replace(".", "_"), relax.TensorType(expression.shape, stored_name(expression.dtype)))
        self.parameters[name] = Parameter(name, expression, variable)
        return variable

    def widened(self, tensor: Tvm) -> Tvm:
        """fp16 and bf16 as fp32, everything else as it is."""
        from tvm import relax

        if str(tensor.ty.dtype) not in {"float16", "bfloat16"}:
            return tensor
        return self.emit(relax.op.astype(tensor, "float32"))

    def call(self, name: str, make: Callable[[], Tvm], arguments: Sequence[Tvm], shape: Sequence[Length]) -> Tvm:
        """Call a kernel, built once per name; gives fp32 of `shape`."""
        from tvm import relax

        return self.call_typed(name, make, arguments, relax.TensorType(list(shape), "float32"))

    def call_typed(self, name: str, make: Callable[[], Tvm], arguments: Sequence[Tvm], types: Tvm) -> Tvm:
        from tvm import relax

        return self.emit(relax.call_tir(self.function(name, make), list(arguments), out_ty=types))

    def function(self, name: str, make: Callable[[], Tvm]) -> Tvm:
        if name not in self._functions:
            self._functions[name] = self.builder.add_func(make(), name)
        return self._functions[name]

    def note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def _is_variable(tensor: Tvm) -> bool:
    return type(tensor).__name__ in {"Var", "DataflowVar", "Constant"}
