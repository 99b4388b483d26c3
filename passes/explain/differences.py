"""Say in words what kept a rule from matching: what was expected, what was found, and where in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE
from passopt.ir.weights.lazy_weight import constant_tensor, is_checkpoint_weight, small_constant
from passopt.passes.patterns.language import (
    Absent,
    Maybe,
    NodePattern,
    Number,
    Numbers,
    Output,
    Rest,
    Scalar,
    ValuePattern,
    Variable,
    Weight,
    outputs_of,
)

#: Constants of more elements are shown by dtype and shape.
_SHOWN_ELEMENTS = 8


@dataclasses.dataclass(frozen=True)
class Words:
    """A text, and the name in the graph that belongs to this very place.

    Equal differences of several layers have the same `text` and differ in `symbol` only.
    """

    text: str
    symbol: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.symbol}" if self.symbol else self.text


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """One thing that kept a pattern from matching.

    `kind` is operator, extra, absent, attribute, constant, weight, value, inputs, outputs or root. `owner` is the
    pattern node that does not fit because of it, if there is one. `node` is where to look: the node whose input or
    attribute differs. `found_node` is the node that stands there instead, if there is one.
    """

    kind: str
    owner: NodePattern | None
    node: onnx_ir.Node
    place: str
    expected: Words
    found: Words
    found_node: onnx_ir.Node | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Return a key that is equal for the same difference in another layer."""
        return (self.kind, self.node.op_type, self.place, self.expected.text, self.found.text)

    def __str__(self) -> str:
        place = f", {self.place}" if self.place else ""
        return f"{describe_node(self.node)}{place}: expected {self.expected}, found {self.found}{self._hint}"

    @property
    def _hint(self) -> str:
        if self.kind == "extra":
            return f" with {self.expected.text} behind it"
        return f": no {self.expected.text} in between" if self.kind == "absent" else ""

    def to_json(self) -> dict[str, Any]:
        """Return the difference, and what the graph knows about where its node comes from."""
        return {
            "kind": self.kind,
            "node": self.node.name,
            "op_type": self.node.op_type,
            "place": self.place,
            "expected": str(self.expected),
            "found": str(self.found),
            "found_node": self.found_node.name if self.found_node is not None else None,
            **provenance(self.node),
        }


def provenance(node: onnx_ir.Node) -> dict[str, str]:
    """Return what the graph knows about where a node comes from.

    The keys are source, module, made_by and made_from, as far as they are known.
    """
    keys = {"source": SOURCE, "module": MODULE, "made_by": MADE_BY, "made_from": MADE_FROM}
    return {name: node.metadata_props[key] for name, key in keys.items() if key in node.metadata_props}


def describe_node(node: onnx_ir.Node) -> str:
    """Describe a node by its first output, as `passopt print` shows it: `mul_3 (Mul)`."""
    return f"{node.outputs[0].name or node.name} ({operator(node)})"


def operator(item: onnx_ir.Node | NodePattern) -> str:
    """Return the operator with its domain, or without it if that is ONNX's own."""
    return f"{item.domain}::{item.op_type}" if item.domain else item.op_type


def input_place(index: int, pattern: ValuePattern) -> str:
    """Name an input, such as `input 1 (epsilon)` if the pattern has a name for it, else `input 1`."""
    name = pattern.name if isinstance(pattern, Variable) else ""
    name = pattern.variable.name if isinstance(pattern, (Weight, Scalar, Maybe)) else name
    return f"input {index} ({name})" if name else f"input {index}"


def expected_words(pattern: ValuePattern, bindings: Mapping[str, Any]) -> Words:
    """Say what a pattern asks of a value."""
    if isinstance(pattern, Number):
        return Words(f"the constant {pattern.value:g}" + (" or near it" if pattern.tolerance else ""))
    if isinstance(pattern, Numbers):
        return Words(f"the constant {list(pattern.values)}")
    if isinstance(pattern, Weight):
        return Words("a weight of the checkpoint")
    if isinstance(pattern, Scalar):
        return Words("a constant of one element")
    if isinstance(pattern, (Absent, Rest)):
        return Words("no input" if isinstance(pattern, Absent) else "further inputs")
    if isinstance(pattern, Maybe):
        return expected_words(pattern.variable, bindings)
    if isinstance(pattern, Variable):
        bound = bindings.get(pattern.name)
        if isinstance(bound, onnx_ir.Value):
            return Words(f"the same value as {pattern.name},", bound.name or "")
        if bound is None:
            return Words("an input")
        return Words(f"the same value as {pattern.name}, {found_words(bound)}")
    if isinstance(pattern, Output):
        which = f"output {pattern.index} of " if pattern.node.outputs > 1 else ""
        return Words(which + operator(pattern.node))
    return Words(" or ".join(dict.fromkeys(str(expected_words(item, bindings)) for item in pattern.choices.values())))


def found_words(value: Any) -> Words:
    """Say what a value is: computed by which operator, or which constant, weight or graph input."""
    if value is None:
        return Words("no input")
    if not isinstance(value, onnx_ir.Value):
        return Words(attribute_text("", value))
    if value.is_graph_input():
        default = ", whose default freeze-defaults takes for a constant," if value.is_initializer() else ""
        return Words(f"the graph input{default}{_type_of(value)}", value.name or "")
    if is_checkpoint_weight(value):
        return Words(f"the weight{_type_of(value)}", value.name or "")
    if constant_tensor(value) is not None:
        return Words(_constant_text(value))
    node = value.producer()
    if node is None:
        return Words("a value of an outer graph", value.name or "")
    which = f"output {value.index()} of " if len(node.outputs) > 1 else ""
    return Words(which + operator(node), value.name or "")


def _constant_text(value: onnx_ir.Value) -> str:
    array = small_constant(value)
    if array is None or array.size > _SHOWN_ELEMENTS:
        return f"a constant{_type_of(value)}"
    number = f"{array.item():.8g}" if array.ndim == 0 and array.dtype.kind == "f" else str(array.tolist())
    return f"the constant {number} ({_dtype(value)})"


def _type_of(value: onnx_ir.Value) -> str:
    dims = ",".join("?" if str(dim) == "None" else str(dim) for dim in value.shape.dims) if value.shape else ""
    return f" {_dtype(value)}[{dims}]" if value.shape is not None else f" {_dtype(value)}"


def _dtype(value: onnx_ir.Value) -> str:
    dtype = value.dtype
    if dtype is None and (tensor := constant_tensor(value)) is not None:
        dtype = tensor.dtype
    return dtype.name.lower() if dtype is not None else "of unknown type"


def attribute_text(name: str, value: Any) -> str:
    """Return the value of an attribute as text, with dtypes by name."""
    if value is None:
        return "no such attribute"
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, onnx_ir.DataType):
        return value.name
    if name in {"to", "dtype"} and isinstance(value, int):
        return onnx_ir.DataType(value).name
    if isinstance(value, float):
        return f"{np.float32(value):.8g}"
    return repr(list(value)) if isinstance(value, (tuple, list)) else repr(value)


def children(pattern: NodePattern) -> list[Output]:
    """Return the operators that a pattern node reads, including those of alternatives."""
    return [choice for item in pattern.inputs for choice in outputs_of(item)]
