"""What a pass is: a frozen dataclass with a name, a docstring with Before/After, and typed fields as options.

Subclassing with a `name` registers it; two passes of one name are an error. `Decline` is a rule's one way to say no.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import inspect
from typing import ClassVar, Literal

import onnx_ir

from passopt.ir.errors import PassError

Accuracy = Literal["exact", "reassociated", "lossy"]


class Decline(Exception):
    """Raised by a rule that does not apply here, with the reason for `--stats` and explanations."""


@dataclasses.dataclass
class PassResult:
    """What one pass did. `modified` is true exactly if the canonical text changed."""

    modified: bool = False
    matches: int = 0
    tries: int = 0
    declines: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)


REGISTERED: dict[str, type[Pass]] = {}


class Pass(abc.ABC):
    """Base of all passes; subclass `RewritePass` for rules, this one for whole-graph work.

    `after` names passes that must come earlier if they are in the pipeline at all; it is validated, never sorted by.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[Accuracy] = "exact"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if name is None:
            return
        earlier = REGISTERED.get(name)
        if earlier is not None and (earlier.__module__, earlier.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PassError(f"two passes are called {name!r}: {_where(earlier)} and {_where(cls)}. Rename one of them.")
        REGISTERED[name] = cls

    @abc.abstractmethod
    def run(self, model: onnx_ir.Model) -> PassResult:
        """Change `model` in place. Raises PassError if the model or an option is wrong."""


def _where(cls: type) -> str:
    try:
        return f"{cls.__qualname__} in {inspect.getfile(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"
