"""What a caller sees of a model: names, order, dtypes and shapes of its inputs and outputs. Passes keep it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.shapes import Dimension, dimensions


@dataclasses.dataclass(frozen=True)
class _Port:
    name: str | None
    dtype: onnx_ir.DataType | None
    dims: tuple[Dimension, ...] | None

    def __str__(self) -> str:
        dims = "" if self.dims is None else f"[{','.join('?' if dim is None else str(dim) for dim in self.dims)}]"
        return f"{self.dtype.name if self.dtype is not None else 'any dtype'}{dims}"

    def allows(self, other: _Port) -> bool:
        """True if `other` says the same, or more where nothing was said."""
        if self.dtype is not None and self.dtype != other.dtype:
            return False
        if self.dims is None:
            return True
        if other.dims is None or len(self.dims) != len(other.dims):
            return False
        return all(mine is None or mine == theirs for mine, theirs in zip(self.dims, other.dims, strict=True))


@dataclasses.dataclass(frozen=True)
class Interface:
    """Inputs and outputs as they stood when `of` was called."""

    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]

    @classmethod
    def of(cls, model: onnx_ir.Model) -> Interface:
        return cls(_ports(model.graph.inputs), _ports(model.graph.outputs))

    def check(self, model: onnx_ir.Model) -> None:
        """Raise VerifyError if the model's interface is another one now."""
        now = Interface.of(model)
        _check("graph input", self.inputs, now.inputs)
        _check("graph output", self.outputs, now.outputs)


def _ports(values: Sequence[onnx_ir.Value]) -> tuple[_Port, ...]:
    found = []
    for value in values:
        dims = dimensions(value)
        found.append(_Port(value.name, value.dtype, None if dims is None else tuple(dims)))
    return tuple(found)


def _check(what: str, before: Sequence[_Port], after: Sequence[_Port]) -> None:
    names, found = [port.name for port in before], [port.name for port in after]
    for name in names:
        if name not in found:
            raise VerifyError(f"{what} {name!r} is gone")
    for name in found:
        if name not in names:
            raise VerifyError(f"{what} {name!r} is new")
    if names != found:
        raise VerifyError(f"{what}s stand in another order: {found}, expected {names}")
    for one, other in zip(before, after, strict=True):
        if not one.allows(other):
            raise VerifyError(f"{what} {one.name!r} was {one} and became {other}")
