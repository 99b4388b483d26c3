"""Define the pass `rotate-residual`, which turns the residual stream so that no channel has outliers."""

from __future__ import annotations

import dataclasses
from functools import partial

import onnx_ir

from passopt.ir.errors import ModelError, PassError, UsageError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import ROTATION
from passopt.ir.graph.editor import Editor
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.literals import Fill
from passopt.ir.weights.rotation import obstacle, rotate
from passopt.ir.weights.scaling import scale_along
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.precision.linear_weights import Change, WeightChanges, constant, in_fp32
from passopt.passes.precision.residual_stream import ResidualStream, Unproven, find_residual_stream


@dataclasses.dataclass(frozen=True)
class RotateResidual(Pass):
    """Spread outliers over all channels, so that int8 activations lose less: rotate the residual stream, without data.

    Before: ``x = Gather(e, ids); y = Add(x, MatMul(f(MatMul(RMSNormalization(x, g), w)), o))``
    After:  ``x = Gather(e·R, ids); y = Add(x, MatMul(f(MatMul(RMSNormalization(x, 1), Rᵀ·g·w)), o·R))``
    R is orthogonal: random signs times a Hadamard matrix, and an RMS norm does not see it. So the model computes the
    same function; only the weights change, as lazy expressions that are evaluated when they are written. An embedding
    that is the head, too, becomes two weights. Every reader and writer of the stream must be known: anything but
    embeddings, linears, sums, and RMS norms as one operator is an error. The normalised head of Baichuan2 has to be
    folded first, as the pipeline `rotate` does.
    """

    name = "rotate-residual"
    after = ("fold-norm-head", "fuse-rms-norm")
    accuracy = REASSOCIATED

    seed: int = 0

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Rotate in place; raise PassError if a reader or writer of the stream is not known."""
        present = model.metadata_props.get(ROTATION)
        if present == str(self.seed):
            return PassResult()
        if present is not None:
            raise UsageError(f"{self.name}: the stream is rotated already, by seed {present}, asked for {self.seed}")
        complete_types(model)
        try:
            stream = _stream(model)
            count = _rotate(model, stream, self.seed, self.name)
        except Unproven as unproven:
            raise PassError(f"{self.name}: {unproven}") from unproven
        except ModelError as error:
            raise PassError(f"{self.name}: {error}") from error
        model.metadata_props[ROTATION] = str(self.seed)
        note = f"{stream.width} channels rotated: {len(stream.writers)} writers, {len(stream.readers)} readers"
        return PassResult(modified=True, matches=count, tries=len(model.graph), notes=[note])


def _stream(model: onnx_ir.Model) -> ResidualStream:
    stream = find_residual_stream(model)
    reason = obstacle(stream.width)
    if reason:
        raise Unproven(f"the stream has no fast rotation: {reason}")
    return stream


def _rotate(model: onnx_ir.Model, stream: ResidualStream, seed: int, author: str) -> int:
    """Change what reads and writes the stream, and return how many weights were replaced."""
    editor = Editor(model, author)
    rotated, ones = WeightChanges(editor, "rotated"), WeightChanges(editor, "ones")

    def turn(axis: int) -> Change:
        return lambda weight: in_fp32(weight, axis, lambda part: rotate(part, axis, seed))

    def read(weight: Expression, scale: Expression) -> Expression:
        folded = scale.cast(DataType.FLOAT)
        return in_fp32(weight, 1, lambda part: rotate(scale_along(part, 1, folded), 1, seed))

    for node in stream.tables:
        rotated.constant(node, 0, turn(1))
    for linear in stream.writers:
        rotated.linear(linear, turn(0))
    for node, index in stream.vectors:
        rotated.constant(node, index, turn(0))
    for reader in stream.readers:
        if reader.norm is None or _is_one(scale := constant(reader.norm.inputs[1])):
            rotated.linear(reader.linear, turn(1))
        else:
            rotated.linear(reader.linear, partial(read, scale=scale))
    for norm in stream.norms:
        if not _is_one(constant(norm.inputs[1])):
            ones.constant(norm, 1, lambda weight: Fill(weight.dtype, weight.shape, 1.0))
    for value in stream.values:  # They hold other numbers than before, so they get other names.
        value.name = editor.unique(f"{value.name}.rotated")
    return rotated.count + ones.count


def _is_one(weight: Expression) -> bool:
    return isinstance(weight, Fill) and weight.value == 1
