"""Check that padding weights with zeros changes no result.

Over a finished propagation, the check follows forward what the padded part of each sharded value holds. Padded elements
mix with true ones only in contractions, where a padded channel must add a finite number times zero. Elsewhere even NaN
does no harm, since gathered outputs cut the padding off.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.weights.expressions import QuantizeScales
from passopt.ir.weights.lazy_weight import expression_of, small_constant
from passopt.passes.sharding.placement import Sharded
from passopt.passes.sharding.propagate import Propagation, describe, is_constant, is_weight_side
from passopt.passes.sharding.quantized_activations import scale_uses


class Padded(enum.IntEnum):
    """The content of the padded part of a value, from the best case to the worst."""

    ZERO = 0
    POSITIVE = 1
    FINITE = 2
    UNKNOWN = 3


#: Operators that make zero of zero, and finite numbers of finite ones.
_KEEP = frozenset(
    {"Transpose", "Reshape", "Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Slice", "Split", "Gather"}
    | {"Neg", "Abs", "Relu", "LeakyRelu", "Elu", "Tanh", "Erf", "Gelu", "Swish", "HardSwish", "Floor", "Ceil", "Round"}
    | {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Sin", "RotaryEmbedding", "GatherND"}
)
#: Operators that make finite numbers of finite ones, but not always zero of zero.
_BOUNDED = frozenset(
    {"Sigmoid", "Cos", "Softplus", "Softmax", "Clip", "ArgMax", "And", "Or", "Xor", "Not", "Equal", "Greater", "Less"}
    | {
        "GreaterOrEqual",
        "LessOrEqual",
        "IsNaN",
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
    }
    | {"Attention", "AlibiAttention", "AlibiAttentionNoCache", "QuantizeLinear"}
)
#: Operators that make zero only if all inputs are zero. A replicated input has its own elements where others have
#: padding.
_JOINING = frozenset({"Add", "Sub", "Max", "Min", "Sum", "Where", "Concat"})
_WIDE = frozenset({onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE})
_PRODUCTS = frozenset({"Mul", "MatMul", "MatMulInteger"})
#: Operators that may overflow for finite numbers, since they square or grow faster, and what they make of zero.
_OF_ZERO = {
    "ReduceL2": Padded.ZERO,
    "ReduceSumSquare": Padded.ZERO,
    "ReduceProd": Padded.FINITE,
    "Exp": Padded.FINITE,
}


def check_padding(state: Propagation, degree: int) -> None:
    """Raise PassError, which names the contraction, if padding with zeros could change a sum."""
    PaddingCheck(state, degree).run()


class PaddingCheck:
    """Follow the padded parts of all values through a graph that is to be sharded over `degree` ranks."""

    def __init__(self, state: Propagation, degree: int) -> None:
        self.state = state
        self.degree = degree
        self._padded: dict[onnx_ir.Value, Padded] = {}
        self._origin: dict[onnx_ir.Value, onnx_ir.Node] = {}
        # A constant that is used as scales is padded with a number other than zero, also for its other uses.
        self._scales = {use.node.inputs[use.index] for use in scale_uses(state)}

    def run(self) -> None:
        """Check every contraction, in the order of the graph; raise PassError for the first that may be wrong."""
        for node in self.state.model.graph:
            if node.op_type == "MatMulInteger" or any(value in self.state.partial for value in node.outputs):
                self._check_contraction(node)
            for value in node.outputs:
                if self._is_padded(self.state.specs.get(value)):
                    self._padded[value] = self._follow(node, value)

    def _is_padded(self, spec: object) -> bool:
        return isinstance(spec, Sharded) and spec.units % self.degree != 0

    def _input(self, node: onnx_ir.Node, index: int) -> Padded | None:
        """Return what the padded part of input `index` holds; None if it is replicated or needs no padding."""
        value = node.inputs[index]
        if value is None or not self._is_padded(self.state.spec(node, index)):
            return None
        if not is_constant(value):
            # A value that is not known is the cache, whose padded heads hold what the graph computed for them before.
            return self._padded.get(value, Padded.FINITE)
        is_scale = value in self._scales or isinstance(expression_of(value), QuantizeScales)
        return Padded.FINITE if is_scale else Padded.ZERO

    def _follow(self, node: onnx_ir.Node, value: onnx_ir.Value) -> Padded:
        """Return what the padded part of an output holds, and note the node that first made it unknown."""
        inputs = [self._input(node, index) for index in range(len(node.inputs))]
        known = [item for item in inputs if item is not None]
        found = Padded.UNKNOWN if Padded.UNKNOWN in known else self._outcome(node, inputs, known)
        if found is Padded.UNKNOWN:
            sources = [self._origin[item] for item in node.inputs if item in self._origin]
            self._origin[value] = sources[0] if sources else node
        return found

    def _outcome(self, node: onnx_ir.Node, inputs: list[Padded | None], known: list[Padded]) -> Padded:
        """Return what the padded part of the outputs holds; that of no input may be unknown."""
        kind = node.op_type
        special = _SPECIAL.get(kind)
        if special is not None and (found := special(node, inputs)) is not None:
            return found
        # Only the special cases above keep a positive number positive; for all others it is just a finite number.
        inputs = [Padded.FINITE if item is Padded.POSITIVE else item for item in inputs]
        known = [item for item in inputs if item is not None]
        if kind == "Expand" or kind in _BOUNDED:
            return known[0] if kind == "Expand" and known else Padded.FINITE
        if not known:
            return Padded.UNKNOWN
        if kind in _KEEP:
            return max(known)
        if kind in _PRODUCTS:
            return min(known)
        if kind in _JOINING:
            data = inputs[1:] if kind == "Where" else inputs
            return Padded.ZERO if all(item is Padded.ZERO for item in data) else Padded.FINITE
        if kind in _OF_ZERO and max(known) is Padded.ZERO:
            return _OF_ZERO[kind]
        return Padded.UNKNOWN

    def _check_contraction(self, node: onnx_ir.Node) -> None:
        """Raise PassError unless every padded channel of a contraction adds a finite number times a weight of zero."""
        sides = [self._input(node, 0), self._input(node, 1)]
        if sides == [None, None]:
            return
        weights = [index for index in (0, 1) if is_weight_side(node.inputs[index])]
        if not weights:
            raise PassError(
                f"{describe(node)}: cannot be padded: expected a weight on one side of the padded axis, found the "
                f"activations {_names(node)}; choose a degree that divides the units"
            )
        weight = weights[-1]
        for index in (0, 1):
            expected = Padded.ZERO if index == weight else Padded.FINITE
            found = sides[index]
            if found is not None and found > expected:
                raise PassError(self._reason(node, index, expected, found))

    def _reason(self, node: onnx_ir.Node, index: int, expected: Padded, found: Padded) -> str:
        value = node.inputs[index]
        assert value is not None
        origin = self._origin.get(value) or value.producer()
        made = f", made by {describe(origin)}" if origin is not None else ""
        return (
            f"{describe(node)}: cannot be padded: expected the padding of {value.name} to be {expected.name.lower()}, "
            f"found {found.name.lower()}{made}; choose a degree that divides the units"
        )


def _names(node: onnx_ir.Node) -> str:
    return " and ".join(str(value.name) for value in node.inputs if value is not None)


def _dequantized(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return what a DequantizeLinear makes of padded codes: zero for zero codes, unless there is a zero point."""
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    return inputs[0] if inputs[0] is not None and not has_zero_point else Padded.FINITE


def _shifted(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded | None:
    """Return POSITIVE for zero plus a positive constant, as the epsilon under a root is; None for any other Add."""
    for one, other in ((0, 1), (1, 0)):
        number = small_constant(node.inputs[other])
        if inputs[one] is Padded.ZERO and inputs[other] is None and number is not None and bool((number > 0).all()):
            return Padded.POSITIVE
    return None


def _root(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return what a Sqrt makes of the padding; a number that may be negative has no known root."""
    return (
        Padded.POSITIVE if inputs[0] is Padded.POSITIVE else Padded.ZERO if inputs[0] is Padded.ZERO else Padded.UNKNOWN
    )


def _reciprocal(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return POSITIVE for one over a positive number, except in 16 bits, where one over an epsilon may overflow."""
    positive = inputs[0] is Padded.POSITIVE and node.outputs[0].dtype in _WIDE
    return Padded.POSITIVE if positive else Padded.UNKNOWN


def _quotient(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return what a Div makes of the padding.

    A divisor that all channels share is as harmless for padded channels as for true ones, unless it is a constant zero.
    """
    top, bottom = inputs
    divisor = node.inputs[1]
    if bottom is Padded.POSITIVE and node.outputs[0].dtype in _WIDE:
        return Padded.ZERO if top is Padded.ZERO else Padded.FINITE
    if top is None or bottom is not None or divisor is None:
        return Padded.UNKNOWN
    if is_constant(divisor):
        number = small_constant(divisor)
        return top if number is not None and bool((number != 0).all()) else Padded.UNKNOWN
    return top


def _power(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return ZERO for zero to a positive constant power."""
    exponent = small_constant(node.inputs[1])
    positive = inputs[1] is None and exponent is not None and bool((exponent > 0).all())
    return Padded.ZERO if positive and inputs[0] is Padded.ZERO else Padded.UNKNOWN


def _linear_with_bias(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """Return ZERO for a Gemm, alpha · A · B + beta · C, if A or B is zero, and the bias C is zero or absent."""
    without_bias = len(inputs) < 3 or node.inputs[2] is None
    zero = Padded.ZERO in inputs[:2] and (without_bias or inputs[2] is Padded.ZERO)
    return Padded.ZERO if zero else Padded.FINITE


#: Rules of single operators; if one returns None, the general rules apply.
_SPECIAL: dict[str, Callable[[onnx_ir.Node, list[Padded | None]], Padded | None]] = {
    "Add": _shifted,
    "DequantizeLinear": _dequantized,
    "Div": _quotient,
    "Gemm": _linear_with_bias,
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "Sqrt": _root,
}
