"""Register which function lowers which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir

from passopt.targets.tvm.compiler.lowering.values import Values

Converter: TypeAlias = Callable[[Values, onnx_ir.Node], None]

#: The converter of each operator, by (domain, operator type).
CONVERTERS: dict[tuple[str, str], Converter] = {}


def lowers(*op_types: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Return a decorator that registers a function as the converter of the operators `op_types` of `domain`."""

    def register(function: Converter) -> Converter:
        for op_type in op_types:
            CONVERTERS[domain, op_type] = function
        return function

    return register
