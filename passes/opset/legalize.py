"""Define the pass `legalize`, which converts a model to another opset, operator by operator."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NoReturn

import onnx
import onnx_ir

from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.shapes import complete_types
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.opset.changes import DECOMPOSED_BY, LOWEST_TARGET, NEWEST, OLDEST, UNCHANGED, changes
from passopt.passes.opset.converters import CONVERTERS, Place, Step


@dataclasses.dataclass(frozen=True)
class Legalize(Pass):
    """Convert a model to the opset that later passes or a target need; fused operators exist from opset 23 on.

    Before: ``<opset_import: ["" : 17]> … m = ReduceMean <axes = [-1]> (x)``
    After:  ``<opset_import: ["" : 23]> … m = ReduceMean (x, axes)``
    Models of opset 11 or newer are raised to at most 26. Models are lowered to 18 or newer, if no node uses what the
    older operators lack. For every operator that changed on the way, the pass knows that its meaning stayed the same,
    or converts the node, or stops with an error; it never just changes the number. Names, types, metadata and lazy
    weights are kept. Bodies of If and Loop and local functions are converted too.
    """

    name = "legalize"

    opset: int = 23

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Convert the main graph and all local functions in place; raise PassError if a node cannot be converted."""
        if not OLDEST <= self.opset <= NEWEST:
            raise UsageError(f"{self.name}: opset {self.opset} is not between {OLDEST} and {NEWEST}")
        every: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
        bodies = [body for body in every if body.opset_imports.get("", self.opset) != self.opset]
        if not bodies:
            return PassResult()
        complete_types(model)  # `_check_fits` must know the dtypes to tell whether an older operator takes them.
        unique = _unique_names(model, self.name)
        result = PassResult(modified=True)
        for body in bodies:
            given = body.opset_imports[""]
            self._check_range(body, given)
            place = Place(body, unique)
            rising = given < self.opset
            for version in range(given + 1, self.opset + 1) if rising else range(given, self.opset, -1):
                result.matches += self._raise(place, version) if rising else self._lower(place, version)
            body.opset_imports[""] = self.opset
        return result

    def _check_range(self, body: onnx_ir.Graph | onnx_ir.Function, given: int) -> None:
        if given < OLDEST:
            raise PassError(f"{self.name}: {body.name!r} is of opset {given}; the oldest that is converted is {OLDEST}")
        if self.opset < given and self.opset < LOWEST_TARGET:
            raise UsageError(
                f"{self.name}: {body.name!r} is of opset {given}; downwards, {LOWEST_TARGET} is the lowest target, "
                f"not {self.opset}"
            )

    def _raise(self, place: Place, version: int) -> int:
        """Convert the nodes from opset `version` - 1 to `version`; return how many were edited."""
        edited = 0
        for node in _changed(place, version):
            converter = CONVERTERS.get((node.op_type, version))
            if converter is not None:
                converter(Step(node, version, place))
                edited += 1
            elif node.op_type not in UNCHANGED.get(version, ()):
                _refuse(node, version - 1, version, "its operator changed, and no conversion of it is known")
        return edited

    def _lower(self, place: Place, version: int) -> int:
        """Convert the nodes from opset `version` to `version` - 1; return how many were edited."""
        edited = 0
        for node in _changed(place, version):
            if changes(node.op_type)[0] == version:
                hint = DECOMPOSED_BY.get(node.op_type)
                reason = f"run {hint} first" if hint else "and passopt knows no decomposition of it"
                _refuse(node, version, version - 1, f"no such operator there; {reason}")
            if node.op_type not in UNCHANGED.get(version, ()) and (node.op_type, version) not in _REVERSIBLE:
                _refuse(node, version, version - 1, "its operator changed, and no conversion of it is known")
            edited += _drop_defaults(node, version)
            _check_fits(node, version)
        return edited


#: Changes whose converter edits nothing and only refuses a rare dtype, so that nodes can be lowered without one.
_REVERSIBLE = frozenset({("Cast", 24), ("CastLike", 24)})


def _changed(place: Place, version: int) -> Iterator[onnx_ir.Node]:
    """Return the nodes, those of subgraphs included, whose operator of the default domain changed in `version`."""
    nodes = [node for node in place.container.all_nodes() if not node.domain]
    return (node for node in nodes if version in changes(node.op_type))


def _refuse(node: onnx_ir.Node, given: int, wanted: int, reason: str) -> NoReturn:
    raise PassError(f"legalize: {node.op_type} {node.name!r} cannot go from opset {given} to {wanted}: {reason}")


def _drop_defaults(node: onnx_ir.Node, version: int) -> int:
    """Remove attributes that the older operator lacks, if they have their default value; refuse any other value.

    Returns 1 if an attribute was removed, and 0 otherwise.
    """
    newer, older = (_schema(node.op_type, number) for number in (version, version - 1))
    unknown = [name for name in node.attributes if name not in older.attributes]
    for name in unknown:
        default = newer.attributes[name].default_value
        expected = onnx.helper.get_attribute_value(default) if default.name else None
        attribute = node.attributes[name]
        found = None if attribute.is_ref() else attribute.value
        if found is None or found != (expected.decode() if isinstance(expected, bytes) else expected):
            _refuse(node, version, version - 1, f"the attribute {name} = {found} has no equivalent there")
        del node.attributes[name]
    return len(unknown) > 0


def _check_fits(node: onnx_ir.Node, version: int) -> None:
    """Check that the older operator takes the node's inputs and outputs in their dtypes; refuse the node if not."""
    older = _schema(node.op_type, version - 1)
    while node.inputs and node.inputs[-1] is None and len(node.inputs) > older.max_input:
        node.resize_inputs(len(node.inputs) - 1)
    if len(node.inputs) > older.max_input:
        name = _schema(node.op_type, version).inputs[older.max_input].name
        _refuse(node, version, version - 1, f"the input {name} has no equivalent there")
    sides = ((node.inputs, older.inputs), (node.outputs, older.outputs))
    for value, formal in itertools.chain.from_iterable(_paired(values, formals) for values, formals in sides):
        if value is not None and value.dtype is not None and not _takes(formal, value.dtype):
            _refuse(node, version, version - 1, f"{formal.name} cannot be {value.dtype.name} there ({value.name})")


def _paired(
    values: Sequence[onnx_ir.Value | None], formals: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> Iterator[tuple[onnx_ir.Value | None, onnx.defs.OpSchema.FormalParameter]]:
    """Pair each value with its formal parameter; further values belong to the last one, which may be variadic."""
    return ((value, formals[min(index, len(formals) - 1)]) for index, value in enumerate(values))


def _takes(formal: onnx.defs.OpSchema.FormalParameter, dtype: onnx_ir.DataType) -> bool:
    return f"tensor({onnx.TensorProto.DataType.Name(dtype.value).lower()})" in formal.types


@functools.cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, version, "")


def _unique_names(model: onnx_ir.Model, author: str) -> _Names:
    """Return a maker of names that nothing in the model has, values inside of local functions included."""
    inner = {
        value.name for function in model.functions.values() for node in function.all_nodes() for value in node.outputs
    }
    inner |= {value.name for function in model.functions.values() for value in function.inputs}
    return _Names(Editor(model, author), frozenset(filter(None, inner)))


@dataclasses.dataclass(frozen=True)
class _Names:
    """Make names that neither the graph nor a local function has."""

    editor: Editor
    of_functions: frozenset[str]

    def __call__(self, name: str) -> str:
        found = self.editor.unique(name)
        while found in self.of_functions:
            found = self.editor.unique(name)
        return found
