"""What a pass declares about numbers."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, lossy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog, pass_class

FLOAT, HALF, INT64 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.INT64


def test_each_dtype_has_its_budget():
    assert EXACT.budget_of(FLOAT) < REASSOCIATED.budget_of(FLOAT) < REASSOCIATED.budget_of(HALF) < 1
    assert EXACT.budget_of(onnx_ir.DataType.DOUBLE) == EXACT.budget_of(FLOAT)
    assert REASSOCIATED.budget_of(INT64) == 0
    assert lossy(0.02).budget_of(FLOAT) == lossy(0.02).budget_of(INT64) == 0.02


def test_declarations_read_as_they_are_written():
    assert [str(item) for item in (EXACT, REASSOCIATED, lossy(0.02))] == ["exact", "reassociated", "lossy(0.02)"]


@pytest.mark.parametrize("budget", [0, -1, 1, float("inf"), float("nan")])
def test_a_budget_is_a_fraction(budget):
    with pytest.raises(ValueError, match="budget between 0 and 1"):
        lossy(budget)


def test_another_declaration_is_refused_where_the_pass_is_defined():
    with pytest.raises(PassError, match=r"accuracy 'lossy' is none of EXACT, REASSOCIATED, lossy\(budget\)"):
        type("Loose", (Pass,), {"name": "loose", "accuracy": "lossy"})


def test_listings_show_what_the_class_declares():
    for name, entry in catalog().items():
        cls = pass_class(name)
        assert entry.accuracy == (str(cls.accuracy) if "accuracy" in vars(cls) else ""), name
    assert catalog()["quantize-weights"].accuracy == "lossy(0.02)"


@pytest.mark.parametrize(
    ("wrong", "right", "value"),
    [
        ("acuracy", "accuracy", EXACT),
        ("mades", "makes", ("Gelu",)),
        ("afer", "after", ()),
        ("change_interface", "changes_interface", True),
    ],
)
def test_a_misspelt_class_attribute_is_refused_where_the_pass_is_defined(wrong, right, value):
    """Nothing reads it, so the pass would silently have the default."""
    with pytest.raises(PassError, match=f"no pass has a class attribute '{wrong}'; did you mean '{right}'"):
        type("Wrong", (Pass,), {"name": "misspelt", wrong: value})


def test_class_attributes_of_the_author_are_left_alone():
    content = {
        "name": "with-attributes-of-its-own",
        "names": ("a",),
        "table": {},
        "_afer": 1,
        "MAKES_": 2,
        "run": lambda s, m: None,
    }
    assert type("Right", (Pass,), content).names == ("a",)
