"""Hold models: graphs (`graph`), files and canonical text (`serialization`), and lazy weights (`weights`).

This is the lowest layer of passopt: it builds on onnx-ir and imports no other passopt package. The names below are its
public interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passopt.ir.lazy_names import lazy_names

if TYPE_CHECKING:
    from passopt.ir.errors import (
        CheckError,
        ExpectationError,
        ModelError,
        PassError,
        PassoptError,
        UsageError,
        VerifyError,
    )
    from passopt.ir.graph.builder import Builder
    from passopt.ir.graph.editor import Editor
    from passopt.ir.serialization.model_files import load_model
    from passopt.ir.serialization.text import parse_model, print_model
    from passopt.ir.weights.expressions import Expression
    from passopt.ir.weights.lazy_weight import LazyWeight

__all__ = [
    "Builder",
    "CheckError",
    "Editor",
    "ExpectationError",
    "Expression",
    "LazyWeight",
    "ModelError",
    "PassError",
    "PassoptError",
    "UsageError",
    "VerifyError",
    "load_model",
    "parse_model",
    "print_model",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckError": "passopt.ir.errors",
        "ExpectationError": "passopt.ir.errors",
        "ModelError": "passopt.ir.errors",
        "PassError": "passopt.ir.errors",
        "PassoptError": "passopt.ir.errors",
        "UsageError": "passopt.ir.errors",
        "VerifyError": "passopt.ir.errors",
        "Builder": "passopt.ir.graph.builder",
        "Editor": "passopt.ir.graph.editor",
        "load_model": "passopt.ir.serialization.model_files",
        "parse_model": "passopt.ir.serialization.text",
        "print_model": "passopt.ir.serialization.text",
        "Expression": "passopt.ir.weights.expressions",
        "LazyWeight": "passopt.ir.weights.lazy_weight",
    },
)
