"""Hold the state that converters work with: the values lowered so far, the symbols of lengths, the parameters.

A value is a Relax tensor, small integers known as arithmetic over lengths (`numbers`), a constant, or a weight, which
becomes a parameter. It is turned into another of these forms when a converter asks for it. Float tensors are fp32
whatever the graph says, so rounding between operators is left out; only weights and caches keep their dtype.
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
#: An integer, or an expression of arithmetic over the symbols of lengths.
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
    """Raised for a node that has no lowering; the message says why, in words that follow "node 'x' (Op): "."""


class Delegated(Exception):
    """Raised for a node that is left to TVM's own importer, which lowers it as well; the message says why."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """An int64 scalar (if `scalar`) or vector whose elements are known as arithmetic over lengths."""

    items: tuple[Length, ...]
    scalar: bool


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight that the library takes as an argument: `expression` lays it out, `variable` stands for it in Relax."""

    name: str
    expression: Expression
    variable: Tvm


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """The keys and values of one layer as they lie in memory, with room for more positions than are filled.

    `scales` are those of keys and of values if these are codes, and empty otherwise.
    """

    key: Tvm
    value: Tvm
    dtype: str
    scales: tuple[Tvm, ...] = ()

    @property
    def tensors(self) -> tuple[Tvm, ...]:
        """Return all that a function takes for the cache of this layer, in order."""
        return self.key, self.value, *self.scales


@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of all layers: `slots` by the past keys that an attention reads, and `past`, the filled positions."""

    slots: dict[onnx_ir.Value, CacheSlot]
    past: Tvm


@dataclasses.dataclass(frozen=True)
class RowsToCome:
    """The rows f32[count, kernel.width] of `value`, not computed yet: their reader chooses where they go."""

    value: onnx_ir.Value
    kernel: ComputedRows
    arguments: tuple[Tvm, ...]
    count: Length


def product(lengths: Sequence[Length]) -> Length:
    """Return the product of lengths; 1 if there are none."""
    total: Length = 1
    for length in lengths:
        total = total * length
    return total


def dtype_name(dtype: DataType) -> str:
    """Return Relax's name of the dtype that values have in the library; raise Unsupported if there is none."""
    if dtype not in _NAMES:
        raise Unsupported(f"dtype {dtype.name} has no lowering")
    return _NAMES[dtype]


def stored_name(dtype: DataType) -> str:
    """Return Relax's name of the dtype that weights, inputs and caches have; raise Unsupported if there is none."""
    if dtype not in _STORED:
        raise Unsupported(f"dtype {dtype.name} has no lowering")
    return _STORED[dtype]


class Values:
    """The state of one lowering, which converters take as `at`."""

    def __init__(self, builder: Tvm, machine: Machine, per_rank: frozenset[str] = frozenset()) -> None:
        from tvm.sym import Analyzer

        self.builder = builder
        self.machine = machine
        self._per_rank = per_rank
        self.symbols: dict[str, Tvm] = {}
        self.parameters: dict[str, Parameter] = {}
        self.notes: dict[str, int] = {}
        #: The parts that are int8 in the linears lowered so far.
        self.quantized: set[Quantized] = set()
        self.analyzer = Analyzer()
        self._tensors: dict[onnx_ir.Value, Tvm] = {}
        self._numbers: dict[onnx_ir.Value, Numbers] = {}
        self._viewed: dict[Tvm, Tvm] = {}
        self._made: dict[tuple[object, ...], Tvm] = {}
        self._deferred: dict[onnx_ir.Value, Callable[[], Tvm]] = {}
        self._functions: dict[str, Tvm] = {}
        self._heads: dict[onnx_ir.Value, Tvm] = {}
        #: Sequences of tensors, which some exports make with SplitToSequence.
        self.sequences: dict[onnx_ir.Value, list[Tvm]] = {}
        self._rows: dict[onnx_ir.Value, RowsToCome] = {}
        self._stated: dict[onnx_ir.Value, list[Length]] = {}
        #: The cache in place; None if the graph has none, or if it is not kept in place.
        self.cache: Cache | None = None

    # Lengths.

    def symbol(self, name: str) -> Tvm:
        """Return the variable of a length, such as `batch`; a name like `past+seq` is the sum of its parts."""
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
        """Return a length in its simplest form, as an int if it is constant."""
        if isinstance(length, int):
            return length
        found = self.analyzer.simplify(length)
        return int(found.value) if type(found).__name__ == "IntImm" else found

    def equal(self, first: Length, second: Length) -> bool:
        """Return whether two lengths are provably equal."""
        return bool(self.analyzer.can_prove_equal(first, second))

    def same_lengths(self, first: Sequence[Length], second: Sequence[Length]) -> bool:
        """Return whether two shapes are provably equal."""
        return len(first) == len(second) and all(map(self.equal, first, second))

    # Reading values.

    def shape(self, value: onnx_ir.Value | None) -> list[Length]:
        """Return the shape of a value, without making its tensor if the shape was stated."""
        if value is not None and value in self._stated:
            return self._stated[value]
        return self.shape_of(self.tensor(value))

    def state_shape(self, value: onnx_ir.Value, dims: Sequence[Length]) -> None:
        """Set the shape of a value that has no tensor, such as a cache that is kept in place."""
        self._stated[value] = [self.simplified(dim) for dim in dims]

    def shape_of(self, tensor: Tvm) -> list[Length]:
        """Return the shape of a Relax tensor."""
        return [self.simplified(dim) for dim in tensor.ty.shape.values]

    def _small(self, value: onnx_ir.Value) -> np.ndarray[Any, Any] | None:
        return None if value.name in self._per_rank else small_constant(value)

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
        """Return the array of a small constant, or of lengths that turned out constant; None for anything else."""
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
        """Return the elements of a small integer (or bool) value as lengths, or None if they are not known."""
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
        """Return the elements of a value as lengths; raise Unsupported, naming it `what`, if they are not known."""
        found = self.numbers(value)
        if found is None:
            raise Unsupported(f"{what} is computed from data, not from lengths")
        return found.items

    def tensor(self, value: onnx_ir.Value | None) -> Tvm:
        """Return the Relax tensor of a value, made when first asked for; raise Unsupported if there is none."""
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
        """Return a tensor with elements that are known as arithmetic over lengths."""
        from tvm import relax

        if all(isinstance(item, (int, bool)) for item in numbers.items):
            kind = np.bool_ if numbers.items and isinstance(numbers.items[0], bool) else np.int64
            return self.literal(np.array(numbers.items[0] if numbers.scalar else numbers.items, kind))
        found = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr(list(numbers.items))))
        return self.emit(relax.op.reshape(found, [])) if numbers.scalar else found

    def stored(self, value: onnx_ir.Value | None) -> Tvm:
        """Return a weight as the variable of its parameter, in its stored dtype, and anything else as its tensor."""
        if value is None or value in self._tensors or self._small(value) is not None:
            return self.tensor(value)
        expression = expression_of(value)
        return self.tensor(value) if expression is None else self.parameter(str(value.name), expression)

    # Values [b, h, s, d] are kept as [b, s, h, d], since the kernels that work on heads use that order.

    def set_heads(self, value: onnx_ir.Value, tensor: Tvm) -> None:
        """Set a value [b, h, s, d] from `tensor` [b, s, h, d]; it is transposed only for readers that need it."""
        from tvm import relax

        self._heads[value] = tensor if _is_variable(tensor) else self.emit(tensor)
        self.defer(value, lambda: self.emit(relax.op.permute_dims(self._heads[value], [0, 2, 1, 3])))

    def heads(self, value: onnx_ir.Value | None) -> Tvm:
        """Return a value [b, h, s, d] as a tensor [b, s, h, d]."""
        from tvm import relax

        if value is None:
            raise Unsupported("an input is missing")
        if value not in self._heads:
            self._heads[value] = self.emit(relax.op.permute_dims(self.tensor(value), [0, 2, 1, 3]))
        return self._heads[value]

    def has_heads(self, value: onnx_ir.Value) -> bool:
        """Return whether a value is already there as [b, s, h, d]."""
        return value in self._heads

    # Setting values, and emitting code for them.

    def emit(self, expression: Tvm) -> Tvm:
        """Add a Relax expression to the function that is being built, and return its variable."""
        return self.builder.emit(expression)

    def view(self, tensor: Tvm, dims: Sequence[Length]) -> Tvm:
        """Return the tensor in another shape, never a copy; a view of a view is one of the original tensor."""
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
        """Return the result of `make`, called once per key, such as for all layers that share a mask."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def set(self, value: onnx_ir.Value, tensor: Tvm) -> None:
        """Set the tensor of a value, from a variable or from an expression, which is emitted."""
        self._tensors[value] = tensor if _is_variable(tensor) else self.emit(tensor)

    def set_numbers(self, value: onnx_ir.Value, items: Sequence[Length], *, scalar: bool) -> None:
        """Set the elements of a value as arithmetic over lengths."""
        self._numbers[value] = Numbers(
            tuple(item if isinstance(item, bool) else self.simplified(item) for item in items), scalar
        )

    def defer(self, value: onnx_ir.Value, make: Callable[[], Tvm]) -> None:
        """Make the tensor of a value only when it is asked for, since most readers know a better way."""
        self._deferred[value] = make

    def set_rows(self, rows: RowsToCome, dims: Sequence[Length]) -> None:
        """Set a value of shape `dims` to rows that go to memory only if a reader asks for its tensor."""

        def make() -> Tvm:
            kernel, shape = rows.kernel, [rows.count, rows.kernel.width]
            self.note(f"rows: {kernel.name}")
            return self.view(self.call(kernel.name, lambda: rows_kernel(kernel), rows.arguments, shape), dims)

        self._rows[rows.value] = rows
        self.state_shape(rows.value, dims)
        self.defer(rows.value, make)

    def pass_on(self, source: onnx_ir.Value | None, result: onnx_ir.Value) -> None:
        """Make `result` another name of `source`, including rows that are not computed yet."""
        rows = self.rows_to_come(source)
        if rows is None:
            self.set(result, self.tensor(source))
            return
        self._rows[result] = rows
        self.state_shape(result, self.shape(source))
        self.defer(result, lambda: self.tensor(source))

    def rows_to_come(self, value: onnx_ir.Value | None) -> RowsToCome | None:
        """Return the rows of a value, or None if it has none or its tensor was already asked for."""
        return self._rows.get(value) if value is not None and value in self._deferred else None

    def literal(self, array: np.ndarray[Any, Any]) -> Tvm:
        """Return a small constant inside the library; 16-bit floats become fp32."""
        from tvm import relax

        wide = array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.itemsize == 2 else array
        return relax.const(np.ascontiguousarray(wide) if wide.ndim else wide, str(wide.dtype))

    def parameter(self, name: str, expression: Expression) -> Tvm:
        """Return the variable of a weight in its stored dtype; raise ModelError if the name means another weight."""
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
        """Convert fp16 and bf16 to fp32, and return everything else as it is."""
        from tvm import relax

        if str(tensor.ty.dtype) not in {"float16", "bfloat16"}:
            return tensor
        return self.emit(relax.op.astype(tensor, "float32"))

    def call(self, name: str, make: Callable[[], Tvm], arguments: Sequence[Tvm], shape: Sequence[Length]) -> Tvm:
        """Call the kernel `name`, which `make` builds once per name, and return its result f32 of `shape`."""
        from tvm import relax

        return self.call_typed(name, make, arguments, relax.TensorType(list(shape), "float32"))

    def call_typed(self, name: str, make: Callable[[], Tvm], arguments: Sequence[Tvm], types: Tvm) -> Tvm:
        """Call a kernel as `call` does, with a result of the given Relax types."""
        from tvm import relax

        return self.emit(relax.call_tir(self.function(name, make), list(arguments), out_ty=types))

    def function(self, name: str, make: Callable[[], Tvm]) -> Tvm:
        """Return the kernel `name` in the module, added when first asked for."""
        if name not in self._functions:
            self._functions[name] = self.builder.add_func(make(), name)
        return self._functions[name]

    def note(self, text: str) -> None:
        """Count one more use of a kernel, for the report."""
        self.notes[text] = self.notes.get(text, 0) + 1


def _is_variable(tensor: Tvm) -> bool:
    return type(tensor).__name__ in {"Var", "DataflowVar", "Constant"}
