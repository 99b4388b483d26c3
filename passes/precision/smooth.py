"""Define the pass `smooth`, which moves the outliers of activations into weights, by what calibration measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.calibration.calibration import Calibration, InputStatistics
from passopt.ir.calibration.keys import weight_key
from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import SMOOTHED, degree_of
from passopt.ir.graph.editor import Editor
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.literals import Literal as LiteralWeight
from passopt.ir.weights.scaling import scale_along
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Pass, Refusal
from passopt.passes.framework.records import PassResult
from passopt.passes.precision.linear_weights import Change, WeightChanges, in_fp32
from passopt.passes.precision.smoothed_inputs import SmoothedInput, smoothed_inputs

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """Divide activations by a number per channel and multiply weights by it: outliers then cost int8 less.

    Before: ``n = RMSNormalization(x, g); q = MatMul(n, w)``, ``y = MatMul(Mul(gate, MatMul(n, up)), down)``
    After:  ``n = RMSNormalization(x, g/s); q = MatMul(n, s·w)``, ``y = MatMul(Mul(gate, MatMul(n, up/t)), t·down)``
    The model computes the same function. The numbers are those of SmoothQuant, ``max|x|^alpha / max|w|^(1 - alpha)``
    per channel. What linears read and how large their weights are comes from a folder of `passopt calibrate`, which was
    made after the same passes. `targets` chooses the inputs of linears behind norms, those of down projections behind a
    gate, or all. After `rotate`, smooth what is behind gates only: a rotated stream has no outliers left.
    """

    name = "smooth"
    after = ("fuse-rms-norm", "fuse-layer-norm", "rotate-residual")
    accuracy = REASSOCIATED

    alpha: float = 0.5
    targets: Literal["all", "norm", "down"] = "all"
    from_: str = ""

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Smooth in place; raise PassError without a calibration of this model."""
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}: alpha is {self.alpha:g}, expected a number from 0 to 1")
        wanted = self._left(model)
        if not wanted:
            return PassResult()
        if not self.from_:
            raise PassError(
                f"{self.name}: needs what linears read. Measure it: passopt calibrate MODEL --passes PASSES --data "
                f"FILE -o CALIB, with the passes that stand before {self.name}; then smooth{{from=CALIB}}"
            )
        if degree_of(model) != 1:
            raise PassError(f"{self.name}: the model is sharded; smooth before tp")
        complete_types(model)
        calibration = Calibration.of(self.from_)
        sites = [site for site in smoothed_inputs(model) if isinstance(site, SmoothedInput) and site.kind in wanted]
        # All statistics are looked up before the first weight changes, since they are found by the weights.
        pairs = [(site, found) for site in sites if (found := self._statistics(site, calibration))]
        if not pairs:
            raise PassError(
                f"{self.name}: found nothing to smooth: no linear of {self.from_} reads a norm or a product with a "
                f"gate; passopt why {self.name} MODEL says what is in the way"
            )
        editor = Editor(model, self.name)
        changes = WeightChanges(editor, "smoothed")
        for site, found in pairs:
            _smooth(site, smoothing_scales(found, self.alpha), changes, editor)
        _record(model, dict.fromkeys(wanted, self.alpha))
        note = f"{changes.count} weights smoothed by the inputs of {len(pairs)} groups of linears"
        return PassResult(modified=True, matches=len(pairs), tries=len(model.graph), notes=[note])

    def _left(self, model: onnx_ir.Model) -> set[str]:
        """Return the kinds of targets that are not smoothed yet; raise UsageError for one that was, otherwise."""
        done = _recorded(model)
        wanted = {"norm", "down"} if self.targets == "all" else {str(self.targets)}
        for kind in sorted(wanted & done.keys()):
            if done[kind] != self.alpha:
                raise UsageError(
                    f"{self.name}: the target {kind} is smoothed already with alpha {done[kind]:g}, "
                    f"asked for {self.alpha:g}"
                )
        return wanted - done.keys()

    def _statistics(self, site: SmoothedInput, calibration: Calibration) -> list[InputStatistics]:
        """Return what was measured for each linear of a site; nothing if none of them was calibrated, as the head."""
        weights = [linear.weight.expression() for linear in site.readers]
        if all(calibration.statistics(weight_key(weight)) is None for weight in weights):
            if site.is_head:
                return []
            raise calibration.unknown(weights[0], self.name)
        found = [calibration.required(weight, self.name) for weight in weights]
        if any(item.weight_absmax is None for item in found):
            raise PassError(f"{self.name}: {self.from_} lacks the magnitudes of weights. Calibrate again.")
        return found

    def explain(self, model: onnx_ir.Model) -> Iterable[Refusal]:
        """Yield the norms and products with a gate that are not smoothed, and why."""
        copy = model.clone()
        complete_types(copy)
        yield from (site for site in smoothed_inputs(copy) if isinstance(site, Refusal))


def smoothing_scales(found: Sequence[InputStatistics], alpha: float) -> Array:
    """Return the scales [k] of the input of linears; 1 for a channel that is always zero.

    Args:
        found: What was measured for each of the linears.
        alpha: How much of the outliers goes into weights: 0 leaves activations as they are, up to the weights.
    """
    inputs = np.max([item.absmax for item in found], axis=0).astype(np.float64)
    weights = np.max([item.weight_absmax for item in found if item.weight_absmax is not None], axis=0).astype(
        np.float64
    )
    known = (inputs > 0) & (weights > 0)
    inputs[~known] = weights[~known] = 1
    scales: Array = (inputs**alpha / weights ** (1 - alpha)).astype(np.float32)
    return scales


def _smooth(site: SmoothedInput, scales: Array, changes: WeightChanges, editor: Editor) -> None:
    more, less = LiteralWeight.of(scales), LiteralWeight.of(1 / scales)
    for linear in site.readers:
        changes.linear(linear, _scaled(1, more))
    for node, index in site.vectors:
        changes.constant(node, index, _scaled(0, less))
    if site.writer is not None:
        changes.linear(site.writer, _scaled(0, less))
    for value in site.values:  # They hold other numbers than before, so they get other names.
        value.name = editor.unique(f"{value.name}.smoothed")


def _scaled(axis: int, vector: Expression) -> Change:
    return lambda weight: in_fp32(weight, axis, lambda part: scale_along(part, axis, vector))


def _recorded(model: onnx_ir.Model) -> dict[str, float]:
    text = model.metadata_props.get(SMOOTHED, "")
    return {kind: float(alpha) for kind, alpha in (item.split("=") for item in text.split())}


def _record(model: onnx_ir.Model, done: dict[str, float]) -> None:
    found = {**_recorded(model), **done}
    model.metadata_props[SMOOTHED] = " ".join(f"{kind}={found[kind]:g}" for kind in sorted(found))
