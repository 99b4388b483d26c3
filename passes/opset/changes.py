"""What changed in ONNX's own operators between opsets, as data: the base of `legalize`.

Every change of 12 to 26 stands in one place: here, if a node keeps its meaning without an edit; in `opset_converters`,
if it needs one. What stands in neither is refused. The tests compare both with the schemas of onnx.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx

from passopt.ir.graph.operators import operators

#: The first opset that is read, the first that a model is lowered to, and the last that onnxruntime runs.
OLDEST, LOWEST_TARGET, NEWEST = 11, 18, 26


#: Changes that only admit more: dtypes, optional inputs, and attributes whose default is what the operator did before.
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

#: The pass to run first where a target has no such operator.
DECOMPOSED_BY: Mapping[str, str] = {
    "Attention": "decompose-attention",
    "Gelu": "decompose-activations",
    "RMSNormalization": "decompose-rms-norm",
    "RotaryEmbedding": "decompose-rotary",
    "Swish": "decompose-activations",
}


@functools.cache
def changes(op_type: str) -> tuple[int, ...]:
    """The opsets in which an operator of the default domain was made or changed, in order; empty if there is none."""
    return _history().get(op_type, ())


@functools.cache
def _history() -> Mapping[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            found.setdefault(schema.name, []).append(schema.since_version)
    return {name: tuple(sorted(versions)) for name, versions in found.items()}
