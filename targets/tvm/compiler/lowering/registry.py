"""Which function lowers which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir

from passopt.targets.tvm.compiler.lowering.values import Values

Converter: TypeAlias = Callable[[Values, onnx_ir.Node], None]

CONVERTERS: dict[tuple[str, str], Converter] = {}


def lowers(*op_types: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Register the decorated function for operators of `domain`."""

    def register(function: Converter) -> Converter:
        for op_type in op_types:
            CONVERTERS[domain, op_type] = function
        return function

    return register
