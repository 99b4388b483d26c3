"""Say where a pass failed with an exception that is none of passopt's: the line of the pass, and the site."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import onnx_ir

from passopt.ir.graph.provenance import called, origin_of

#: What to do about a defect of a pass.
NEXT_STEP = (
    "this is a defect of the pass, not of the model: mend that line, or let the pass say no there. "
    "Its calls: --traceback on the command line, __cause__ of the error in Python"
)


def failure(error: Exception, method: Callable[..., Any] | None = None) -> str:
    """Return what happened and at which line.

    Args:
        error: The exception, as it was caught.
        method: The method of the pass that was called. The innermost line of its file is named, and where something
            that it called raised the exception, that line too.

    Returns:
        A text such as ``failed with IndexError: tuple index out of range, at my_pass.py:12: `x.shape[3]` ``.
    """
    text = f"failed with {type(error).__name__}: {error}".rstrip(": ")
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    if not lines:
        return text
    code = _code_of(method)
    own = [line for line in lines if code is not None and line[0] == code.co_filename]
    place = own[-1] if own else lines[-1]
    source = linecache.getline(*place).strip()
    found = f"{text}, at {place[0]}:{place[1]}" + (f": `{source}`" if source else "")
    return found if place == lines[-1] else f"{found} (raised at {lines[-1][0]}:{lines[-1][1]})"


def describe_site(node: onnx_ir.Node) -> str:
    """Return the operator and name of a node, what it makes, and where it comes from, as far as the graph tells."""
    made = ", ".join(str(value.name) for value in node.outputs if value.name)
    origin = origin_of(node)
    makes = f", which makes {made or 'nothing'}" if node.name else ""
    return f"{called(node)}{makes}" + (f", {origin}" if origin else "")


def node_at_work(error: Exception) -> onnx_ir.Node | None:
    """Return the node that was being looked at when the exception was raised; None if that cannot be told.

    It is the variable `node` of the innermost call that has one, by which whole-graph passes loop.
    """
    frames: Iterator[tuple[FrameType, int]] = traceback.walk_tb(error.__traceback__)
    found = [frame.f_locals.get("node") for frame, _ in frames]
    return next((node for node in reversed(found) if isinstance(node, onnx_ir.Node)), None)


def _code_of(method: Callable[..., Any] | None) -> CodeType | None:
    return getattr(inspect.unwrap(method), "__code__", None) if method is not None else None
