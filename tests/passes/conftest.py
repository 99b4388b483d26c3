"""Small rewrite passes made of two functions, kept out of the registry."""

from __future__ import annotations

import pytest

from passopt.ir.serialization.text import parse_model
from passopt.passes.patterns.rewrite_pass import RewritePass

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


@pytest.fixture
def rule():
    """`rule(pattern, rewrite)`: a pass called test-rule; both take `self` first, as methods do."""

    def make(pattern, rewrite):
        made = type("TestRule", (RewritePass,), {"pattern": pattern, "rewrite": rewrite})
        made.name = "test-rule"
        return made()

    return make


@pytest.fixture
def parsed():
    """A model from ONNX text without its first line."""
    return lambda text: parse_model(HEADER + text)


@pytest.fixture
def source_line():
    """Where a function is written, as errors say it."""
    return lambda function: f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
