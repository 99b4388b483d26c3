"""Check expressions that were read from a file: the types of their fields, and that operands give what is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.weights import expressions as ex
from passopt.ir.weights import groups
from passopt.ir.weights.concat import Concat, concat
from passopt.ir.weights.dequantized import Dequantized, dequantized
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.packed_codes import PackCodes, UnpackCodes, pack_codes, unpack_codes
from passopt.ir.weights.rotation import Rotate, rotate
from passopt.ir.weights.scaling import ScaleAlong, scale_along

_MOST_LENGTH = 1 << 62


def check_expression(expression: ex.Expression) -> None:
    """Raise ModelError unless an expression and all that it is made of could have been built by its own methods.

    Args:
        expression: The expression.
    """
    for operand in expression.operands:
        if not isinstance(operand, ex.Expression):
            raise ModelError(f"{type(expression).__name__} of {operand!r}, expected an expression")
        check_expression(operand)
    shape = expression.shape
    if not isinstance(shape, tuple) or not all(_is_whole(length) for length in shape):
        raise ModelError(f"{type(expression).__name__} has shape {shape!r}")
    try:
        dtype, expected = _declared(expression)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{type(expression).__name__} has fields of wrong types: {error}") from error
    if (dtype, expected) != (expression.dtype, shape):
        raise ModelError(
            f"{type(expression).__name__} is declared {expression.dtype.name}{list(shape)}, "
            f"but its operands give {dtype.name}{list(expected)}"
        )


def _group_part(index: int) -> Callable[[Any, ex.Expression], ex.Expression]:
    return lambda core, operand: groups.quantize_groups(
        operand, core.group, symmetric=index < 2 and getattr(core, "symmetric", False)
    )[index]


def _nibbles(core: groups.Nibbles, operand: ex.Expression) -> ex.Expression:
    if not core.distance:
        raise ModelError("Nibbles has the distance 0")
    return groups.nibbles(operand, core.distance)


#: How the expressions of codes of 4 bits are built anew.
_OF_GROUPS: dict[type[ex.Expression], Callable[[Any, ex.Expression], ex.Expression]] = {
    groups.GroupCodes: _group_part(0),
    groups.GroupScales: _group_part(1),
    groups.GroupZeros: _group_part(2),
    groups.Unsigned: lambda _, operand: groups.unsigned(operand),
    groups.Nibbles: _nibbles,
    groups.PackedBytes: lambda _, operand: groups.packed_bytes(operand),
    groups.View: lambda core, operand: groups.view(operand, core.shape),
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_LENGTH


def _declared(expression: ex.Expression) -> tuple[ex.DataType, tuple[int, ...]]:
    """Return the dtype and the shape that an expression has by its fields; raise ModelError if a field is wrong."""
    if isinstance(expression, ex.Source):
        _check_source(expression)
    elif isinstance(expression, Literal):
        if len(expression.data) != expression.nbytes:
            raise ModelError(f"Literal of {expression.nbytes} bytes holds {len(expression.data)}")
    elif isinstance(expression, Fill):
        _check_number(expression.value)
    else:
        found = _rebuilt(expression)
        return found.dtype, found.shape
    return expression.dtype, expression.shape


def _check_source(source: ex.Source) -> None:
    file = source.file
    texts = (source.name, file.path, file.header_digest)
    if not all(isinstance(text, str) for text in texts) or "\0" in file.path:
        raise ModelError(f"Source has names that are no texts: {texts}")
    if not all(_is_whole(number) for number in (source.offset, file.size, file.mtime_ns)):
        raise ModelError(f"Source {source.name!r} has a wrong offset, file size or time")
    if source.offset + source.nbytes > file.size:
        raise ModelError(f"Source {source.name!r} ends behind its file of {file.size:,} bytes")


def _check_number(value: object) -> None:
    if not isinstance(value, (int, float)):
        raise ModelError(f"{value!r} is no number")


def _rebuilt(expression: ex.Expression) -> ex.Expression:
    """Build the expression anew by the method that makes it, which checks its arguments."""
    shape = expression.shape
    if isinstance(expression, Concat):
        return concat(expression.parts, expression.along)
    if isinstance(expression, Dequantized):
        return dequantized(expression.codes, expression.scales, expression.along)
    operand = expression.operands[0]
    for name in ("along", "start", "segments", "degree", "seed", "group", "distance"):
        if not _is_whole(getattr(expression, name, 0)):
            raise ModelError(f"{type(expression).__name__} has {name} {getattr(expression, name)!r}")
    if isinstance(expression, ex.Slice):
        return operand.slice(expression.along, expression.start, expression.start + shape[expression.along])
    if isinstance(expression, ex.Transpose):
        if sorted(expression.permutation) != list(range(len(operand.shape))):
            raise ModelError(f"Transpose has the permutation {expression.permutation!r}")
        return operand.transpose(expression.permutation)
    if isinstance(expression, ex.Cast):
        return operand.cast(expression.dtype)
    if isinstance(expression, ex.Pad):
        _check_number(expression.value)
        return operand.pad(expression.along, shape[expression.along], max(expression.segments, 1), expression.value)
    if isinstance(expression, ex.NormalizeRows):
        _check_number(expression.epsilon)
        return operand.normalize_rows(expression.epsilon)
    if isinstance(expression, Rotate):
        return rotate(operand, expression.along, expression.seed)
    if isinstance(expression, ScaleAlong):
        return scale_along(operand, expression.along, expression.vector)
    if isinstance(expression, (ex.QuantizeCodes, ex.QuantizeScales)):
        return operand.quantize(expression.along)[isinstance(expression, ex.QuantizeScales)]
    if isinstance(expression, ex.Pack):
        rows, columns = shape[2:]
        return operand.pack(rows, columns)
    if isinstance(expression, ex.RowSums):
        return operand.row_sums()
    if type(expression) in _OF_GROUPS:
        return _OF_GROUPS[type(expression)](expression, operand)
    if isinstance(expression, UnpackCodes):
        return unpack_codes(operand, expression.bits)
    if isinstance(expression, PackCodes):
        return pack_codes(operand, expression.bits)
    assert isinstance(expression, ex.Shard), type(expression)
    if not expression.segments or not expression.degree:
        raise ModelError(f"Shard has {expression.segments} segments and degree {expression.degree}")
    return operand.shard(expression.along, expression.degree, expression.segments)
