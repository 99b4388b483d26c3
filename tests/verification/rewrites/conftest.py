"""Runs a pass of two functions over ONNX text under the numeric check."""

from __future__ import annotations

import pytest

from passopt.passes.framework.accuracy import EXACT
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.pipeline.runner import run_passes
from passopt.testing.checking import read_model
from passopt.verification.rewrites.check import NumericCheck

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


@pytest.fixture
def rule():
    """`rule(pattern, rewrite, accuracy)`: a pass called test-rule; both functions take `self` first, as methods do."""

    def make(pattern, rewrite, accuracy=EXACT):
        made = type("TestRule", (RewritePass,), {"pattern": pattern, "rewrite": rewrite, "accuracy": accuracy})
        made.name = "test-rule"
        return made()

    return make


@pytest.fixture
def whole():
    """`whole(run)`: a whole-graph pass from a function of the model."""

    def make(run, **facts):
        def apply(self, model):
            run(model)
            return PassResult(modified=True, matches=1)

        made = type("Whole", (Pass,), {"run": apply, **facts})
        made.name = "whole"
        return made()

    return make


@pytest.fixture
def parsed():
    """A model from ONNX text without its first line; `random` weights are allowed."""
    return lambda text: read_model(HEADER + text)


@pytest.fixture
def checked():
    """Run one pass under the numeric check; returns what was sampled of it."""

    def run(item, model):
        watch = NumericCheck()
        run_passes(model, [item], instruments=[watch])
        (summary,) = watch.summaries
        return summary

    return run
