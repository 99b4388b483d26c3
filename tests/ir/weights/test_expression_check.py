"""Expressions of damaged plans: what no method could have built is refused when the plan is read."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from passopt.ir.dtypes import DataType
from passopt.ir.errors import ModelError
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import concat
from passopt.ir.weights.expression_check import check_expression
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.plan_file import read_plan, write_plan
from passopt.ir.weights.source_file import SourceFile

FILE = SourceFile("/weights", 1000, 5, "digest")
SOURCE = ex.Source(DataType.FLOAT, (6, 10), "w", FILE, 100)
CODES, SCALES = SOURCE.quantize()
WHOLE = [
    SOURCE,
    Literal.of(np.arange(6.0).reshape(2, 3)),
    Fill(DataType.FLOAT, (2, 3), 0.5),
    SOURCE.slice(0, 1, 5),
    SOURCE.transpose(),
    SOURCE.cast(DataType.FLOAT16),
    SOURCE.pad(1, 12, 2),
    SOURCE.normalize_rows(1e-7),
    CODES,
    SCALES,
    CODES.pack(4, 8),
    CODES.row_sums(),
    SOURCE.shard(1, 2),
    concat([SOURCE, SOURCE], 0),
    SOURCE.shard(0, 3).pad(1, 20).transpose(),
]


@pytest.mark.parametrize("expression", WHOLE, ids=lambda item: type(item).__name__)
def test_what_methods_build_passes_and_survives_a_file(expression, tmp_path):
    check_expression(expression)
    write_plan(tmp_path / "plan", {"w": expression})
    assert read_plan(tmp_path / "plan") == {"w": expression}


@pytest.mark.parametrize("expression", WHOLE, ids=lambda item: type(item).__name__)
def test_other_shapes_and_fields_of_other_types_are_refused(expression):
    longer = tuple(length + 1 for length in expression.shape)
    changes = [{"shape": "ab"}, {"shape": (-1, *expression.shape[1:])}, {"shape": (True, 2.5)}]
    if not isinstance(expression, Fill):  # any shape can be filled
        changes.append({"shape": longer if not isinstance(expression, ex.Source) else (600, 10)})
    names = {field.name for field in dataclasses.fields(expression)} - {"dtype", "shape", "operand", "parts", "data"}
    changes += [{name: wrong} for name in names for wrong in (None, "x", [1], {})]
    for change in changes:
        if "file" in change or ("name" in change and isinstance(change["name"], str)):
            continue
        with pytest.raises(ModelError):
            check_expression(dataclasses.replace(expression, **change))


def test_what_is_inside_is_checked_too():
    bad = dataclasses.replace(SOURCE, offset=990)
    with pytest.raises(ModelError, match="Source 'w' ends behind its file of 1,000 bytes"):
        check_expression(concat([SOURCE, bad], 0).transpose())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("[6, 10]", "[6, 11]"), "weight 'w': .* ends behind its file|declared"),
        (lambda text: text.replace('"Transpose"', '"Reverse"'), "not a weight plan: KeyError"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (
            lambda text: '{"version": 1, "files": [], "weights": {"w": ' + '["Transpose", ' * 500 + "]" * 500 + "}}",
            "not a",
        ),
        (lambda text: text[:-20], "not a weight plan"),
        (lambda text: json.dumps([]), "not a weight plan"),
    ],
)
def test_damaged_plans_are_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "plan.json"
    write_plan(path, {"w": SOURCE.transpose()})
    path.write_text(damage(path.read_text()))
    with pytest.raises(ModelError, match=f"{path}: .*({message})"):
        read_plan(path)
