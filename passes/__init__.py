"""Rewrite graphs: the framework that passes are written in, and a room for each kind of pass.

An author of passes imports the names below from here and nothing deeper; see CONTRIBUTING. Guests written for other
frameworks are declared by `passopt.passes.guests`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passopt.ir.lazy_names import lazy_names

if TYPE_CHECKING:
    from passopt.ir.graph.run_context import RewriteLimit
    from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, QualityBar, lossy
    from passopt.passes.framework.base import Decline, Pass, Refusal
    from passopt.passes.framework.records import PassRecord, PassResult
    from passopt.passes.patterns.rewrite_pass import RewritePass
    from passopt.passes.patterns.rules import Rewriter
    from passopt.passes.pipeline.expectations import Expectation
    from passopt.passes.pipeline.runner import Instrument, run_passes
    from passopt.passes.pipeline.text import Resolved, resolve

__all__ = [
    "EXACT",
    "REASSOCIATED",
    "Decline",
    "Expectation",
    "Instrument",
    "Pass",
    "PassRecord",
    "PassResult",
    "QualityBar",
    "Refusal",
    "Resolved",
    "RewriteLimit",
    "RewritePass",
    "Rewriter",
    "lossy",
    "resolve",
    "run_passes",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RewriteLimit": "passopt.ir.graph.run_context",
        "Resolved": "passopt.passes.pipeline.text",
        "Expectation": "passopt.passes.pipeline.expectations",
        "Instrument": "passopt.passes.pipeline.runner",
        "EXACT": "passopt.passes.framework.accuracy",
        "REASSOCIATED": "passopt.passes.framework.accuracy",
        "QualityBar": "passopt.passes.framework.accuracy",
        "lossy": "passopt.passes.framework.accuracy",
        "Decline": "passopt.passes.framework.base",
        "Pass": "passopt.passes.framework.base",
        "Refusal": "passopt.passes.framework.base",
        "PassRecord": "passopt.passes.framework.records",
        "PassResult": "passopt.passes.framework.records",
        "RewritePass": "passopt.passes.patterns.rewrite_pass",
        "Rewriter": "passopt.passes.patterns.rules",
        "run_passes": "passopt.passes.pipeline.runner",
        "resolve": "passopt.passes.pipeline.text",
    },
)
