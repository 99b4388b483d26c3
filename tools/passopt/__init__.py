"""Compile ONNX graphs of language models by rewriting them: ordered, explainable passes, and what surrounds them.

>>> import passopt
>>> model = passopt.load("baichuan2")
>>> result = passopt.run(model, "baichuan2,tp{degree=2},int8", "sharded")
>>> passopt.verify(model, "sharded").ok
True

Every command of the command line is one of the functions below. Passes are written with `passopt.passes`, graphs are
edited with `passopt.ir`, and passes are tested with `passopt.testing`. Importing this package imports nothing heavy:
names are looked up when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passopt.ir.lazy_names import lazy_names
from passopt.ir.version import __version__

if TYPE_CHECKING:
    from passopt.api.calibrate import CalibrateResult, calibrate
    from passopt.api.catalogue import Catalogue, list_passes
    from passopt.api.compile import CompileResult, compile
    from passopt.api.evaluate import evaluate, lm_eval_model
    from passopt.api.explain import Explanation, explain
    from passopt.api.export import ExportResult, export
    from passopt.api.export_checkpoint import ExportCheckpointResult, export_checkpoint
    from passopt.api.generate import Engine, generate
    from passopt.api.generate_result import GenerateResult, Request
    from passopt.api.model import Model, SaveResult, load, print_text, save
    from passopt.api.new_pass import NewPass, new_pass
    from passopt.api.plan import PlanResult, plan
    from passopt.api.provenance import Provenance, provenance
    from passopt.api.replay import ReplayResult, replay
    from passopt.api.run import RunResult, run
    from passopt.api.verify import verify
    from passopt.api.why import WhyResult, why
    from passopt.evaluation.report import EvalReport
    from passopt.ir.errors import (
        CheckError,
        ExpectationError,
        ModelError,
        PassError,
        PassoptError,
        PluginWarning,
        UsageError,
        VerifyError,
    )
    from passopt.reporting.reporter import Reporter
    from passopt.verification.report import VerifyReport

__all__ = [
    "CalibrateResult",
    "Catalogue",
    "CheckError",
    "CompileResult",
    "Engine",
    "EvalReport",
    "ExpectationError",
    "Explanation",
    "ExportCheckpointResult",
    "ExportResult",
    "GenerateResult",
    "Model",
    "ModelError",
    "NewPass",
    "PassError",
    "PassoptError",
    "PlanResult",
    "PluginWarning",
    "Provenance",
    "ReplayResult",
    "Reporter",
    "Request",
    "RunResult",
    "SaveResult",
    "UsageError",
    "VerifyError",
    "VerifyReport",
    "WhyResult",
    "__version__",
    "calibrate",
    "compile",
    "evaluate",
    "explain",
    "export",
    "export_checkpoint",
    "generate",
    "list_passes",
    "lm_eval_model",
    "load",
    "new_pass",
    "plan",
    "print_text",
    "provenance",
    "replay",
    "run",
    "save",
    "verify",
    "why",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CalibrateResult": "passopt.api.calibrate",
        "calibrate": "passopt.api.calibrate",
        "Catalogue": "passopt.api.catalogue",
        "list_passes": "passopt.api.catalogue",
        "CompileResult": "passopt.api.compile",
        "compile": "passopt.api.compile",
        "evaluate": "passopt.api.evaluate",
        "Explanation": "passopt.api.explain",
        "explain": "passopt.api.explain",
        "ExportResult": "passopt.api.export",
        "export": "passopt.api.export",
        "ExportCheckpointResult": "passopt.api.export_checkpoint",
        "export_checkpoint": "passopt.api.export_checkpoint",
        "Engine": "passopt.api.generate",
        "GenerateResult": "passopt.api.generate_result",
        "Request": "passopt.api.generate_result",
        "generate": "passopt.api.generate",
        "lm_eval_model": "passopt.api.evaluate",
        "Model": "passopt.api.model",
        "SaveResult": "passopt.api.model",
        "load": "passopt.api.model",
        "print_text": "passopt.api.model",
        "save": "passopt.api.model",
        "NewPass": "passopt.api.new_pass",
        "new_pass": "passopt.api.new_pass",
        "PlanResult": "passopt.api.plan",
        "plan": "passopt.api.plan",
        "Provenance": "passopt.api.provenance",
        "provenance": "passopt.api.provenance",
        "ReplayResult": "passopt.api.replay",
        "replay": "passopt.api.replay",
        "RunResult": "passopt.api.run",
        "run": "passopt.api.run",
        "verify": "passopt.api.verify",
        "WhyResult": "passopt.api.why",
        "why": "passopt.api.why",
        "EvalReport": "passopt.evaluation.report",
        "CheckError": "passopt.ir.errors",
        "ExpectationError": "passopt.ir.errors",
        "ModelError": "passopt.ir.errors",
        "PassError": "passopt.ir.errors",
        "PassoptError": "passopt.ir.errors",
        "PluginWarning": "passopt.ir.errors",
        "UsageError": "passopt.ir.errors",
        "VerifyError": "passopt.ir.errors",
        "Reporter": "passopt.reporting.reporter",
        "VerifyReport": "passopt.verification.report",
    },
    modules=("ir", "passes", "testing"),
)
