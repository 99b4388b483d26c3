"""Explain why a pass did not match: find where its rules came near and what kept them from matching (`passopt.why`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from passopt.api.model import ModelLike, changeable
from passopt.ir.errors import UsageError
from passopt.passes.explain.node_report import NodeReport, explain_node
from passopt.passes.explain.report import LIMIT, Report, explain
from passopt.passes.framework.base import Pass
from passopt.passes.framework.catalog import catalog
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import describe, parse_steps, resolve
from passopt.reporting.result import Result


@dataclasses.dataclass(frozen=True, repr=False)
class WhyResult(Result):
    """The result of `why`: where a pass matched and where it did not.

    Attributes:
        report: The report on the whole graph, or on one node.
    """

    report: Report | NodeReport

    @property
    def ok(self) -> bool:
        """Return whether the pass matched anything; for a report on one node, return True."""
        return isinstance(self.report, NodeReport) or bool(self.report.matched)

    @property
    def matched(self) -> int | None:
        """Return how often the pass matched; None if the pass failed, or if the report is on one node."""
        return self.report.matched if isinstance(self.report, Report) else None

    def to_text(self, limit: int = LIMIT) -> str:
        """Return the report as text, the nearest misses first.

        Args:
            limit: The number of kinds of misses to show, 0 for all.
        """
        lines = self.report.lines(limit) if isinstance(self.report, Report) else self.report.lines()
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return self.report.to_json()


def why(
    name: str | Pass, model: ModelLike, *, node: str | None = None, after: str | None = None, within: str | None = None
) -> WhyResult:
    """Explain why a pass did not match: the nearest misses, expected against found, with the exporter's source line.

    Args:
        name: The pass, with its options, such as `"quantize-weights{head=true}"`.
        model: A model, or its path. It is not changed.
        node: The name of a node, or of a value: explain all rules at this node.
        after: A pipeline to run first.
        within: A pipeline that contains the pass: its passes before the pass run first.

    Returns:
        A report on the whole graph, or on the node if one is named.

    Raises:
        UsageError: A name is unknown, `name` is a pipeline, or the pass has no rules to try at a node.
        ModelError: There is no model at the path, or it is damaged.
        PassError: One of the passes that run first cannot work on this model.
    """
    before, item = _chosen(name, after, within)
    found = changeable(model).ir
    run_passes(found, before)
    if node is None:
        return WhyResult(explain(item, found, [step.name for step in before] if within is None else item.after))
    if not isinstance(item, RewritePass):
        raise UsageError(f"{item.name} has no rules that could be tried at a node; leave `node` away")
    return WhyResult(explain_node(item, found, node))


def _chosen(name: str | Pass, after: str | None, within: str | None) -> tuple[Sequence[Pass], Pass]:
    """Return the passes to run first, and the pass to explain.

    Raises:
        UsageError: A name is unknown, or `name` is a pipeline.
    """
    before = list(resolve(after).passes) if after else []
    item = _single(name)
    if within is None:
        return before, item
    (step,) = parse_steps(name if isinstance(name, str) else describe(item))
    pipeline = resolve(within)
    names = [item.name for item in pipeline.passes]
    if step.name not in names:
        outside = (
            f"; it is no part of that pipeline: explain it after {within}, with `after`"
            if step.name in catalog()
            else ""
        )
        raise UsageError("`within`: " + unknown_name(f"pass of {within}", step.name, names) + outside)
    place = names.index(step.name)
    return [*before, *pipeline.passes[:place]], item if step.options else pipeline.passes[place]


def _single(text: str | Pass) -> Pass:
    if isinstance(text, Pass):
        return text
    if not isinstance(text, str):
        raise UsageError(f"why takes the name of a pass, or a pass, and then the model; {text!r} is neither")
    steps = parse_steps(text)
    if len(steps) != 1:
        raise UsageError(f"{text!r} is a pipeline; why explains one pass, the others go into `after`")
    if steps[0].name in PIPELINES:
        inside = ", ".join(dict.fromkeys(item.name for item in resolve(text).passes))
        raise UsageError(f"{steps[0].name} is a pipeline; choose one of its passes with `within={text}`: {inside}")
    (item,) = resolve(text).passes
    return item
