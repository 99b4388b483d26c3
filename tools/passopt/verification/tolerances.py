"""Hold what models are judged by: tolerances of models that should agree, and the bars of lossy ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir

from passopt.ir.graph.decoder import decoder_of
from passopt.ir.weights.expressions import DataType
from passopt.passes.framework.accuracy import QualityBar
from passopt.passes.precision.cast import CastModel
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The largest relative error allowed for logits and cache, and the largest allowed |perplexity ratio − 1|."""

    outputs: float
    perplexity: float


#: The default tolerances by the kind of comparison.
#:
#: - "fp32" and "fp16": Exact and reassociating passes such as tp share one row, because sums in another order differ by
#:   only some 1e-7 per operation.
#: - "bf16": Both models are bf16 and run in fp32. They may still differ, because a pass may have stored a constant
#:   rounded to bf16 that the original computes while it runs.
#: - "bf16 and wider": One of the models is bf16 and the other is not.
#: - "int8": The candidate is quantised and the reference is not.
#: - "int8 activations": Either model quantises activations while it runs.
#:
#: The last kinds, and fp16 against fp32, are lossy: their predictions decide (`BARS`), and errors are only shown.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(outputs=1e-5, perplexity=1e-4),
    "fp16": Tolerance(outputs=2e-2, perplexity=5e-3),
    "bf16": Tolerance(outputs=5e-3, perplexity=1e-3),
    "bf16 and wider": Tolerance(outputs=5e-2, perplexity=1e-2),
    "int8": Tolerance(outputs=1e-1, perplexity=5e-3),
    "int8 activations": Tolerance(outputs=1e-1, perplexity=1e-2),
}
#: What lossy candidates are judged by: the bars that the passes declare.
BARS: Mapping[str, QualityBar | None] = {
    "fp16": CastModel.accuracy.bar,
    "bf16 and wider": CastModel.accuracy.bar,
    "int8": QuantizeWeights.accuracy.bar,
    "int8 activations": QuantizeActivations.accuracy.bar,
}
#: Roundings add up over layers: the tolerance of models that should agree is for this many, and grows with more.
_LAYERS = 8
#: The tolerances of an int8 graph against its numpy-dequantised twin, by the dtype of the cache.
TWIN_TOLERANCES: Mapping[DataType, Tolerance] = {
    DataType.FLOAT: Tolerance(outputs=1e-5, perplexity=1e-4),
    DataType.FLOAT16: Tolerance(outputs=2e-3, perplexity=1e-3),
}
#: The same for a graph that quantises activations while it runs. Kernels that differ in the last bit may round a value
#: near a half up or down, and a code that is off by one changes the value by 1/254 of the row's largest number.
DYNAMIC_TWIN_TOLERANCE = Tolerance(outputs=3e-2, perplexity=2e-3)


def deep(tolerance: Tolerance, model: onnx_ir.Model) -> Tolerance:
    """Return the tolerance for a model with as many layers, over which roundings add up."""
    factor = max(1.0, decoder_of(model).layers / _LAYERS)
    return dataclasses.replace(tolerance, outputs=tolerance.outputs * factor)


def bar_of(kind: str, differ: bool, tolerance: float | None) -> QualityBar | None:
    """Return what a lossy candidate is judged by; None for models that should agree, or if the user set a tolerance.

    `differ` says whether the models differ in their dtypes: two models in 16 bits should agree.
    """
    if tolerance is not None or (kind in {"fp16", "bf16 and wider"} and not differ):
        return None
    return BARS.get(kind)


def bar_note(kind: str, bar: QualityBar, *, has_text: bool) -> str:
    """Return a line that says what a lossy model is judged by."""
    source = "the text" if has_text else "random tokens, since no text is given"
    return (
        f"{kind}: declared lossy, judged by its predictions of {source}: KL within {bar.kl:g}, "
        f"99 % within {bar.kl99:g}, top-1 lost within {1 - bar.top1:.2g}"
    )


def chosen_tolerance(default: Tolerance, tolerance: float | None) -> Tolerance:
    """Return the default tolerance, with the user's own tolerance for outputs if there is one."""
    return default if tolerance is None else Tolerance(tolerance, default.perplexity)
