"""What a pass is: a frozen dataclass with a name, a docstring with Before/After, and typed fields as options.

Subclassing with a `name` registers it; two passes of one name are an error. `Decline` is a rule's one way to say no.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import onnx_ir

from passopt.ir.errors import PassError

if TYPE_CHECKING:
    from passopt.passes.misses import Miss

DataType = onnx_ir.DataType

#: Largest error of one rewrite by the dtype of the value: a rounding step of a sum that a kernel blocks otherwise.
_EXACT: Mapping[DataType, float] = {DataType.FLOAT: 1e-6, DataType.FLOAT16: 1e-3, DataType.BFLOAT16: 8e-3}
#: The same sums in another order, intermediate values in fp32 or not.
_REASSOCIATED: Mapping[DataType, float] = {DataType.FLOAT: 1e-5, DataType.FLOAT16: 5e-3, DataType.BFLOAT16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A declaration, printed as `exact`, `reassociated` or `lossy(0.02)`; made by the names below."""

    kind: str
    budget: float | None = None

    def budget_of(self, dtype: DataType) -> float:
        """The largest relative error that the declaration allows a value of `dtype`; 0 for integers unless lossy."""
        if self.budget is not None:
            return self.budget
        table = _EXACT if self.kind == "exact" else _REASSOCIATED
        return table.get(dtype, table[DataType.FLOAT] if dtype == DataType.DOUBLE else 0.0)

    def __str__(self) -> str:
        return self.kind if self.budget is None else f"{self.kind}({self.budget:g})"


#: The same numbers, but for roundings that depend on how a kernel blocks its sums.
EXACT = Accuracy("exact")
#: Equal in exact arithmetic: sums in another order, intermediate values of another precision.
REASSOCIATED = Accuracy("reassociated")


def lossy(budget: float) -> Accuracy:
    """Other numbers by design, within `budget` for every value that the pass replaces."""
    if not 0 < budget < 1:
        raise ValueError(f"a lossy pass needs a budget between 0 and 1, not {budget}")
    return Accuracy("lossy", budget)


class Decline(Exception):
    """Raised by a rule that does not apply here, with the reason for `--stats` and explanations."""


#: `Model.meta` key: true while rules are to take their own time, which slows them a little.
TIME_RULES = "passopt.time_rules"


@dataclasses.dataclass
class RuleStatistics:
    """What one rule of a pass did. `source` is the file:line of its pattern, `seconds` CPU time, if that was asked for.

    `declines` counts the nodes where it matched and declined at last, by reason.
    """

    name: str
    source: str
    tries: int
    hits: int
    declines: collections.Counter[str]
    seconds: float | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "rule": self.name,
            "source": self.source,
            "tries": self.tries,
            "hits": self.hits,
            "declines": dict(self.declines),
            **({"cpu_seconds": round(self.seconds, 6)} if self.seconds is not None else {}),
        }


@dataclasses.dataclass
class PassResult:
    """What one pass did. `modified` is true exactly if the canonical text changed."""

    modified: bool = False
    matches: int = 0
    tries: int = 0
    declines: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)
    rules: list[RuleStatistics] = dataclasses.field(default_factory=list)


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

    def explain(self, model: onnx_ir.Model) -> Iterable[Miss]:
        """For `passopt why`, of passes over the whole graph: where they would do nothing, and why. Changes nothing."""
        return ()


def _where(cls: type) -> str:
    try:
        return f"{cls.__qualname__} in {inspect.getfile(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"
