"""Report why a pass did not apply: every place where one of its rules came near, nearest first.

The model is never changed. Rules are explained by `nearest`. A pass over the whole graph explains itself
(`Pass.explain`), or by what its run says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import PassError, PassoptError
from passopt.ir.graph.completion import complete_types
from passopt.passes.explain.differences import operator
from passopt.passes.explain.misses import Group, Miss, grouped
from passopt.passes.explain.sites import misses
from passopt.passes.framework.base import Pass
from passopt.passes.framework.defects import NEXT_STEP, failure
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.language import outputs_of
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import rules_of

#: How many groups a report shows: about 20 lines with their differences.
LIMIT = 4
#: How many differences of the nearest group are shown; of the others, one is.
_DETAILS = 3
#: How many groups are shown where none is near and nothing matched.
_FAR = 2


@dataclasses.dataclass(frozen=True)
class Report:
    """The explanation of one pass on one model; `matched` is None if the pass did not finish.

    `idle` names the rules that no node could start. It comes last where something came near, since that is the reason.
    """

    name: str
    matched: int | None
    groups: tuple[Group, ...]
    remarks: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def lines(self, limit: int = LIMIT) -> list[str]:
        """Return readable text: a headline, the nearest groups, and how many more there are.

        With `limit` 0, all groups are shown.
        """
        near = [group for group in self.groups if group.example.is_near]
        declined = sum(len(group.misses) for group in near if group.example.reason is not None)
        places = sum(len(group.misses) for group in near) - declined
        matched = "did not finish" if self.matched is None else f"matched {self.matched} times"
        return [f"{self.name}: {matched}, declined {declined} times, came near at {places} places", *self.body(limit)]

    def body(self, limit: int = LIMIT) -> list[str]:
        """Return the lines below the headline."""
        near = [group for group in self.groups if group.example.is_near]
        far = [] if self.matched else list(self.groups[: min(limit, _FAR)])
        shown = list(self.groups) if not limit else near[:limit] or far
        lines = [*self.remarks, *(() if near else self.idle)]
        for index, group in enumerate(shown, 1):
            first, *rest = group.lines(_DETAILS if index == 1 else 1)
            lines += [f"{index}. {first}", *rest]
        left = self.groups[len(shown) :]
        if left:
            places = sum(len(group.misses) for group in left)
            kinds = (
                f"and {places} places of {len(left)} more kinds" if shown else f"{places} places of {len(left)} kinds"
            )
            lines.append(f"{kinds}, less near (`limit=0` shows all)")
        return [*lines, *(self.idle if near else ())]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, the remarks and every group with all its differences."""
        return {
            "pass": self.name,
            "matched": self.matched,
            "remarks": [*self.remarks, *self.idle],
            "groups": [group.to_json() for group in self.groups],
        }


def explain(item: Pass, model: onnx_ir.Model, before: Sequence[str] = ()) -> Report:
    """Run the pass on a copy and explain what it left.

    Args:
        item: The pass.
        model: The model, which is not changed.
        before: The names of the passes that ran on the model; the report says which others belong before this one.

    Returns:
        The report. A place that fits only after other rewrites of the pass counts as matched. If the pass fails, its
        error is the first thing that the report explains.
    """
    copy = model.clone()
    try:
        result = item.run(copy)
    except PassoptError as error:
        return _report_of_failure(item, model, f"the pass fails on this model: {error}")
    except Exception as error:  # a defect of the pass is what its author asks about
        return _report_of_failure(item, model, f"the pass {failure(error, type(item).run)}")
    report = explain_rest(item, copy if isinstance(item, RewritePass) else model, result)
    missing = [name for name in item.after if name not in before]
    if not missing or (report.matched and not any(group.example.is_near for group in report.groups)):
        return report
    remark = f"{item.name} belongs after {', '.join(missing)}; give a pipeline with `within`, or passes with `after`"
    return dataclasses.replace(report, remarks=(remark, *report.remarks))


def explain_rest(item: Pass, model: onnx_ir.Model, result: PassResult) -> Report:
    """Explain what a pass that ran with `result` left in `model`.

    For a pass over the whole graph, `model` may also be the model as it was before the run.
    """
    if isinstance(item, RewritePass):
        report = _report(item, result.matches, misses(item, model), [])
        return dataclasses.replace(report, idle=tuple(_rules_that_never_start(item, result)))
    reasons = [Miss(item.name, None, reason=reason) for reason in result.declines.elements()]
    return _report(item, result.matches, [*reasons, *_refusals(item, model)], _remarks(item, result))


def _report(item: Pass, matched: int | None, found: Iterable[Miss], remarks: Sequence[str]) -> Report:
    return Report(item.name, matched, tuple(grouped(found)), tuple(remarks))


def _refusals(item: Pass, model: onnx_ir.Model) -> list[Miss]:
    """Return what a pass over the whole graph says about itself, as misses of a rule named like the pass."""
    try:
        return [Miss(item.name, refusal.node, reason=refusal.reason) for refusal in item.explain(model)]
    except PassoptError:
        raise
    except Exception as error:
        raise PassError(f"{item.name}: its explain {failure(error, type(item).explain)}\n{NEXT_STEP}") from error


def _report_of_failure(item: Pass, model: onnx_ir.Model, reason: str) -> Report:
    """Report that the pass fails on this model, for this reason, and where its rules come near."""
    copy = model.clone()
    complete_types(copy)
    found = misses(item, copy) if isinstance(item, RewritePass) else _refusals(item, model)
    failed = Miss(item.name, _node_named_in(reason, copy), reason=reason)
    return _report(item, None, [failed, *found], [])


def _node_named_in(text: str, model: onnx_ir.Model) -> onnx_ir.Node | None:
    """Return the node that a message names in quotes, so that the report can say where it comes from."""
    quoted = set(re.findall(r"'([^']+)'", text))
    return next((node for node in model.graph if quoted.intersection({node.name, node.outputs[0].name})), None)


def _remarks(item: Pass, result: PassResult) -> list[str]:
    """Return what a pass over the whole graph says about its own run."""
    changed = "it changes this one" if result.modified else "it changes nothing here"
    return [f"{item.name} works on the whole graph, by no rule that could come near; {changed}", *result.notes]


def _rules_that_never_start(item: RewritePass, result: PassResult) -> list[str]:
    """Name, in one line, the rules that no node of the graph could start."""
    idle: dict[str, None] = {}
    for rule, statistics in zip(rules_of(item), result.rules):
        if not statistics.tries:
            roots = dict.fromkeys(operator(root.node) for root in outputs_of(rule.pattern.roots[0]))
            idle[f"{' or '.join(roots)} ({rule.name})"] = None
    return [f"the graph has none of the operators at which these rules start: {', '.join(idle)}"] if idle else []
