"""Define the pass `legalize`, which converts a model to another opset, operator by operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir
import onnx_ir.passes.common

from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.provenance import called
from passopt.ir.serialization.inference import complete_all_types
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.opset.changes import LOWEST_TARGET, NEWEST, NEWEST_READ, OLDEST, UNCHANGED, changes
from passopt.passes.opset.converters import CONVERTERS, REFUSES_DTYPES
from passopt.passes.opset.lowering import lower_node
from passopt.passes.opset.meanings import check_meaning
from passopt.passes.opset.step import OF_FUNCTION, Place, Step, refuse

Container = onnx_ir.Graph | onnx_ir.Function


@dataclasses.dataclass(frozen=True)
class Legalize(Pass):
    """Convert a model to the opset that later passes or a target need; fused operators exist from opset 23 on.

    Before: ``<opset_import: ["" : 17]> … m = ReduceMean <axes = [-1]> (x)``
    After:  ``<opset_import: ["" : 23]> … m = ReduceMean (x, axes)``
    Models of opset 7 or newer are raised to at most 26. Models are lowered to 18 or newer, if no node uses what the
    older operators lack. For every operator that changed on the way, the pass knows that its meaning stayed the same,
    or converts the node, or stops with an error; it never just changes the number. Names, types, metadata and lazy
    weights are kept. Bodies of If, Loop and Scan and local functions are converted too. Before a function is lowered,
    the dtypes at each of its calls are checked.
    """

    name = "legalize"

    opset: int = 23

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Convert the main graph and all local functions in place; raise PassError if a node cannot be converted."""
        if not OLDEST <= self.opset <= NEWEST:
            raise UsageError(
                f"{self.name}: opset {self.opset} is not between {OLDEST} and {NEWEST}. Choose one of these."
            )
        every: list[Container] = [model.graph, *model.functions.values()]
        bodies = [body for body in every if body.opset_imports.get("", self.opset) != self.opset]
        if not bodies:
            return PassResult()
        for body in bodies:
            self._check_range(body)
        complete_all_types(model)  # Some converters, and all checks of older operators, must know the dtypes.
        self._check_calls(model, bodies)
        unique = _unique_names(model, self.name)
        matches = sum(self._convert(Place(body, unique)) for body in bodies)
        return PassResult(modified=True, matches=matches)

    def _check_range(self, body: Container) -> None:
        given = body.opset_imports[""]
        if not OLDEST <= given <= NEWEST_READ:
            raise PassError(
                f"{self.name}: {body.name!r} is of opset {given}; the oldest that is converted is {OLDEST}, the newest "
                f"{NEWEST_READ}. Export the model again with an opset between them."
            )
        if self.opset < given and self.opset < LOWEST_TARGET:
            raise UsageError(
                f"{self.name}: {body.name!r} is of opset {given}; downwards, {LOWEST_TARGET} is the lowest target, "
                f"not {self.opset}. Choose {LOWEST_TARGET} or more."
            )

    def _check_calls(self, model: onnx_ir.Model, bodies: Sequence[Container]) -> None:
        """Check what depends on dtypes inside of functions at each call, by converting a copy that has no calls."""
        found = [body for body in bodies if isinstance(body, onnx_ir.Function) and self._depends_on_dtypes(body)]
        if not found:
            return
        copy = model.clone()
        for function in copy.functions.values():
            for node in function.all_nodes():
                node.metadata_props[OF_FUNCTION] = f"{called(node)} in the function {function.name}"
        try:
            onnx_ir.passes.common.InlinePass()(copy)
        except Exception as error:
            raise PassError(
                f"{self.name}: function {found[0].name!r} cannot be converted, because its calls cannot be checked: "
                f"{error}. Run inline-functions first."
            ) from error
        complete_all_types(copy)
        self._convert(Place(copy.graph, _unique_names(copy, self.name)))

    def _depends_on_dtypes(self, function: onnx_ir.Function) -> bool:
        """Return True if a function is lowered, or holds an operator that refuses some dtypes on the way up."""
        given = function.opset_imports[""]
        passed = {name for name, version in REFUSES_DTYPES if given < version <= self.opset}
        return given > self.opset or any(node.op_type in passed and not node.domain for node in function.all_nodes())

    def _convert(self, place: Place) -> int:
        """Convert the nodes of a graph or function; return how many were edited."""
        imports = place.container.opset_imports
        given, edited = imports[""], 0
        for version in range(given + 1, self.opset + 1):
            edited += self._raise(place, version)
        typed = isinstance(place.container, onnx_ir.Graph)
        for version in range(given, self.opset, -1):
            edited += sum(lower_node(node, version, typed=typed) for node in _changed(place, version))
        imports[""] = self.opset
        return edited

    def _raise(self, place: Place, version: int) -> int:
        """Convert the nodes from opset `version` - 1 to `version`; return how many were edited."""
        edited = 0
        for node in _changed(place, version):
            check_meaning(node, version, version - 1, version)
            converter = CONVERTERS.get((node.op_type, version))
            if converter is not None:
                converter(Step(node, version, place, self.opset))
                edited += 1
            elif node.op_type not in UNCHANGED.get(version, ()):
                refuse(node, version - 1, version, "its operator changed, and no conversion of it is known")
        return edited


def _changed(place: Place, version: int) -> Iterator[onnx_ir.Node]:
    """Return the nodes, those of subgraphs included, whose operator of the default domain changed in `version`."""
    nodes = [node for node in place.container.all_nodes() if not node.domain]
    return (node for node in nodes if version in changes(node.op_type))


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
