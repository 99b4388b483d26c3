"""Record what callers see of a model, and check that passes keep it.

That is the names, the order, the dtypes and the shapes of its inputs and outputs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.shapes.dimensions import Dimension, dimensions


@dataclasses.dataclass(frozen=True)
class _Port:
    name: str | None
    dtype: onnx_ir.DataType | None
    dims: tuple[Dimension, ...] | None
    #: Symbols that no input has: an exporter makes one up for a length that it does not know.
    made_up: frozenset[str] = frozenset()

    def __str__(self) -> str:
        dims = "" if self.dims is None else f"[{','.join('?' if dim is None else str(dim) for dim in self.dims)}]"
        return f"{self.dtype.name if self.dtype is not None else 'any dtype'}{dims}"

    def allows(self, other: _Port) -> bool:
        """Return whether `other` states the same, or more where this port states nothing."""
        if self.dtype is not None and self.dtype != other.dtype:
            return False
        if self.dims is None:
            return True
        if other.dims is None or len(self.dims) != len(other.dims):
            return False
        pairs = zip(self.dims, other.dims, strict=True)
        return all(mine is None or mine == theirs or mine in self.made_up for mine, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a model at the time when `of` was called."""

    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]

    @classmethod
    def of(cls, model: onnx_ir.Model) -> Interface:
        """Return the interface that the model has now."""
        inputs = _ports(model.graph.inputs)
        stated = {dim for port in inputs for dim in port.dims or () if isinstance(dim, str)}
        named = {name for dim in stated for name in _names(dim)}
        return cls(inputs, tuple(_with_made_up(port, named) for port in _ports(model.graph.outputs)))

    def check(self, model: onnx_ir.Model) -> None:
        """Raise VerifyError if the model's interface is a different one now."""
        now = Interface.of(model)
        _check("graph input", self.inputs, now.inputs)
        _check("graph output", self.outputs, now.outputs)


def _with_made_up(port: _Port, named: set[str]) -> _Port:
    symbols = [dim for dim in port.dims or () if isinstance(dim, str)]
    made_up = frozenset(dim for dim in symbols if not named.intersection(_names(dim)))
    return dataclasses.replace(port, made_up=made_up)


def _names(symbol: str) -> set[str]:
    """Return the names in a symbolic length: `past+2*seq` contains past and seq."""
    return {name for name in re.split(r"[^A-Za-z0-9_.]+", symbol) if not name.isdigit()} - {""}


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
