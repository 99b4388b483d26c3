"""The tables of `legalize` against the schemas of onnx: no change is forgotten, none called harmless that is not."""

from __future__ import annotations

import onnx

from passopt.passes.opset.changes import DECOMPOSED_BY, NEWEST, NEWEST_READ, OLDEST, UNCHANGED, changes
from passopt.passes.opset.converters import CONVERTERS

OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
#: Changes that are refused by name: opset 9 took the batch out of Scan.
REFUSED = {("Scan", 9)}
#: Changes above the newest opset that models are raised to: types that go matter for raising only.
LOSES_TYPES = {("ReduceLogSum", 28), ("ReduceLogSumExp", 28)}

NAMES = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
KEPT = {(name, version) for version, names in UNCHANGED.items() for name in names}
REAL = {(name, version) for name in NAMES for version in changes(name)[1:] if OLDEST < version <= NEWEST_READ}


def only_admits_more(name, version):
    """Whether the schemas of an operator before and after a change differ in nothing that a node could notice."""
    older, newer = (onnx.defs.get_schema(name, number, "") for number in (version - 1, version))
    for before, after in ((older.inputs, newer.inputs), (older.outputs, newer.outputs)):
        pairs = list(zip(before, after, strict=False))
        if not all(other.option in {one.option, OPTIONAL} for one, other in pairs):
            return False
        if not all(one.types <= other.types for one, other in pairs) and (name, version) not in LOSES_TYPES:
            return False
        if len(before) > len(after) or not all(formal.option == OPTIONAL for formal in after[len(before) :]):
            return False
    for key, attribute in older.attributes.items():
        other = newer.attributes.get(key)
        same = other is not None and (attribute.type, default(attribute)) == (other.type, default(other))
        if not same or (other.required and not attribute.required):
            return False
    return not newer.deprecated and not any(
        newer.attributes[key].required for key in newer.attributes.keys() - older.attributes.keys()
    )


def default(attribute):
    return attribute.default_value.SerializeToString()


def test_every_change_stands_in_exactly_one_table():
    """A new version of onnx brings changes that stand in none: then NEWEST_READ stays, or the tables grow."""
    assert KEPT | set(CONVERTERS) | REFUSED == REAL
    assert not KEPT & set(CONVERTERS)
    assert not REFUSED & (KEPT | set(CONVERTERS))
    assert NEWEST <= NEWEST_READ <= onnx.defs.onnx_opset_version()


def test_what_is_called_unchanged_only_admits_more():
    assert not {change for change in KEPT if not only_admits_more(*change)}


def test_what_only_admits_more_is_refused_nowhere():
    assert not {change for change in REFUSED if only_admits_more(*change)}


def test_no_operator_of_the_tables_is_misspelled():
    assert {name for name, _ in (*KEPT, *CONVERTERS)} | set(DECOMPOSED_BY) <= NAMES
    assert changes("ReduceMean") == (1, 11, 13, 18)
    assert changes("NoSuchOperator") == ()
