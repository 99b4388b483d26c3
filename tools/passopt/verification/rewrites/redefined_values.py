"""Find the values that a whole-graph pass redefines, by comparing the graph before and after the pass.

Values are identified by name. If every value that both graphs have is the same function of other such values, the
graphs compute the same. So each value that is defined differently is a site to check on its own. A changed constant
counts as a part of the nodes that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import onnx
import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.weights.lazy_weight import expression_of, small_constant
from passopt.verification.rewrites.regions import Request, Side
from passopt.verification.rewrites.value_kinds import Kinds


def rewired(before: onnx_ir.Model, after: onnx_ir.Model) -> Iterator[Request]:
    """Yield a request for each value that both graphs have but define differently."""
    old, new = _values(before), _values(after)
    opsets = before.graph.opset_imports.get("", 0), after.graph.opset_imports.get("", 0)
    sides = Side.of(before, Kinds()), Side.of(after, Kinds())
    gone, made = frozenset(old.keys() - new.keys()), frozenset(new.keys() - old.keys())
    both = {name: (value, new[name]) for name, value in old.items() if name in new}
    changed = {name for name, pair in both.items() if _is_changed_constant(*pair)}
    # Targets of a Reshape may say the same in other numbers, as (0, -1): what counts is what is reshaped.
    targets = {name for name, pair in both.items() if all(map(_is_target, pair)) and not _same(*pair, opsets, changed)}
    gone, made, changed = gone | targets, made | targets, changed | targets
    for name, value in old.items():
        other = new.get(name)
        if other is None or name in changed or _same(value, other, opsets, changed):
            continue
        yield Request((value,), (other,), *sides, gone | {name}, made | {name})


def _values(model: onnx_ir.Model) -> dict[str, onnx_ir.Value]:
    """Return all values that an output depends on, by name."""
    found: dict[str, onnx_ir.Value] = {}
    work = list(model.graph.outputs)
    while work:
        value = work.pop()
        if value.name is None or value.name in found:
            continue
        found[value.name] = value
        node = value.producer()
        if node is not None:
            work += [item for item in node.inputs if item is not None]
    return found


def _is_target(value: onnx_ir.Value) -> bool:
    uses = value.uses()
    found = all(use.node.op_type == "Reshape" and not use.node.domain and use.idx == 1 for use in uses)
    return bool(uses) and found and not value.is_graph_output()


def _is_changed_constant(one: onnx_ir.Value, other: onnx_ir.Value) -> bool:
    if not one.is_initializer() or not other.is_initializer() or one.is_graph_output():
        return False
    first, second = expression_of(one), expression_of(other)
    return first is None or second is None or first.text() != second.text()


def _same(one: onnx_ir.Value, other: onnx_ir.Value, opsets: tuple[int, int], changed: Set[str]) -> bool:
    if one.is_graph_input() and other.is_graph_input():
        return True  # their dtypes differ only if changing them is the purpose of the pass
    if None not in (one.dtype, other.dtype) and one.dtype != other.dtype:
        return False
    first, second = one.producer(), other.producer()
    constants = small_constant(one), small_constant(other)
    if constants[0] is not None and constants[1] is not None:
        same_kind = constants[0].dtype == constants[1].dtype and constants[0].shape == constants[1].shape
        return bool(same_kind and constants[0].tobytes() == constants[1].tobytes())
    if first is None or second is None:
        return first is second and _same_leaf(one, other)
    if (first.op_identifier(), one.index()) != (second.op_identifier(), other.index()):
        return False
    if not _same_operator(first, opsets) or attributes_key(first) != attributes_key(second):
        return False
    names = [_name(item) for item in first.inputs]
    return names == [_name(item) for item in second.inputs] and changed.isdisjoint(names)


def _same_operator(node: onnx_ir.Node, opsets: tuple[int, int]) -> bool:
    """Return whether the operator means the same in both opsets: a later opset may define it anew."""
    if node.domain or opsets[0] == opsets[1]:
        return True
    versions = {onnx.defs.get_schema(node.op_type, opset, "").since_version for opset in opsets}
    return len(versions) == 1


def _same_leaf(one: onnx_ir.Value, other: onnx_ir.Value) -> bool:
    if one.is_graph_input() or other.is_graph_input():
        return False
    first, second = expression_of(one), expression_of(other)
    return first is not None and second is not None and first.text() == second.text()


def _name(value: onnx_ir.Value | None) -> str | None:
    return None if value is None else value.name
