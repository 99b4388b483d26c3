"""Read and write weights.plan.json, which stores unevaluated weights, so that no gigabytes have to be copied.

The file is `{"version": 1, "files": [{path, size, mtime_ns, header_digest}], "weights": {name: expression}}`, where an
expression is `[operation, fields…]` and a source gives the index of its file in `files`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.json_text import read_json
from passopt.ir.weights import expressions as ex
from passopt.ir.weights import groups
from passopt.ir.weights.concat import Concat
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.expression_check import check_expression
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.packed_codes import PackCodes, UnpackCodes
from passopt.ir.weights.rotation import Rotate
from passopt.ir.weights.scaling import ScaleAlong
from passopt.ir.weights.source_file import SourceFile

PLAN_NAME = "weights.plan.json"
_VERSION = 1

_OPERATIONS: dict[str, type[ex.Expression]] = {
    kind.__name__: kind
    for kind in (
        ex.Source,
        Literal,
        Fill,
        ex.Slice,
        Concat,
        ex.Transpose,
        ex.Cast,
        ex.Pad,
        ex.NormalizeRows,
        Rotate,
        ScaleAlong,
        ex.QuantizeCodes,
        ex.QuantizeScales,
        ex.Pack,
        ex.RowSums,
        UnpackCodes,
        PackCodes,
        Dequantized,
        ex.Shard,
        groups.GroupCodes,
        groups.GroupScales,
        groups.GroupZeros,
        groups.Unsigned,
        groups.Nibbles,
        groups.PackedBytes,
        groups.View,
    )
}


def write_plan(path: Path, weights: Mapping[str, ex.Expression]) -> None:
    """Write the expressions by weight name; files below the plan's own folder are stored relative to it."""
    files: dict[SourceFile, int] = {}
    encoded = {name: _encode(expression, files) for name, expression in weights.items()}
    folder = path.parent.resolve()
    table = [{**dataclasses.asdict(file), "path": _portable(file.path, folder)} for file in files]
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(body)}" for name, body in encoded.items())
    text = f'{{"version": {_VERSION},\n  "files": {json.dumps(table)},\n  "weights": {{\n{lines}\n  }}\n}}\n'
    path.write_text(text)


def read_plan(path: Path) -> dict[str, ex.Expression]:
    """Return the expressions by weight name.

    Raises:
        ModelError: If the file cannot be read, has another version, or is not a weight plan.
    """
    try:
        plan = read_json(path)
        if plan["version"] != _VERSION:
            raise ModelError(f"{path}: plan version {plan['version']}, this passopt reads {_VERSION}")
        folder = path.parent.resolve()
        files = [SourceFile(**{**entry, "path": str(folder / entry["path"])}) for entry in plan["files"]]
        weights = {name: _decode(body, files) for name, body in plan["weights"].items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a weight plan: {error!r}") from error
    for name, expression in weights.items():
        try:
            check_expression(expression)
        except ModelError as error:
            raise ModelError(f"{path}: weight {name!r}: {error}. Run the command again that wrote the plan.") from error
    return weights


def _portable(path: str, folder: Path) -> str:
    location = Path(path)
    return str(location.relative_to(folder)) if location.is_relative_to(folder) else path


def _encode(value: Any, files: dict[SourceFile, int]) -> Any:
    if isinstance(value, ex.Expression):
        fields = [_encode(getattr(value, field.name), files) for field in dataclasses.fields(value)]
        return [type(value).__name__, *fields]
    if isinstance(value, SourceFile):
        return files.setdefault(value, len(files))
    if isinstance(value, ex.DataType):
        return value.name
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple):
        return [_encode(item, files) for item in value]
    return value


def _decode(body: Any, files: list[SourceFile]) -> ex.Expression:
    kind: Any = _OPERATIONS[body[0]]
    values: dict[str, Any] = {}
    for field, value in zip(dataclasses.fields(kind), body[1:], strict=True):
        values[field.name] = _decode_field(field.name, value, files)
    expression: ex.Expression = kind(**values)
    return expression


def _decode_field(name: str, value: Any, files: list[SourceFile]) -> Any:
    if name == "dtype":
        return ex.DataType.__members__[value]
    if name == "file":
        return files[value]
    if name in {"operand", "vector", "codes", "scales"}:
        return _decode(value, files)
    if name == "parts":
        return tuple(_decode(part, files) for part in value)
    if name == "data":
        return base64.b64decode(value)
    return tuple(value) if isinstance(value, list) else value
