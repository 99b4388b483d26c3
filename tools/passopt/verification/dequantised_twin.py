"""Make the twin of a quantised graph: the same graph with its weights dequantised by plain numpy.

Comparing a graph with its twin checks the int8 arithmetic against the graph's own codes. Where activations are
quantised too, the twin multiplies the same codes as fp32 numbers. This module shares no code with the quantiser on
purpose: it uses only the codes and scales that the graph holds.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.attention.int8_cache import int8_caches
from passopt.ir.errors import ModelError
from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.decoder import SCALES
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.linears import Linear, find_dynamic_linear
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.groups import FOUR_BITS
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.sources import external_source
from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The operators that put a cache together, of codes or of numbers alike.
_MOVES = frozenset({"Concat", "Pad", "Slice", "Split"})
#: The operator of onnxruntime that multiplies codes of few bits.
_PACKED = "MatMulNBits"
_CODES = {onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8} | FOUR_BITS


def dequantised_weights(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the DequantizeLinear nodes whose codes are constant."""
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and not node.domain
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and node.inputs[0].dtype in _CODES
    ]


def has_groups(model: onnx_ir.Model) -> bool:
    """Return whether the graph holds weights of 4 bits, whose scales belong to groups of inputs."""
    found = dequantised_weights(model)
    return has_packed_products(model) or any(_codes_of(node) in FOUR_BITS for node in found)


def has_packed_products(model: onnx_ir.Model) -> bool:
    """Return whether linears multiply codes of few bits by an operator of onnxruntime."""
    return any(node.op_type == _PACKED and node.domain == MICROSOFT for node in model.graph)


def _codes_of(node: onnx_ir.Node) -> onnx_ir.DataType | None:
    return None if node.inputs[0] is None else node.inputs[0].dtype


def dynamic_linears(model: onnx_ir.Model) -> list[Linear]:
    """Return the linear layers whose activations are quantised while the graph runs."""
    return [linear for node in model.graph if (linear := find_dynamic_linear(node)) is not None]


def is_quantized(model: onnx_ir.Model) -> bool:
    """Return whether the graph holds quantised weights or quantises activations while it runs."""
    return bool(dequantised_weights(model)) or has_packed_products(model) or has_dynamic_activations(model)


def has_dynamic_activations(model: onnx_ir.Model) -> bool:
    """Return whether the graph quantises the activations of a linear layer while it runs."""
    return any(find_dynamic_linear(node) is not None for node in model.graph)


def dequantised_twin(model: onnx_ir.Model, scratch: Path) -> onnx_ir.Model:
    """Return a clone of the model in which each DequantizeLinear over constant codes is replaced by an initializer.

    The initializers have the dtype of the outputs they replace. Their values are written to files in the folder
    `scratch`, in chunks of rows. The files must stay there as long as the twin is used.

    Raises:
        ModelError: If a DequantizeLinear has scales that are not constant, or codes of few bits are not in a file.
    """
    twin = model.clone()
    if has_packed_products(twin):
        DecomposeContrib().run(twin)
    if has_packed_products(twin):
        raise ModelError(
            f"{_PACKED}: its codes are not bytes of a file, so they cannot be checked; write the model first"
        )
    graph = twin.graph
    editor = Editor(twin, "twin")
    for linear in dynamic_linears(twin):
        _multiply_numbers(editor, linear)
    for index, node in enumerate(dequantised_weights(twin)):
        output = node.outputs[0]
        name = f"{output.name}.dequantised"
        source = _write(node, scratch / f"dequantised-{index}.bin", name)
        value = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(source.dtype),
            shape=onnx_ir.Shape(source.shape),
            const_value=LazyWeight(source, name),
        )
        graph.register_initializer(value)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for weight in inputs:
            if weight.name and weight.is_initializer() and not weight.uses():
                del graph.initializers[weight.name]
    return twin


def without_quantised_rows(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a clone in which linears multiply plain activations with the same codes, as without dynamic rows."""
    plain = model.clone()
    editor = Editor(plain, "plain")
    for linear in dynamic_linears(plain):
        weight, last = linear.weight, linear.output.producer()
        assert last is not None
        builder = editor.builder(f"{linear.output.name}.plain")
        matrix = builder.DequantizeLinear(weight.value, weight.scales, axis=0 if weight.transposed else 1)
        turned = builder.Transpose(matrix, perm=[1, 0]) if weight.transposed else matrix
        editor.replace({linear.output: builder.MatMul(linear.input, turned)}, builder.built, [last])
    return plain


def without_int8_cache(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a clone that keeps its cache as numbers, and keys as they are; the model itself if it does so."""
    if not int8_caches(model):
        return model
    plain = model.clone()
    graph = plain.graph
    for node, cache in int8_caches(plain).items():
        rows = cache.key.rows if cache.turn is None else cache.turn.key
        if cache.turn is not None:
            node.replace_input_with(0, cache.turn.query)
        for part, new in ((cache.key, rows), (cache.value, cache.value.rows)):
            for index, value in enumerate(node.inputs):
                if value is part.past or value is part.stored:
                    node.replace_input_with(index, part.past_codes if value is part.past else new)
            part.codes.replace_all_uses_with(new)
            part.input.type = new.type
    numbers = {value for value in graph.inputs if (value.name or "").startswith("past.")}
    for node in graph:
        if node.op_type in _MOVES and not node.domain and node.inputs[0] in numbers:
            numbers.update(node.outputs)
            for value in node.outputs:
                value.type = node.inputs[0].type
    for values in (graph.outputs, graph.inputs):
        if values is graph.inputs:
            Editor(plain, "plain").remove_dead(list(graph))
        for value in [item for item in values if (item.name or "").endswith(SCALES)]:
            values.remove(value)
    return plain


def _multiply_numbers(editor: Editor, linear: Linear) -> None:
    """Replace an integer product of codes by the same product in fp32.

    The new nodes are ``Mul(MatMul(Cast<fp32>(codes), Transpose(DequantizeLinear(w.codes, w.scales))), scale)``.
    """
    rows, weight, output = linear.rows, linear.weight, linear.output
    assert rows is not None
    last = output.producer()
    assert last is not None
    builder = editor.builder(f"{output.name}.numbers")
    matrix = builder.DequantizeLinear(weight.value, weight.scales, axis=0 if weight.transposed else 1)
    turned = builder.Transpose(matrix, perm=[1, 0]) if weight.transposed else matrix
    numbers = builder.MatMul(builder.Cast(rows.codes, to=onnx_ir.DataType.FLOAT.value), turned)
    editor.replace({output: builder.Mul(numbers, rows.scales)}, builder.built, [last])


def _write(node: onnx_ir.Node, path: Path, name: str) -> Expression:
    """Write the dequantised weight of a DequantizeLinear node to `path`, and return the expression that reads it."""
    codes, scales, zeros = _operand(node, 0), _operand(node, 1), _operand(node, 2)
    assert codes is not None
    assert scales is not None
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    axis = codes.axis(node.attributes["axis"].as_int() if "axis" in node.attributes else 1) if scales.shape else 0
    with Evaluator() as evaluator, path.open("wb") as file:
        factor = evaluator.array(scales)
        offset = np.zeros_like(factor, np.int32) if zeros is None else evaluator.array(zeros).astype(np.int32)
        start = 0
        for chunk in evaluator.chunks(codes):
            if block:
                spread = functools.partial(_of_blocks, block=block, axis=axis, start=start, shape=chunk.shape)
            else:
                rows = slice(start, start + len(chunk)) if axis == 0 and scales.shape else slice(None)
                spread = functools.partial(_spread, rows=rows, axis=axis, ndim=chunk.ndim)
            wide = chunk.astype(np.int32) - spread(offset)
            values = wide.astype(np.float32) * spread(factor).astype(np.float32)
            file.write(values.astype(factor.dtype).tobytes())
            start += len(chunk)
    return external_source(path, name, scales.dtype, codes.shape, 0)


def _operand(node: onnx_ir.Node, index: int) -> Expression | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    expression = expression_of(value)
    if expression is None:
        raise ModelError(f"DequantizeLinear {node.name!r}: {value.name!r} is computed, expected a constant")
    return expression


def _of_blocks(parts: Array, block: int, axis: int, start: int, shape: tuple[int, ...]) -> Array:
    """Return what belongs to each element of rows of codes from `start` on, of parts that blocks of them share."""
    places = np.arange(shape[axis]) + (start if axis == 0 else 0)
    rows = parts if axis == 0 else parts[start : start + shape[0]]
    found: Array = np.take(rows, places // block, axis)
    return found


def _spread(vector: Array, rows: slice, axis: int, ndim: int) -> Array:
    """Return a vector shaped to broadcast along `axis`, limited to `rows` if that is axis 0, or a scalar as it is."""
    if not vector.ndim:
        return vector
    shape = [1] * ndim
    shape[axis] = -1
    part: Array = vector[rows].reshape(shape)
    return part
