"""`passopt why`: where the rules of a pass came near, and what kept them from matching."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from passopt.ir.errors import UsageError
from passopt.ir.serialization.model_files import load_model
from passopt.passes.explain.node_report import explain_node
from passopt.passes.explain.report import explain
from passopt.passes.framework.base import Pass
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import Resolved, parse_steps, resolve


def why(options: argparse.Namespace) -> int:
    """Run what comes before, then explain; the model is not written."""
    before, item = _chosen(options)
    model = load_model(options.model)
    run_passes(model, before)
    if options.node is None:
        report = explain(item, model, [step.name for step in before] if options.pipeline is None else item.after)
        print(json.dumps(report.as_json(), indent=2) if options.json else "\n".join(report.lines(options.limit)))
        return 0
    if not isinstance(item, RewritePass):
        raise UsageError(f"{item.name} has no rules that could be tried at a node; leave --node away")
    found = explain_node(item, model, options.node)
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join(found.lines()))
    return 0


def _chosen(options: argparse.Namespace) -> tuple[Sequence[Pass], Pass]:
    """The passes to run first, and the pass to explain. Raises UsageError."""
    before = list(resolve(options.after).passes) if options.after else []
    if options.pipeline is None:
        return before, _single(options.name)
    item = _single(options.name)
    (step,) = parse_steps(options.name)
    pipeline = resolve(options.pipeline)
    names = [item.name for item in pipeline.passes]
    if step.name not in names:
        raise UsageError("--in: " + unknown_name(f"pass of {options.pipeline}", step.name, names))
    place = names.index(step.name)
    return [*before, *pipeline.passes[:place]], item if step.options else pipeline.passes[place]


def _single(text: str) -> Pass:
    steps = parse_steps(text)
    if len(steps) != 1:
        raise UsageError(f"{text!r} is a pipeline; why explains one pass, the others go into --after")
    if steps[0].name in PIPELINES:
        found: Resolved = resolve(text)
        inside = ", ".join(dict.fromkeys(item.name for item in found.passes))
        raise UsageError(f"{steps[0].name} is a pipeline; choose one of its passes with --in {text}: {inside}")
    (item,) = resolve(text).passes
    return item
