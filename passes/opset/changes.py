"""List, as data for `legalize`, which changes of ONNX's own operators leave the meaning of a node as it was.

Every change from opset 8 to 28 stands in one place: in `UNCHANGED`, if a node keeps its meaning without an edit, or in
`converters`, if it needs one. `legalize` refuses changes that stand in neither. The tests compare both tables with the
operator schemas of the onnx package, so a new version of it is noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx

from passopt.ir.graph.operators import operators

#: The oldest opset that is read, the oldest that a model can be lowered to, the newest that onnxruntime runs, and the
#: newest that is read, which a model can only be lowered from.
OLDEST, LOWEST_TARGET, NEWEST, NEWEST_READ = 7, 18, 26, 28


#: By opset, the operators whose change only admits more: further dtypes, optional inputs, and attributes whose default
#: is what the operator did before. Where ONNX reworded what an operator does, onnxruntime computes the same as before:
#: the indices of OneHot below 0 (11), and the padding of ConvTranspose (11). `meanings` refuses the rest.
UNCHANGED: Mapping[int, frozenset[str]] = {
    8: operators("Max MaxPool Mean Min Sum"),
    9: operators("Cast Constant Flatten Gemm Greater Less MatMul PRelu"),
    10: operators("AveragePool MaxPool"),
    11: operators(
        "ArgMax ArgMin AveragePool Compress Concat Constant Conv ConvTranspose DepthToSpace Equal Flatten Gather Gemm",
        "Hardmax If LogSoftmax Loop LpPool MaxPool MaxUnpool NonMaxSuppression OneHot ReduceL1 ReduceL2 ReduceLogSum",
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Scan Slice Softmax Split",
        "Squeeze TopK Unsqueeze",
    ),
    12: operators("ArgMax ArgMin Clip Constant GatherND Max MaxPool Min Pow ReduceMax ReduceMin"),
    13: operators(
        "Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace DequantizeLinear Div Dropout Equal Exp",
        "Expand Flatten Floor Gather GatherElements GatherND Gemm Greater Identity If IsNaN LRN Less Log Loop MatMul",
        "Max Mean MeanVarianceNormalization Min Mod Mul Neg NegativeLogLikelihoodLoss NonZero Pad Pow QuantizeLinear",
        "Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd",
        "ReduceSumSquare Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign Size Slice SoftmaxCrossEntropyLoss",
        "SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose",
    ),
    14: operators("Add CumSum Div GRU Identity LSTM Mul RNN Relu Reshape Sub"),
    15: operators("BatchNormalization Pow Shape"),
    16: operators("GreaterOrEqual Identity If LeakyRelu LessOrEqual Loop PRelu Scan ScatterElements ScatterND Where"),
    18: operators("LpPool OptionalGetElement OptionalHasElement Pad Resize ScatterElements ScatterND"),
    19: operators(
        "AveragePool Cast CastLike Constant DequantizeLinear Equal Identity If Loop Pad QuantizeLinear Reshape Resize",
        "Scan Shape Size",
    ),
    20: operators("ConstantOfShape IsInf IsNaN ReduceMax ReduceMin"),
    21: operators(
        "Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QLinearMatMul",
        "QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
    ),
    22: operators(
        "Acos Acosh Asin Asinh Atan Atanh AveragePool Bernoulli Conv ConvTranspose Cos Cosh DeformConv Det Dropout Elu",
        "EyeLike GRU GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample HardSigmoid HardSwish",
        "InstanceNormalization LSTM LpNormalization LpPool MaxPool MaxRoiPool MaxUnpool Mish Multinomial",
        "NegativeLogLikelihoodLoss RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike RoiAlign Round",
        "Selu Sin Sinh Softplus Softsign Tan ThresholdedRelu",
    ),
    23: operators(
        "Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear Reshape",
        "Scan Shape Size Squeeze Transpose Unsqueeze",
    ),
    24: operators(
        "Attention Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear Reshape Scan",
        "Shape Size SplitToSequence Squeeze TopK Transpose Unsqueeze",
    ),
    25: operators(
        "Attention Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear",
        "Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
    ),
    27: operators("Range"),
    28: operators(
        "BitShift Cast Celu Compress DepthToSpace DequantizeLinear Einsum Mod OneHot Optional OptionalGetElement",
        "OptionalHasElement QuantizeLinear ReduceLogSum ReduceLogSumExp ReverseSequence SpaceToDepth Unique",
    ),
}

#: The pass that takes an operator apart, for models that are lowered to an opset without it.
DECOMPOSED_BY: Mapping[str, str] = {
    "Attention": "decompose-attention",
    "Gelu": "decompose-activations",
    "RMSNormalization": "decompose-rms-norm",
    "RotaryEmbedding": "decompose-rotary",
    "Swish": "decompose-activations",
}


@functools.cache
def changes(op_type: str) -> tuple[int, ...]:
    """Return the opsets, in order, in which an operator of ONNX's default domain was added or changed.

    The result is empty if there is no such operator.
    """
    return _history().get(op_type, ())


@functools.cache
def _history() -> Mapping[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            found.setdefault(schema.name, []).append(schema.since_version)
    return {name: tuple(sorted(versions)) for name, versions in found.items()}
