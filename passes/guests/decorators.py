"""Declare passes of other frameworks: keyword parameters become options, the docstring becomes that of the pass.

`@graphsurgeon_pass(name="…")` takes `def f(graph, *, limit: int = 3)` that changes an onnx_graphsurgeon Graph;
`@ir_pass("…")` takes `def f(*, limit: int = 3)` that returns an onnx-ir PassBase.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, overload

import onnx_ir
import onnx_ir.passes

from passopt.ir.errors import PassError, UsageError
from passopt.passes.framework.accuracy import EXACT, Accuracy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult

_Factory: TypeAlias = Callable[..., onnx_ir.passes.PassBase]
_OPTION_KINDS = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


def graphsurgeon_pass(
    *, name: str, accuracy: Accuracy = EXACT, after: tuple[str, ...] = (), changes_interface: bool = False
) -> Callable[[Callable[..., Any]], type[Pass]]:
    """Declare a function over an `onnx_graphsurgeon.Graph` as a pass.

    The function changes the graph in place, or returns another. Weights cross as handles: nothing is read unless the
    function asks for `values`, which are read-only. What it hands back untouched, sliced or transposed stays lazy.
    Metadata that graphsurgeon drops is put back by output name.

    Args:
        name: The name of the pass on the command line.
        accuracy: How exactly the changed graph computes what the old one did, checked by `--verify-each=numeric`.
        after: Passes that must come earlier if they are in the pipeline at all.
        changes_interface: True if the pass gives graph inputs or outputs another dtype or shape by design.

    Returns:
        A decorator that turns the function into a pass class. It raises PassError if the function takes no graph, or
        has a parameter that cannot be an option.
    """

    def declare(function: Callable[..., Any]) -> type[Pass]:
        def run(self: Pass, model: onnx_ir.Model) -> PassResult:
            bridge = optional_module("passopt.passes.guests.graphsurgeon", name)
            result: PassResult = bridge.run_graphsurgeon(
                model, name, lambda graph: function(graph, **_options_of(self))
            )
            return result

        facts = {"name": name, "accuracy": accuracy, "after": after, "changes_interface": changes_interface}
        return _pass_class(function, 1, {**facts, "run": run})

    return declare


@overload
def ir_pass(
    name: str,
    factory: None = None,
    *,
    accuracy: Accuracy = EXACT,
    after: tuple[str, ...] = (),
    changes_interface: bool = False,
) -> Callable[[_Factory], type[Pass]]: ...


@overload
def ir_pass(
    name: str,
    factory: _Factory,
    *,
    accuracy: Accuracy = EXACT,
    after: tuple[str, ...] = (),
    changes_interface: bool = False,
) -> type[Pass]: ...


def ir_pass(
    name: str,
    factory: _Factory | None = None,
    *,
    accuracy: Accuracy = EXACT,
    after: tuple[str, ...] = (),
    changes_interface: bool = False,
) -> Callable[[_Factory], type[Pass]] | type[Pass]:
    """Declare an onnx-ir pass, in place or functional, as a pass of passopt.

    Either `ir_pass("lift", LiftPass)`, which has no options; or a decorator of a factory, whose keyword parameters are
    the options. Whether the model changed is read off its text; the guest's own word is not relied on.

    Args:
        name: The name of the pass on the command line.
        factory: What makes the onnx-ir pass; None for use as a decorator.
        accuracy: How exactly the changed graph computes what the old one did, checked by `--verify-each=numeric`.
        after: Passes that must come earlier if they are in the pipeline at all.
        changes_interface: True if the pass gives graph inputs or outputs another dtype or shape by design.

    Returns:
        The pass class; or the decorator, if there is no `factory`.

    Raises:
        PassError: If the factory has a parameter that cannot be an option; as a decorator, when it is applied.
    """

    def declare(made_by: _Factory) -> type[Pass]:
        def run(self: Pass, model: onnx_ir.Model) -> PassResult:
            from passopt.passes.guests.ir_passes import run_ir_pass

            return run_ir_pass(model, name, made_by(**_options_of(self)))

        facts = {"name": name, "accuracy": accuracy, "after": after, "changes_interface": changes_interface}
        return _pass_class(made_by, None if factory else 0, {**facts, "run": run})

    return declare(factory) if factory is not None else declare


def optional_module(module: str, owner: str) -> Any:
    """Import a module of passopt that needs an optional package.

    Raises UsageError, which says how to install the package, if it is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{owner}: needs {error.name}, which is not installed; pip install 'passopt[guests]' brings it"
        ) from error


def _options_of(item: Pass) -> dict[str, Any]:
    """Return the options of a pass by name."""
    assert dataclasses.is_dataclass(item)
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


def _pass_class(function: Callable[..., Any], graphs: int | None, members: Mapping[str, Any]) -> type[Pass]:
    """Make a pass class: a frozen dataclass whose fields are the parameters of `function` after the first `graphs`.

    With `graphs` None, the pass has no options.
    """
    inner = members["name"]
    fields = _fields(function, graphs, inner) if graphs is not None else []
    namespace = {
        **members,
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
    }
    return dataclasses.make_dataclass(
        function.__name__, fields, bases=(Pass,), namespace=namespace, frozen=True, kw_only=True
    )


def _fields(function: Callable[..., Any], graphs: int, name: str) -> Sequence[tuple[str, Any, Any]]:
    """Return (name, type, default) for every option. Raises PassError for a parameter that cannot be one."""
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < graphs:
        raise PassError(f"{name} ({_where(function)}): the function takes no graph")
    fields = []
    for parameter in parameters[graphs:]:
        if parameter.kind not in _OPTION_KINDS:
            raise PassError(f"{name} ({_where(function)}): *{parameter.name} cannot be an option; name each option")
        has_default = parameter.default is not inspect.Parameter.empty
        kind = parameter.annotation
        if kind is inspect.Parameter.empty:
            if not has_default or parameter.default is None:
                raise PassError(f"{name} ({_where(function)}): option {parameter.name} needs a type or a default")
            kind = type(parameter.default)
        field = dataclasses.field(default=parameter.default) if has_default else dataclasses.field()
        fields.append((parameter.name, kind, field))
    return fields


def _where(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
