"""What a pass is: a frozen dataclass with a name, a docstring with Before/After, and typed fields as options.

Subclassing with a `name` registers it; two passes of one name are an error. `Decline` is a rule's one way to say no.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir

from passopt.ir.errors import PassError
from passopt.passes.framework.accuracy import EXACT, Accuracy
from passopt.passes.framework.records import PassResult


class Decline(Exception):
    """Raised by a rule that does not apply here, with the reason for `--stats` and explanations."""


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal:
    """Name a node that a pass over the whole graph leaves alone, and the reason; None stands for the whole graph."""

    node: onnx_ir.Node | None
    reason: str


REGISTERED: dict[str, type[Pass]] = {}


class Pass(abc.ABC):
    """Base of all passes; subclass `RewritePass` for rules, this one for whole-graph work.

    `after` names passes that must come earlier if they are in the pipeline at all; it is validated, never sorted by.
    `makes` names the operators that stand for the pass's success, such as "Attention" or "passopt::AlibiAttention":
    expectations count them in the final graph instead of the matches; before a pass that `decomposes` them, if one is
    asked for.
    `accuracy` is EXACT, REASSOCIATED or lossy(budget), and checked by `--verify-each=numeric`. A pass that gives graph
    inputs or outputs another dtype or shape by design `changes_interface`.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[str, ...]] = ()
    decomposes: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[Accuracy] = EXACT
    changes_interface: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if name is None:
            return
        if not isinstance(cls.accuracy, Accuracy):
            raise PassError(f"{_where(cls)}: accuracy {cls.accuracy!r} is none of EXACT, REASSOCIATED, lossy(budget)")
        earlier = REGISTERED.get(name)
        if earlier is not None and (earlier.__module__, earlier.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PassError(f"two passes are called {name!r}: {_where(earlier)} and {_where(cls)}. Rename one of them.")
        REGISTERED[name] = cls

    @abc.abstractmethod
    def run(self, model: onnx_ir.Model) -> PassResult:
        """Change `model` in place. Raises PassError if the model or an option is wrong."""

    def explain(self, model: onnx_ir.Model) -> Iterable[Refusal]:
        """Say where the pass would do nothing, and why, for `passopt why`; `model` is not changed.

        Only passes over the whole graph need this: rules are explained by laying their patterns over the graph.
        """
        return ()


def _where(cls: type) -> str:
    try:
        return f"{cls.__qualname__} in {inspect.getfile(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"
