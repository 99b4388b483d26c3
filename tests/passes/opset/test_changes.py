"""The tables of `legalize` against the schemas of onnx: no change is forgotten, none called harmless that is not."""

from __future__ import annotations

import onnx
import pytest

from passopt.passes.opset.changes import DECOMPOSED_BY, NEWEST, OLDEST, UNCHANGED, changes
from passopt.passes.opset.converters import CONVERTERS

#: Changes that no decoder holds, refused at run time: images, sound, losses.
REFUSED = {
    *(("MaxPool", 12), ("NegativeLogLikelihoodLoss", 13), ("Resize", 13), ("SoftmaxCrossEntropyLoss", 13)),
    *(("RoiAlign", 16), ("LpPool", 18), ("Resize", 18), ("AveragePool", 19), ("Resize", 19)),
    *(("DFT", 20), ("GridSample", 20), ("AveragePool", 22), ("DeformConv", 22), ("GlobalAveragePool", 22)),
    *(("GlobalLpPool", 22), ("GlobalMaxPool", 22), ("GridSample", 22), ("LpPool", 22), ("MaxPool", 22)),
    *(("MaxRoiPool", 22), ("MaxUnpool", 22), ("NegativeLogLikelihoodLoss", 22), ("RoiAlign", 22)),
}

NAMES = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
KEPT = {(name, version) for version, names in UNCHANGED.items() for name in names}


def test_every_change_stands_in_exactly_one_table():
    real = {(name, version) for name in NAMES for version in changes(name)[1:] if OLDEST < version <= NEWEST}
    assert real == KEPT | set(CONVERTERS) | REFUSED
    assert not KEPT & set(CONVERTERS)
    assert not REFUSED & (KEPT | set(CONVERTERS))


@pytest.mark.parametrize(("name", "version"), sorted(KEPT))
def test_what_is_called_unchanged_only_admits_more(name, version):
    older, newer = (onnx.defs.get_schema(name, number, "") for number in (version - 1, version))
    for before, after in ((older.inputs, newer.inputs), (older.outputs, newer.outputs)):
        for one, other in zip(before, after, strict=False):
            # An input may become optional.
            assert other.option in {one.option, onnx.defs.OpSchema.FormalParameterOption.Optional}
            assert one.types <= other.types
        optional = [formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional for formal in after]
        assert len(before) <= len(after)
        assert all(optional[len(before) :])
    for key, attribute in older.attributes.items():
        assert (attribute.type, attribute.default_value) == (
            newer.attributes[key].type,
            newer.attributes[key].default_value,
        )
    for key in newer.attributes.keys() - older.attributes.keys():
        assert not newer.attributes[key].required


def test_no_operator_of_the_tables_is_misspelled():
    assert {name for name, _ in (*KEPT, *CONVERTERS)} | set(DECOMPOSED_BY) <= NAMES
    assert changes("ReduceMean") == (1, 11, 13, 18)
    assert changes("NoSuchOperator") == ()
