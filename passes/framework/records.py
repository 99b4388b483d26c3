"""Hold what a run tells of its passes: what one pass did, what each of its rules did, and the time it took."""

from __future__ import annotations

import collections
import dataclasses


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


@dataclasses.dataclass
class PassRecord:
    """One pass of a run: what it did, in CPU seconds and nodes."""

    name: str
    result: PassResult
    seconds: float
    nodes_before: int
    nodes_after: int
    #: What `--verify-each=numeric` sampled of it.
    numeric: dict[str, object] | None = None

    def as_json(self) -> dict[str, object]:
        body: dict[str, object] = {
            "pass": self.name,
            "modified": self.result.modified,
            "matches": self.result.matches,
            "tries": self.result.tries,
            "declines": dict(self.result.declines),
            "rules": [rule.as_json() for rule in self.result.rules],
            "notes": self.result.notes,
            "cpu_seconds": round(self.seconds, 6),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }
        return body if self.numeric is None else {**body, "numeric": self.numeric}
