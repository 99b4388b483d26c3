"""Find the weights that `int8` would quantise, and the values that their linears read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir

from passopt.ir.calibration.keys import peeled, weight_key
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.graph.linears import find_linear
from passopt.ir.weights.expressions import Cast, DataType, Expression, QuantizeCodes, Transpose
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.passes.lm_head.fold_norm_head import FoldNormHead
from passopt.passes.precision.quantize_weights import QuantizeWeights

_CODES = ".codes"


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight that gets codes.

    Attributes:
        name: Its name in the graph.
        key: Its key in a calibration folder.
        weight: The weight [n, k], with the n output channels as rows.
        inputs: The values that its linears read; none for a table that is only looked up.
    """

    name: str
    key: str
    weight: Expression
    inputs: tuple[str, ...] = ()

    @property
    def is_turned(self) -> bool:
        """Return whether the weight is stored as [k, n]."""
        turned, part = False, self.weight
        while isinstance(part, (Cast, Transpose)):
            turned ^= isinstance(part, Transpose)
            part = part.operand
        assert part is peeled(self.weight)
        return turned


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is made ready to be calibrated.

    Attributes:
        graph: The graph in fp32; each target is an initializer [n, k], called as the target, behind a Transpose.
        targets: The weights that get codes, in the order of the graph.
        tables: The embeddings among them that are only looked up.
    """

    graph: onnx_ir.Model
    targets: tuple[Target, ...]
    tables: tuple[Target, ...]


def subject_of(model: onnx_ir.Model, *, embedding: bool = False, head: bool = False) -> Subject:
    """Return what is to be calibrated: exactly what `int8` with these options quantises.

    Args:
        model: The model, which stays as it is.
        embedding: Include the embedding.
        head: Include the head.

    Raises:
        ModelError: If the model is quantised or sharded already, or has no linears.
    """
    if degree_of(model) > 1:
        raise ModelError("the model is sharded; calibrate it before, and shard it with the codes")
    graph = model.clone()
    FoldNormHead().run(graph)
    tables = _tables(graph) if embedding else ()
    before = set(graph.graph.initializers)
    QuantizeWeights(head=head).run(graph)
    targets = _undo(graph, before)
    if not targets:
        raise ModelError("int8 finds no linear in this model that it would quantise; is it quantised already?")
    for dtype in (DataType.FLOAT16, DataType.BFLOAT16):
        graph = fp32_twin(graph, dtype)
    return Subject(graph, targets, tables)


def _tables(model: onnx_ir.Model) -> tuple[Target, ...]:
    """Return the tables that `int8{embedding=true}` quantises beside the linears."""
    both = model.clone()
    QuantizeWeights(embedding=True).run(both)
    looked_up = {node.inputs[0] for node in both.graph if node.op_type == "Gather" and node.inputs[0] is not None}
    made = [value for value in looked_up if value.is_initializer() and value.name not in model.graph.initializers]
    values = [value for value in made if (value.name or "").endswith(_CODES)]
    found = (_target(value, ()) for value in sorted(values, key=lambda value: value.name or ""))
    return tuple(target for target in found if target is not None)


def _target(codes: onnx_ir.Value, inputs: tuple[str, ...]) -> Target | None:
    """Return the weight that codes were made of; None for one that keeps the codes it was exported with."""
    expression = expression_of(codes)
    if not isinstance(expression, QuantizeCodes):
        return None
    name = (codes.name or "").removesuffix(_CODES)
    return Target(name, weight_key(expression.operand), expression.operand, inputs)


def _undo(model: onnx_ir.Model, before: Collection[str]) -> tuple[Target, ...]:
    """Put floats in place of the dequantised codes of a model, except those it had before, and return what they are."""
    graph = model.graph
    read: dict[onnx_ir.Value, dict[str, None]] = {}
    for node in graph:
        linear = find_linear(node)
        name = "" if linear is None else linear.weight.value.name or ""
        if linear is not None and name.endswith(_CODES) and name not in before:
            read.setdefault(linear.weight.value, {})[linear.input.name or ""] = None
    editor = Editor(model, "calibrate")
    found = []
    for codes, inputs in read.items():
        target = _target(codes, tuple(inputs))
        if target is None:
            continue
        value = onnx_ir.Value(
            name=target.name,
            type=onnx_ir.TensorType(target.weight.dtype),
            shape=onnx_ir.Shape(target.weight.shape),
            const_value=LazyWeight(target.weight, target.name),
        )
        if target.name in graph.initializers:  # it is read elsewhere, too
            value.name = f"{target.name}.linear"
            target = dataclasses.replace(target, name=value.name)
            value.const_value = LazyWeight(target.weight, target.name)
        graph.register_initializer(value)
        nodes = [use.node for use in codes.uses()]
        for node in nodes:
            node.outputs[0].replace_all_uses_with(value)
        editor.remove_dead(nodes)
        found.append(target)
    return tuple(found)
