"""Decide what a comparison is judged by: tolerances of models that should agree, and the bars of lossy ones.

This is the one place that says which kind of comparison two models make, whatever graphs or compiled folders they are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping

import onnx_ir

from passopt.ir.attention.int8_cache import int8_caches
from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.decoder import decoder_of
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import constant_tensor
from passopt.passes.framework.accuracy import QualityBar
from passopt.passes.precision.cast import CastModel
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_cache import QuantizeCache
from passopt.passes.precision.quantize_groups import QuantizeGroups
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.verification.dequantised_twin import has_dynamic_activations, has_groups, is_quantized


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
#: - "int8 cache": Either model keeps keys and values in 8 bits. If both do, halves round to the other side here, too.
#: - "int8 activations": Either model quantises activations while it runs. If both do, halves that round to the other
#:   side still drift apart over layers.
#: - "int4": The candidate holds weights of 4 bits and the reference does not.
#:
#: int8, int4, and models of different dtypes, are lossy: their predictions decide (`BARS`), and errors are only shown.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(outputs=1e-5, perplexity=1e-4),
    "fp16": Tolerance(outputs=2e-2, perplexity=5e-3),
    "bf16": Tolerance(outputs=5e-3, perplexity=1e-3),
    "bf16 and wider": Tolerance(outputs=5e-2, perplexity=1e-2),
    "int8": Tolerance(outputs=1e-1, perplexity=5e-3),
    "int8 cache": Tolerance(outputs=1e-1, perplexity=5e-3),
    "int8 activations": Tolerance(outputs=1e-1, perplexity=1e-2),
    "int4": Tolerance(outputs=6e-1, perplexity=2e-1),
}
#: What lossy candidates are judged by: the bars that the passes declare.
BARS: Mapping[str, QualityBar | None] = {
    "fp16": CastModel.accuracy.bar,
    "bf16 and wider": CastModel.accuracy.bar,
    "int8": QuantizeWeights.accuracy.bar,
    "int8 cache": QuantizeCache.accuracy.bar,
    "int8 activations": QuantizeActivations.accuracy.bar,
    "int4": QuantizeGroups.accuracy.bar,
}
#: The metadata of the fp32 twin that stands for a model in bf16.
_WAS_BF16 = "passopt.was_bf16"
#: Operators that multiply codes of activations, or make them.
_INTEGERS = frozenset(
    [
        "ConvInteger",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QLinearConv",
        "QLinearMatMul",
    ]
)
_NAMES = {DataType.FLOAT16: "fp16", DataType.BFLOAT16: "bf16"}
_NARROW = frozenset(_NAMES.values())
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


@dataclasses.dataclass(frozen=True)
class Precision:
    """What of a model decides how a comparison with it is judged.

    Attributes:
        quantized: Whether it holds weights as int8 codes.
        dynamic: Whether it quantises activations while it runs, in the form that passopt writes.
        integers: Whether it quantises activations in any form.
        cache: Whether it keeps keys and values in 8 bits.
        narrow: Those of "fp16" and "bf16" that its inputs, outputs or weights have.
        main: The dtypes of its inputs and outputs, and of most of its weights; empty if these are not known.
        groups: Whether some of its codes are of 4 bits, with scales of groups.
    """

    quantized: bool = False
    dynamic: bool = False
    integers: bool = False
    cache: bool = False
    narrow: frozenset[str] = frozenset()
    main: frozenset[str] = frozenset()
    groups: bool = False

    @property
    def floats(self) -> Precision:
        """Return the precision of what is left without int8."""
        return Precision(narrow=self.narrow, main=self.main)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How two models are judged: the key of `TOLERANCES`, and whether the candidate is declared lossy.

    `differ` says that their dtypes differ, so that a float output may have another dtype.
    """

    kind: str
    lossy: bool
    differ: bool

    @property
    def is_quantised(self) -> bool:
        """Return whether the candidate holds codes that the reference does not, or quantises activations."""
        return self.kind.startswith("int")

    def bar(self, tolerance: float | None) -> QualityBar | None:
        """Return what predictions are judged by; None for models that should agree, or if the user set a tolerance."""
        return BARS[self.kind] if self.lossy and tolerance is None else None


def judgement_of(reference: Precision, candidate: Precision) -> Judgement:
    """Return how a candidate is judged against a reference: by the less precise of the two.

    Two models in the same 16 bits should agree, also if one of them keeps a few constants in fp32.
    """
    known = bool(reference.main and candidate.main)
    narrow = reference.narrow | candidate.narrow
    differ = reference.narrow != candidate.narrow or (known and reference.main != candidate.main)
    lossy = differ and bool(narrow)
    if candidate.groups and not reference.groups:
        return Judgement("int4", lossy=True, differ=lossy)
    if reference.dynamic or candidate.dynamic or (candidate.integers and not reference.integers):
        return Judgement("int8 activations", lossy=True, differ=lossy)
    if candidate.quantized and not reference.quantized:
        return Judgement("int8", lossy=True, differ=lossy)
    if (reference.cache or candidate.cache) and not lossy:
        return Judgement("int8 cache", lossy=True, differ=False)
    if "bf16" in narrow:
        return Judgement("bf16 and wider" if lossy else "bf16", lossy, lossy)
    return Judgement("fp16" if narrow else "fp32", lossy, lossy)


def precision_of(model: onnx_ir.Model) -> Precision:
    """Return the precision of a graph; the fp32 twin of one in bf16 counts as bf16."""
    dynamic = has_dynamic_activations(model)
    caches = int8_caches(model).values()
    stored = {part.codes for cache in caches for part in (cache.key, cache.value)}
    integers = dynamic or any(
        _quantises_activations(node) for node in model.graph.all_nodes() if node.outputs[0] not in stored
    )
    of_int8 = is_quantized(model), dynamic, integers, bool(caches)
    if is_bf16_twin(model):
        return Precision(*of_int8, frozenset({"bf16"}), frozenset({"bf16"}), has_groups(model))
    faces = {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} & FLOATS
    sizes: collections.Counter[DataType] = collections.Counter()
    for tensor in _constants(model):
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] += tensor.size
    found = {_NAMES.get(dtype, dtype.name) for dtype in (*faces, *sizes) if dtype is not None}
    main = {_NAMES.get(dtype, dtype.name) for dtype in faces if dtype is not None}
    main |= {_NAMES.get(dtype, dtype.name) for dtype, _ in sizes.most_common(1)}
    return Precision(*of_int8, _NARROW & found, frozenset(main), has_groups(model))


def _quantises_activations(node: onnx_ir.Node) -> bool:
    if node.op_type == "QuantizeLinear":
        return node.inputs[0] is not None and constant_tensor(node.inputs[0]) is None
    return node.op_type in _INTEGERS


def _constants(model: onnx_ir.Model) -> Iterator[onnx_ir.TensorProtocol]:
    """Yield the weights of a graph: initializers, and those in Constant nodes, of bodies and functions too."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    inside = [node for function in model.functions.values() for node in function.all_nodes()]
    for node in (*model.graph.all_nodes(), *inside):
        attribute = node.attributes.get("value") if node.op_type == "Constant" and not node.domain else None
        if attribute is not None and attribute.type == onnx_ir.AttributeType.TENSOR and not attribute.is_ref():
            yield attribute.as_tensor()


def fp32_twin_of(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return the fp32 twin of a model in bf16, which `precision_of` still knows for one."""
    twin = fp32_twin(model)
    twin.metadata_props[_WAS_BF16] = "1"
    return twin


def is_bf16_twin(model: onnx_ir.Model) -> bool:
    """Return whether the model stands for one in bf16, as fp32."""
    return _WAS_BF16 in model.metadata_props


def widened(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a graph in fp16 as fp32, so that roundings, which add up over layers, hide nothing; others as they are."""
    return fp32_twin(model, DataType.FLOAT16) if "fp16" in precision_of(model).narrow else model
