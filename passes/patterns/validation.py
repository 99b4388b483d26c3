"""Check patterns and rewrites before anything is matched, and refuse those that could never work.

Messages name the pass and the source line of the rule.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import onnx

from passopt.ir.errors import PassError
from passopt.passes.patterns.language import (
    Alternatives,
    Maybe,
    NodePattern,
    Output,
    Pattern,
    Rest,
    Scalar,
    ValuePattern,
    Variable,
    Weight,
    outputs_of,
)


def check_pattern(pattern: Pattern, where: str) -> None:
    """Raise PassError if a pattern could never match, or uses one name for two things.

    Args:
        pattern: The traced pattern.
        where: The rule's name and source line, with which messages begin.

    Raises:
        PassError: If ONNX has no such operator in any version, or never with these inputs, outputs and attributes; if
            two things that the pattern binds have one name; or if a later root shares no value with the roots before
            it.
    """
    nodes = _nodes(pattern.roots)
    for node in nodes:
        _check_operator(node, where)
    _check_names(pattern, nodes, where)
    _check_roots(pattern, where)


def wanted_names(pattern: Pattern, rewrite: Callable[..., Any], where: str) -> dict[str, Any]:
    """Return the names that `rewrite` takes after `op`, each with the default that is used if a match does not bind it.

    Args:
        pattern: The traced pattern.
        rewrite: The rewrite method.
        where: The rule's name and source line, with which messages begin.

    Returns:
        The default for each name; None for names without one, which every match binds.

    Raises:
        PassError: If the pattern never binds one of the names, or only some alternatives bind it and it has no default.
    """
    parameters = list(inspect.signature(rewrite).parameters.values())[1:]
    parameters = [item for item in parameters if item.kind is not item.VAR_KEYWORD]
    unknown = [item.name for item in parameters if item.name not in pattern.variables]
    if unknown:
        raise PassError(f"{where}: rewrite takes {', '.join(unknown)}, which the pattern does not bind")
    for item in parameters:
        if item.name not in pattern.certain and item.default is item.empty:
            raise PassError(
                f"{where}: rewrite takes {item.name}, which only some alternatives bind; "
                f"give it a default for the others, such as {item.name}=None"
            )
    return {item.name: None if item.default is item.empty else item.default for item in parameters}


def _nodes(roots: Iterable[ValuePattern]) -> list[NodePattern]:
    """List all node patterns at and below the roots, each once."""
    found: dict[NodePattern, None] = {}
    work = list(roots)
    while work:
        item = work.pop()
        if isinstance(item, Alternatives):
            work.extend(item.choices.values())
        elif isinstance(item, Output) and item.node not in found:
            found[item.node] = None
            work.extend(item.node.inputs)
    return list(found)


# Operators


class _Schema(NamedTuple):
    min_input: int
    max_input: int
    max_output: int
    attributes: frozenset[str]


def _check_operator(node: NodePattern, where: str) -> None:
    if any(isinstance(item, Rest) for item in node.inputs[:-1]):
        raise PassError(f"{where}: op.rest stands before the last input of {node.op_type}")
    if node.domain:
        return
    schemas = _schemas(node.op_type)
    if not schemas:
        raise PassError(f"{where}: ONNX has no operator {node.op_type}{_suggestion(node.op_type)}")
    problems = [_misfit(node, schema) for schema in schemas]
    if all(problem is not None for problem in problems):
        raise PassError(f"{where}: no {node.op_type} can match: {problems[0]}")


@functools.cache
def _schemas(op_type: str) -> tuple[_Schema, ...]:
    """Return ONNX's schemas of all versions of an operator, newest first; empty if there is no such operator."""
    found = []
    version = onnx.defs.onnx_opset_version()
    while version > 0:
        try:
            schema = onnx.defs.get_schema(op_type, version, "")
        except onnx.defs.SchemaError:
            break
        attributes = frozenset(schema.attributes)
        found.append(_Schema(schema.min_input, schema.max_input, schema.max_output, attributes))
        version = schema.since_version - 1
    return tuple(found)


def _suggestion(op_type: str) -> str:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    near = difflib.get_close_matches(op_type, known, 1)
    return f", did you mean {near[0]}?" if near else "; name its domain, if it is not one of ONNX's"


def _misfit(node: NodePattern, schema: _Schema) -> str | None:
    """Say why no node of this version of the operator can match; return None if one may."""
    is_open = bool(node.inputs) and isinstance(node.inputs[-1], Rest)
    count = len(node.inputs) - is_open
    if count > schema.max_input or (count < schema.min_input and not is_open):
        bound = f"{schema.min_input}" if schema.min_input == schema.max_input else f"{schema.min_input} or more"
        if schema.min_input < schema.max_input < 1 << 20:
            bound = f"{schema.min_input} to {schema.max_input}"
        return f"the pattern has {count} inputs, the operator takes {bound}"
    if not 1 <= node.outputs <= schema.max_output:
        return f"the pattern has {node.outputs} outputs, the operator gives at most {schema.max_output}"
    unknown = sorted(set(node.attributes) - schema.attributes)
    if unknown:
        return f"it has no attribute {', '.join(unknown)}, only {', '.join(sorted(schema.attributes)) or 'none'}"
    return None


# Names


def _check_names(pattern: Pattern, nodes: list[NodePattern], where: str) -> None:
    labels: dict[str, tuple[str, ...]] = {}
    variables: set[str] = set()
    leaves = [item for node in nodes for item in (*node.inputs, *node.attributes.values())]
    for item in _with_choices([*pattern.roots, *leaves]):
        if isinstance(item, (Weight, Scalar, Maybe)):
            item = item.variable
        if isinstance(item, (Variable, Rest)):
            variables.add(item.name)
        elif isinstance(item, Alternatives):
            own = tuple(item.choices)
            if labels.setdefault(item.name, own) != own:
                raise PassError(
                    f"{where}: any_of {item.name!r} has the choices {', '.join(own)} in one place and "
                    f"{', '.join(labels[item.name])} in another; one name is one label everywhere"
                )
    binds = {node.bind for node in nodes if node.bind}
    for kind, names, others in (
        ("any_of", labels, variables | binds),
        ("bind", binds, variables),
    ):
        clash = sorted(set(names) & set(others))
        if clash:
            raise PassError(f"{where}: {kind} {clash[0]!r} has the name of something else that the pattern binds")
    if len(binds) < sum(node.bind is not None for node in nodes):
        for root in pattern.roots:
            _check_binds(root, {}, {}, set(), where)


_Conditions = Mapping[str, str]


def _check_binds(
    item: ValuePattern,
    conditions: _Conditions,
    seen: dict[str, list[tuple[NodePattern, _Conditions]]],
    visited: set[tuple[NodePattern, frozenset[tuple[str, str]]]],
    where: str,
) -> None:
    """Raise PassError if one match could contain two nodes that have the same `bind` name.

    Two nodes may share a name only if they stand under different labels of one `any_of`. `conditions` holds the labels
    under which `item` stands.
    """
    if isinstance(item, Alternatives):
        for label, choice in item.choices.items():
            if conditions.get(item.name, label) == label:
                _check_binds(choice, {**conditions, item.name: label}, seen, visited, where)
        return
    if not isinstance(item, Output) or (key := (item.node, frozenset(conditions.items()))) in visited:
        return
    visited.add(key)
    if item.node.bind:
        same = seen.setdefault(item.node.bind, [])
        for other, under in same:
            if other is not item.node and all(under.get(name, label) == label for name, label in conditions.items()):
                raise PassError(f"{where}: {other.op_type} and {item.node.op_type} both have bind={item.node.bind!r}")
        same.append((item.node, conditions))
    for operand in item.node.inputs:
        _check_binds(operand, conditions, seen, visited, where)


# Roots


def _check_roots(pattern: Pattern, where: str) -> None:
    """Check that each root after the first shares a value with earlier roots, through which it is found."""
    known = _leaves([pattern.roots[0]])
    for number, root in enumerate(pattern.roots[1:], start=2):
        for output in outputs_of(root):
            if not known & _leaves([output]):
                raise PassError(
                    f"{where}: root {number} ({output.node.op_type}) shares no value with the roots before it, "
                    f"so it cannot be found"
                )
        known |= _leaves([root])


def _leaves(roots: Iterable[ValuePattern]) -> set[object]:
    """Return the node patterns and the names of variables at and below `roots`."""
    roots = list(roots)
    nodes = _nodes(roots)
    found: set[object] = set(nodes)
    for item in _with_choices([*roots, *(item for node in nodes for item in node.inputs)]):
        if isinstance(item, (Weight, Scalar, Maybe)):
            item = item.variable
        if isinstance(item, Variable):
            found.add(item.name)
    return found


def _with_choices(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items, and each choice of the alternatives among them once."""
    work, seen = list(items), set()
    while work:
        item = work.pop()
        if isinstance(item, Alternatives):
            if item in seen:
                continue
            seen.add(item)
            work.extend(item.choices.values())
        yield item
