"""Whether zeros added to weights stay harmless: a padded channel may only meet a contraction as finite times zero.

Followed forward over a finished propagation: what the padded part of each sharded value is. It mixes with true
elements in contractions only; gathered outputs cut it off, so elsewhere even NaN does no harm.
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
    """What the padded part holds, from the best to the worst."""

    ZERO = 0
    POSITIVE = 1
    FINITE = 2
    UNKNOWN = 3


#: Zero becomes zero, finite stays finite.
_KEEP = frozenset(
    {"Transpose", "Reshape", "Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Slice", "Split", "Gather"}
    | {"Neg", "Abs", "Relu", "LeakyRelu", "Elu", "Tanh", "Erf", "Gelu", "Swish", "HardSwish", "Floor", "Ceil", "Round"}
    | {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Sin", "RotaryEmbedding", "GatherND"}
)
#: Finite for finite inputs, but not zero for zero.
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
    | {"Attention", "AlibiAttention", "AlibiAttentionNoCache"}
)
#: Zero only if all inputs are: one that is replicated puts its own elements next to the padding.
_JOINING = frozenset({"Add", "Sub", "Max", "Min", "Sum", "Where", "Concat"})
_WIDE = frozenset({onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE})
_PRODUCTS = frozenset({"Mul", "MatMul", "MatMulInteger"})
#: What squares, or grows faster, may overflow; of zero it is zero, or one.
_OF_ZERO = {
    "ReduceL2": Padded.ZERO,
    "ReduceSumSquare": Padded.ZERO,
    "ReduceProd": Padded.FINITE,
    "Exp": Padded.FINITE,
}


def check_padding(state: Propagation, degree: int) -> None:
    """Raises PassError that names the contraction whose sum padding with zeros could change."""
    PaddingCheck(state, degree).run()


class PaddingCheck:
    def __init__(self, state: Propagation, degree: int) -> None:
        self.state = state
        self.degree = degree
        self._padded: dict[onnx_ir.Value, Padded] = {}
        self._origin: dict[onnx_ir.Value, onnx_ir.Node] = {}
        # Padded scales are not zero, wherever else the same constant is used.
        self._scales = {use.node.inputs[use.index] for use in scale_uses(state)}

    def run(self) -> None:
        for node in self.state.model.graph:
            if node.op_type == "MatMulInteger" or any(value in self.state.partial for value in node.outputs):
                self._check_contraction(node)
            for value in node.outputs:
                if self._is_padded(self.state.specs.get(value)):
                    self._padded[value] = self._follow(node, value)

    def _is_padded(self, spec: object) -> bool:
        return isinstance(spec, Sharded) and spec.units % self.degree != 0

    def _input(self, node: onnx_ir.Node, index: int) -> Padded | None:
        """What input `index` holds in its padded part; None if it is replicated or needs no padding."""
        value = node.inputs[index]
        if value is None or not self._is_padded(self.state.spec(node, index)):
            return None
        if not is_constant(value):
            # A padded head of the cache holds what the graph computed for it before.
            return self._padded.get(value, Padded.FINITE)
        is_scale = value in self._scales or isinstance(expression_of(value), QuantizeScales)
        return Padded.FINITE if is_scale else Padded.ZERO

    def _follow(self, node: onnx_ir.Node, value: onnx_ir.Value) -> Padded:
        inputs = [self._input(node, index) for index in range(len(node.inputs))]
        known = [item for item in inputs if item is not None]
        found = Padded.UNKNOWN if Padded.UNKNOWN in known else self._outcome(node, inputs, known)
        if found is Padded.UNKNOWN:
            sources = [self._origin[item] for item in node.inputs if item in self._origin]
            self._origin[value] = sources[0] if sources else node
        return found

    def _outcome(self, node: onnx_ir.Node, inputs: list[Padded | None], known: list[Padded]) -> Padded:
        """The padded part of the outputs, where that of no input is unknown."""
        kind = node.op_type
        special = _SPECIAL.get(kind)
        if special is not None and (found := special(node, inputs)) is not None:
            return found
        # What keeps a positive number positive is listed above; to anything else it is any finite one.
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
        """A sum over padded channels is right if each of them adds a finite number times a weight of zero."""
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
    """Codes of zero are zeros unless there is a zero point."""
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    return inputs[0] if inputs[0] is not None and not has_zero_point else Padded.FINITE


def _shifted(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded | None:
    """Zero plus a positive constant, as the epsilon under a root."""
    for one, other in ((0, 1), (1, 0)):
        number = small_constant(node.inputs[other])
        if inputs[one] is Padded.ZERO and inputs[other] is None and number is not None and bool((number > 0).all()):
            return Padded.POSITIVE
    return None


def _root(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    return (
        Padded.POSITIVE if inputs[0] is Padded.POSITIVE else Padded.ZERO if inputs[0] is Padded.ZERO else Padded.UNKNOWN
    )


def _reciprocal(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """One over an epsilon may be too large for 16 bits."""
    positive = inputs[0] is Padded.POSITIVE and node.outputs[0].dtype in _WIDE
    return Padded.POSITIVE if positive else Padded.UNKNOWN


def _quotient(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """A divisor that all channels share is as harmless for padded ones as for true ones, unless it is a zero."""
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
    """Zero to a positive power."""
    exponent = small_constant(node.inputs[1])
    positive = inputs[1] is None and exponent is not None and bool((exponent > 0).all())
    return Padded.ZERO if positive and inputs[0] is Padded.ZERO else Padded.UNKNOWN


def _linear_with_bias(node: onnx_ir.Node, inputs: list[Padded | None]) -> Padded:
    """alpha · A · B + beta · C: zero if one factor and the bias are."""
    without_bias = len(inputs) < 3 or node.inputs[2] is None
    zero = Padded.ZERO in inputs[:2] and (without_bias or inputs[2] is Padded.ZERO)
    return Padded.ZERO if zero else Padded.FINITE


#: None: nothing special here.
_SPECIAL: dict[str, Callable[[onnx_ir.Node, list[Padded | None]], Padded | None]] = {
    "Add": _shifted,
    "DequantizeLinear": _dequantized,
    "Div": _quotient,
    "Gemm": _linear_with_bias,
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "Sqrt": _root,
}
