"""Pass weights to a guest as handles: references to a file that does not exist, whose offset is an index of a table.

So a model of any size is a few hundred kB of protobuf, and what comes back is the very expression that went out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.lazy_weight import LazyWeight, is_large
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.sources import check_unchanged

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LOCATION = "passopt.handle"


class Handles:
    """The table of tensors that are held out of a guest's reach."""

    def __init__(self) -> None:
        self._tensors: list[onnx_ir.TensorProtocol] = []
        self._loaded: list[tuple[Expression, Array]] = []

    def add(self, tensor: onnx_ir.TensorProtocol) -> onnx_ir.ExternalTensor:
        """Return a reference that stands for `tensor`."""
        self._tensors.append(tensor)
        index, shape = len(self._tensors) - 1, onnx_ir.Shape(tensor.shape.numpy())
        return onnx_ir.ExternalTensor(LOCATION, index, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")

    def tensor(self, index: int, name: str | None) -> onnx_ir.TensorProtocol:
        """Return the tensor that went out as number `index`, under the name that it has now."""
        tensor = self._tensors[index]
        if tensor.name == name:
            return tensor
        if isinstance(tensor, LazyWeight):
            return LazyWeight(tensor.expression, name)
        return onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)

    def weight(self, index: int) -> Expression:
        """Return the tensor of number `index` as an expression."""
        tensor = self._tensors[index]
        return tensor.expression if isinstance(tensor, LazyWeight) else Literal.of(tensor.numpy())

    def load(self, index: int) -> Array:
        """Return the numbers of tensor `index`, read-only, because a guest asked for them.

        A tensor of a file is mapped, not read. Raises PassError if the tensor differs between ranks.
        """
        expression = self.weight(index)
        for known, array in self._loaded:
            if known == expression:
                return array
        if expression.depends_on_rank:
            name = self._tensors[index].name
            raise PassError(f"{name!r} differs between ranks, so it has no values here; run this pass before shard")
        array = _read_only(expression)
        self._loaded.append((expression, array))
        return array

    def expression(self, array: Array) -> Expression:
        """Return an array of a guest as (a part of) an expression that it was given, or else as its own numbers."""
        for expression, loaded in self._loaded:
            if (found := part_of(expression, loaded, array)) is not None:
                return found
        return Literal.of(array)


@contextlib.contextmanager
def held_out(model: onnx_ir.Model, handles: Handles) -> Iterator[None]:
    """Let handles stand for every lazy weight and large tensor of the model while the context is open."""
    saved: list[tuple[onnx_ir.Value, onnx_ir.TensorProtocol]] = []
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and is_large(tensor):
                    saved.append((value, tensor))
                    value.const_value = handles.add(tensor)
        yield
    finally:
        for value, tensor in saved:
            value.const_value = tensor


def to_proto(model: onnx_ir.Model, handles: Handles) -> onnx.ModelProto:
    """Return the model as protobuf, with its weights as handles."""
    with held_out(model, handles):
        return onnx_ir.to_proto(model)


def from_proto(proto: onnx.ModelProto, handles: Handles) -> onnx_ir.Model:
    """Return the model that a guest gave back, with the weights that its handles stand for."""
    model = onnx_ir.from_proto(proto)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, onnx_ir.ExternalTensor) and str(tensor.location) == LOCATION:
                value.const_value = handles.tensor(tensor.offset or 0, value.name)
                value.type = onnx_ir.TensorType(value.const_value.dtype)
                value.shape = onnx_ir.Shape(value.const_value.shape.numpy())
    return model


def defaulted_inputs(model: onnx_ir.Model) -> dict[str, onnx_ir.TensorProtocol]:
    """Return the graph inputs that have a default value, with that value.

    Guests take such inputs for constants, but a caller may feed something else.
    """
    found = {}
    for value in model.graph.inputs:
        if value.is_initializer() and value.const_value is not None and value.name:
            found[value.name] = value.const_value
    return found


def without_defaults(proto: onnx.ModelProto, defaults: dict[str, onnx_ir.TensorProtocol]) -> None:
    """Make inputs with default values plain inputs, for as long as the model is with the guest."""
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in defaults]
    if defaults:
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)


def lift_initializers(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """Move initializers called `names` from bodies, into which a guest wrote them, to the main graph.

    They stood in the main graph before, and are read in those bodies.
    """
    wanted = set(names)
    known = {tensor.name for tensor in graph.initializer}
    for body in bodies(graph):
        for tensor in [tensor for tensor in body.initializer if tensor.name in wanted]:
            if tensor.name not in known:
                graph.initializer.append(tensor)
                known.add(tensor.name)
            body.initializer.remove(tensor)


def bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Return the graphs inside of a graph's nodes, at every depth."""
    found: list[onnx.GraphProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += [body, *bodies(body)]
    return found


def restore_defaults(model: onnx_ir.Model, defaults: dict[str, onnx_ir.TensorProtocol]) -> None:
    """Give inputs their default values back, so that they are optional again."""
    for value in model.graph.inputs:
        if value.name in defaults:
            value.const_value = defaults[value.name]
            model.graph.register_initializer(value)


def part_of(expression: Expression, whole: Array, part: Array) -> Expression | None:
    """Return `part` as slices and a transpose of `expression`, whose values are `whole`.

    Returns None if `part` is not a view of `whole`. Only the addresses are compared: `whole` is contiguous and
    read-only, so equal addresses are equal numbers.
    """
    if part.dtype != whole.dtype or part.ndim != whole.ndim or not part.size or part.flags.writeable:
        return None
    offset = _address(part) - _address(whole)
    if not 0 <= offset < whole.nbytes:
        return None
    starts = []
    for stride in whole.strides:
        starts.append(offset // stride)
        offset %= stride
    axes = _matching_axes(whole, part)
    if axes is None or offset:
        return None
    for axis, length in zip(axes, part.shape, strict=True):
        start = starts[axis]
        if start + length > whole.shape[axis]:
            return None
        expression = expression.slice(axis, start, start + length)
    return expression.transpose(axes)


def _matching_axes(whole: Array, part: Array) -> tuple[int, ...] | None:
    """Return, for each axis of `part`, the axis of `whole` that it runs along; None if there is none."""
    free = list(range(whole.ndim))
    axes = []
    for length, stride in zip(part.shape, part.strides, strict=True):
        fitting = [axis for axis in free if length == 1 or whole.strides[axis] == stride]
        exact = [axis for axis in fitting if whole.strides[axis] == stride and whole.shape[axis] >= length]
        if not fitting:
            return None
        axes.append((exact or fitting)[0])
        free.remove(axes[-1])
    return tuple(axes)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _read_only(expression: Expression) -> Array:
    """Return the values of an expression as a read-only array: mapped if it is a tensor of a file, else computed."""
    if isinstance(expression, Source) and expression.nbytes and float(expression.dtype.itemsize).is_integer():
        check_unchanged(expression.file)
        raw = np.memmap(expression.file.path, np.uint8, "r", expression.offset, (expression.nbytes,))
        return np.asarray(raw).view(expression.dtype.numpy()).reshape(expression.shape)
    with Evaluator() as evaluator:
        array = np.ascontiguousarray(evaluator.array(expression))
    array.setflags(write=False)
    return array
