"""Hold the results of a run: what each pass and each of its rules did, and how much CPU time it took."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class RuleStatistics:
    """The statistics of one rule of a pass in one run.

    Attributes:
        name: The name of the rule's pattern method.
        source: The `file:line` of the pattern method.
        tries: How many times the rule was tried at a node of the right operator.
        hits: How many times it was applied.
        declines: The nodes where the pattern matched but the rule declined when last tried, counted by reason.
        seconds: The CPU seconds that it took; None unless the run was asked to time rules.
    """

    name: str
    source: str
    tries: int
    hits: int
    declines: collections.Counter[str]
    seconds: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return the statistics as JSON-compatible values; `cpu_seconds` only if the rule was timed."""
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
    """The result of one run of a pass, which `Pass.run` returns.

    Attributes:
        modified: True exactly if the pass changed the printed text of the model (`passopt print`).
        matches: How many changes the pass made. For a pass of rules, the number of rewrites that were applied.
        tries: How many nodes were examined as places for a change.
        declines: The places where a rule matched but declined, counted by reason.
        notes: Short texts for the user, which `passopt run` prints, such as "14 tensors sharded".
        rules: The statistics of every rule; empty for whole-graph passes.

    Example:
        ``return PassResult(modified=removed > 0, matches=removed)``
    """

    modified: bool = False
    matches: int = 0
    tries: int = 0
    declines: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)
    rules: list[RuleStatistics] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class PassRecord:
    """One pass of a run, as `run_passes` and `passopt.run` record it.

    Attributes:
        name: The name of the pass.
        result: What the pass reported: matches, declines and notes.
        seconds: The CPU seconds that it took.
        nodes_before: Nodes of the main graph before it.
        nodes_after: Nodes of the main graph after it.
        numeric: The findings of `--verify-each=numeric` for this pass; None if it did not run.
    """

    name: str
    result: PassResult
    seconds: float
    nodes_before: int
    nodes_after: int
    numeric: dict[str, object] | None = None

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON-compatible values, with the numbers rounded as they are reported."""
        body: dict[str, object] = {
            "pass": self.name,
            "modified": self.result.modified,
            "matches": self.result.matches,
            "tries": self.result.tries,
            "declines": dict(self.result.declines),
            "rules": [rule.to_json() for rule in self.result.rules],
            "notes": self.result.notes,
            "cpu_seconds": round(self.seconds, 6),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }
        return body if self.numeric is None else {**body, "numeric": self.numeric}
