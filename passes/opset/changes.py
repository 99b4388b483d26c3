"""List, as data for `legalize`, which changes of ONNX's own operators leave the meaning of a node as it was.

Every change from opset 12 to 26 stands in one place: in `UNCHANGED`, if a node keeps its meaning without an edit, or in
`converters`, if it needs one. `legalize` refuses changes that stand in neither. The tests compare both tables with the
operator schemas of the onnx package.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx

from passopt.ir.graph.operators import operators

#: The oldest opset that is read, the oldest that a model can be lowered to, and the newest that onnxruntime runs.
OLDEST, LOWEST_TARGET, NEWEST = 11, 18, 26


#: By opset, the operators whose change only admits more: further dtypes, optional inputs, and attributes whose default
#: is what the operator did before.
UNCHANGED: Mapping[int, frozenset[str]] = {
    12: operators("ArgMax ArgMin Clip Constant GatherND Max Min Pow ReduceMax ReduceMin"),
    13: operators(
        "Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace DequantizeLinear Div Dropout Equal Exp",
        "Expand Flatten Floor Gather GatherElements GatherND Gemm Greater Identity If IsNaN LRN Less Log Loop",
        "MatMul Max Mean MeanVarianceNormalization Min Mod Mul Neg NonZero Pad Pow QuantizeLinear Reciprocal",
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare",
        "Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign Size Slice SpaceToDepth Sqrt Sub Sum Tanh Tile",
        "Transpose",
    ),
    14: operators("Add CumSum Div GRU Identity LSTM Mul RNN Relu Reshape Sub"),
    15: operators("BatchNormalization Pow Shape"),
    16: operators("GreaterOrEqual Identity If LeakyRelu LessOrEqual Loop PRelu Scan ScatterElements ScatterND Where"),
    18: operators("OptionalGetElement OptionalHasElement Pad ScatterElements ScatterND"),
    19: operators(
        "Cast CastLike Constant DequantizeLinear Equal Identity If Loop Pad QuantizeLinear Reshape Scan Shape",
        "Size",
    ),
    20: operators("ConstantOfShape IsInf IsNaN ReduceMax ReduceMin"),
    21: operators(
        "Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QLinearMatMul",
        "QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
    ),
    22: operators(
        "Acos Acosh Asin Asinh Atan Atanh Bernoulli Conv ConvTranspose Cos Cosh Det Dropout Elu EyeLike GRU",
        "HardSigmoid HardSwish InstanceNormalization LSTM LpNormalization Mish Multinomial RNN RandomNormal",
        "RandomNormalLike RandomUniform RandomUniformLike Round Selu Sin Sinh Softplus Softsign Tan",
        "ThresholdedRelu",
    ),
    23: operators(
        "Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear",
        "Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
    ),
    24: operators(
        "Attention Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad QuantizeLinear Reshape",
        "Scan Shape Size SplitToSequence Squeeze TopK Transpose Unsqueeze",
    ),
    25: operators(
        "Attention Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad",
        "QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
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
