"""Parse pipeline text, such as `tp{degree=4},int8` or `shard{degree=2,pad=true},dead-code`, into passes.

The syntax is that of MLIR. Named pipelines expand to their steps. The text of an option is converted to the type of the
field that the pass has for it.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from passopt.ir.errors import PassError, PassoptError, UsageError
from passopt.passes.framework.base import REGISTERED, Pass
from passopt.passes.framework.catalog import catalog, pass_class, unknown_pass
from passopt.passes.framework.defects import failure
from passopt.passes.framework.source_entries import option_name
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.pipeline.named import PIPELINES, Pipeline

_STEP = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|\Z)")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of pipeline text: the name of a pass or pipeline, and its options as pairs of texts."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}{{{inside}}}" if inside else self.name


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A pipeline that is ready to run.

    Attributes:
        text: The pipeline text as given.
        steps: The steps of that text, before named pipelines are expanded.
        passes: The passes to run, in order, with named pipelines expanded.
        expectations: The expectations of the named pipelines in the text, such as `fuse-attention==num_layers`.
    """

    text: str
    steps: tuple[Step, ...]
    passes: tuple[Pass, ...]
    expectations: tuple[str, ...]

    @property
    def expanded(self) -> str:
        """Return the expanded pipeline as text: every pass with the values of all its options."""
        return ",".join(describe(item) for item in self.passes)


def resolve(text: str, *, complete: bool = True) -> Resolved:
    """Parse pipeline text, expand named pipelines, and make the passes with their options.

    Args:
        text: Passes and named pipelines, separated by commas, such as `baichuan2,tp{degree=4},int8`.
        complete: Check that every pass stands after those that its `after` names. False if the text is only a part of
            a longer pipeline, whose other passes are not seen here.

    Returns:
        The passes to run, and the expectations of the named pipelines.

    Raises:
        UsageError: If the text cannot be parsed, a pass, pipeline or option is unknown, a value is of the wrong type,
            or the order is wrong. The message shows the position or suggests a similar name.

    Example:
        ``run_passes(model, resolve("fuse,shard{degree=2}").passes)``
    """
    steps = parse_steps(text)
    passes: list[Pass] = []
    expectations: list[str] = []
    for step in steps:
        pipeline = PIPELINES.get(step.name)
        if pipeline is None:
            passes.append(instantiate(step))
            continue
        passes += [instantiate(inner) for inner in expand(step, pipeline)]
        expectations += pipeline.expectations
        values = option_values(step, pipeline)
        expectations += [wanted for key, value, wanted in pipeline.expected_with if values[key] == value]
    if complete:
        check_order(passes)
    return Resolved(text, steps, tuple(passes), tuple(expectations))


def parse_steps(text: str) -> tuple[Step, ...]:
    """Parse `a,b{key=value}` into steps; raise UsageError that points at the first character that does not fit."""
    steps, position = [], 0
    if not text.strip():
        raise UsageError("the pipeline is empty; give `passes`, such as 'tp{degree=2},int8'")
    while position < len(text):
        found = _STEP.match(text, position)
        if found is None:
            raise UsageError(
                f"pipeline text is not 'a,b{{key=value}}' at position {position}:\n  {text}\n  {'':{position}}^"
            )
        steps.append(Step(found[1], _parse_options(found[1], found[2] or "")))
        position = found.end()
    return tuple(steps)


def _parse_options(name: str, text: str) -> tuple[tuple[str, str], ...]:
    """Parse `key=value,key=value`, the options of the step `name`."""
    pairs: list[tuple[str, str]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = item.partition("=")
        if not separator:
            raise UsageError(f"{name}: option {item!r} has no value; write {item}=…")
        key = key.strip().replace("-", "_")
        if key in dict(pairs):
            raise UsageError(f"{name}: option {key} is given twice")
        pairs.append((key, value.strip()))
    return tuple(pairs)


def option_values(step: Step, pipeline: Pipeline) -> dict[str, str]:
    """Return the values of all options of a named pipeline, as given in the step or by default.

    Raises:
        UsageError: If the step gives an option that the pipeline does not have.
    """
    values = dict(pipeline.options)
    for key, value in step.options:
        if key not in values:
            raise UsageError(f"{step.name}: {unknown_name('option', key, list(values))}")
        values[key] = value
    return values


def expand(step: Step, pipeline: Pipeline) -> list[Step]:
    """Return the steps of a named pipeline, with the values of its options filled in for `$option`."""
    values = option_values(step, pipeline)
    steps = []
    for inner in pipeline.steps:
        (parsed,) = parse_steps(inner)
        options = tuple((key, values[value[1:]] if value.startswith("$") else value) for key, value in parsed.options)
        steps.append(Step(parsed.name, options))
    return steps


def instantiate(step: Step) -> Pass:
    """Make the pass of a step.

    Raises:
        UsageError: If the pass or an option is unknown, a value is of the wrong type, or a value is missing for an
            option without a default.
    """
    if step.name not in REGISTERED and step.name not in catalog():
        raise unknown_pass(step.name, PIPELINES)
    cls = pass_class(step.name)
    if not dataclasses.is_dataclass(cls):
        raise UsageError(
            f"{step.name}: {cls.__qualname__} is not a dataclass; decorate it with @dataclass(frozen=True)"
        )
    try:
        types_of = typing.get_type_hints(cls)
    except Exception as error:  # an annotation names what its module does not have
        raise PassError(f"{step.name}: the types of its options cannot be read: {error!r}") from error
    names = {option_name(field.name): field.name for field in dataclasses.fields(cls)}
    values = {}
    for key, text in step.options:
        if key not in names:
            raise UsageError(f"{step.name}: {unknown_name('option', key, list(names))}")
        values[names[key]] = _convert(step.name, key, text, types_of[names[key]])
    needed = [field.name for field in dataclasses.fields(cls) if field.init and _has_no_default(field)]
    missing = [option_name(name) for name in needed if name not in values]
    if missing:
        raise UsageError(f"{step.name}: needs a value for {', '.join(missing)}: {step.name}{{{missing[0]}=…}}")
    try:
        return cls(**values)
    except PassoptError:
        raise
    except Exception as error:
        raise PassError(f"{step}: making the pass {failure(error, cls.__init__)}") from error


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(owner: str, key: str, text: str, kind: Any) -> Any:
    """Convert the text of option `key` of the pass `owner` to the type `kind`, or raise UsageError."""

    def wrong(expected: str) -> UsageError:
        return UsageError(f"{owner}: option {key}={text} is not {expected}")

    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if text == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        if text not in {"true", "false"}:
            raise wrong("true or false")
        return text == "true"
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if text not in choices:
            raise wrong(f"one of {', '.join(choices)}")
        return typing.get_args(kind)[choices.index(text)]
    if kind in {int, float}:
        try:
            return kind(text)
        except ValueError:
            raise wrong("an integer" if kind is int else "a number") from None
    if kind is str:
        return text
    raise UsageError(f"{owner}: option {key} has type {kind}, which pipeline text cannot give")


def describe(item: Pass) -> str:
    """Return a pass with the values of all its options as pipeline text."""
    if not dataclasses.is_dataclass(item):
        return item.name
    pairs = ((option_name(field.name), getattr(item, field.name)) for field in dataclasses.fields(item))
    return str(Step(item.name, tuple((key, _option_text(value)) for key, value in pairs)))


def _option_text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def check_order(passes: Sequence[Pass]) -> None:
    """Raise UsageError if a pass stands before one that its `after` names; the order itself is never changed."""
    names = [item.name for item in passes]
    for index, item in enumerate(passes):
        for earlier in item.after:
            if earlier in names[index + 1 :] and earlier not in names[:index]:
                raise UsageError(
                    f"{item.name} stands before {earlier}, but must come after it; "
                    f"the order given was: {','.join(names)}"
                )
