"""Decide for the pass `cast` which values of a graph become narrow and which stay in fp32.

The decision follows from what a value is computed from and what reads it. Narrow are products with weights and what
flows between them. Wide (fp32) are norms, softmax, and everything that is computed from positions and masks, such as
ALiBi biases and rotary angles. Weights take the dtype that their readers need.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_ir

from passopt.ir.graph.operators import operators
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant
from passopt.passes.precision.cast_borders import Borders, is_alibi, is_float

DataType = onnx_ir.DataType


class Kind(enum.Enum):
    """The kind of a value, by what it is computed from."""

    NARROW = "activations, in the dtype of the model"
    WIDE = "activations inside an fp32 island"
    POSITION = "positions, lengths and masks only"
    WEIGHT = "weights and constants only"
    ROWS = "rows of a weight that indices pick: an embedding, or a table of angles"
    RANGE = "a range of a constant that lengths pick: a table of angles or biases"
    KEPT = "what a node reads that keeps its dtypes"


_CONSTANT = frozenset({Kind.WEIGHT, Kind.ROWS, Kind.RANGE})
_PICKS = {"Gather": Kind.ROWS, "GatherND": Kind.ROWS, "GatherElements": Kind.ROWS, "Slice": Kind.RANGE}

#: Operators that only move data, so that their outputs have the dtype of what they move.
_MOVES = operators(
    "AllGather AllReduce Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape",
    "ScatterElements ScatterND Slice SpaceToDepth Split Squeeze TensorScatter Tile TopK Transpose Trilu Unsqueeze",
)
#: Operators that may compute in a narrow dtype without harm, if what they read is narrow.
_FOLLOWS = operators(
    "Abs Add ArgMax ArgMin Celu Clip Div Dropout Elu Equal Erf Gelu Greater GreaterOrEqual HardSigmoid HardSwish",
    "IsInf IsNaN LeakyRelu Less LessOrEqual Max Mean Min Mish Mul Neg PRelu Relu Selu Sigmoid Sign Sub Sum Swish Tanh",
    "ThresholdedRelu Where",
)
#: Products with weights, and operators that keep their own sums in fp32; they compute in the narrow dtype.
_NARROWS = operators(
    "Attention Conv ConvTranspose DequantizeLinear Einsum Gemm LayerNormalization MatMul RMSNormalization",
)
_NEVER = 1 << 30
#: Operators that ONNX defines by others, which take the dtype from this opset on only: Clip by Where, and the loss by
#: NegativeLogLikelihoodLoss. That of MeanVarianceNormalization adds a constant in fp32.
_LATE_BODIES = {
    ("Clip", DataType.BFLOAT16): 16,
    ("SoftmaxCrossEntropyLoss", DataType.BFLOAT16): 22,
    ("MeanVarianceNormalization", DataType.FLOAT16): _NEVER,
    ("MeanVarianceNormalization", DataType.BFLOAT16): _NEVER,
}
_SUMS = operators("ReduceMean ReduceSum")
#: The attributes by which operators state the dtype of their output.
STATED = ("to", "dtype", "output_dtype", "output_datatype")
#: Operators that are moved to fp32 if their outputs are only read in fp32 and their inputs are read in fp32 anyway; one
#: cast before them then replaces several behind them.
_LIFTS = operators("Concat Neg Slice Split")
#: The inputs of passopt's own attention functions that are fp32 in a model of any dtype: slopes, positions, mask.
_ALIBI_WIDE = (3, 4, 5)
_ROTARY = "RotaryEmbedding"


def is_dtype_cast(node: onnx_ir.Node | None) -> bool:
    """Return True if the node is a cast between floating dtypes, which the pass removes and places anew."""
    if node is None or node.domain or node.op_type not in {"Cast", "CastLike"}:
        return False
    return is_float(node.inputs[0]) and is_float(node.outputs[0])


def uncast(value: onnx_ir.Value) -> onnx_ir.Value:
    """Follow a value back through casts between floating dtypes, and return the value that the first of them reads."""
    node = value.producer()
    while node is not None and is_dtype_cast(node):
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    return value


def readers(value: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """List the nodes that read a value, directly or through casts between floating dtypes, with the input number."""
    found: list[tuple[onnx_ir.Node, int]] = []
    work = [value]
    while work:
        for use in work.pop().uses():
            if is_dtype_cast(use.node):
                work += use.node.outputs if use.idx == 0 else []
            else:
                found.append((use.node, use.idx))
    return found


def is_leaf(value: onnx_ir.Value) -> bool:
    """Return True for a weight or constant; False for an initializer that is also a graph input, and so replaceable."""
    return constant_tensor(value) is not None


class Islands:
    """The dtypes of all floating values of the main graph.

    The values are classified in one sweep in topological order; a second step then moves casts to better places.

    Args:
        graph: The main graph.
        target: The dtype of the model: narrow, or fp32 to widen it.
        opset: The opset of the model, to tell which operators exist for `target`.
        borders: What keeps the dtypes that it has.
    """

    def __init__(self, graph: onnx_ir.Graph, target: DataType, opset: int, borders: Borders) -> None:
        self.target = target
        self.opset = opset
        self.borders = borders
        self._kinds: dict[onnx_ir.Value, Kind] = {}
        self._wide_tables: set[onnx_ir.Value] = set()
        self._biases: set[onnx_ir.Value] = set()
        self._readers: dict[onnx_ir.Node, Kind] = {}
        nodes = [node for node in graph if not is_dtype_cast(node)]
        for node in nodes:
            self._sweep(node)
        self._lift(nodes)

    def dtype(self, value: onnx_ir.Value) -> DataType:
        """Return the dtype that a computed value or graph input is to have."""
        value = uncast(value)
        given = self.borders.given.get(value)
        if given is not None:
            return given
        kind = self.kind(value)
        wide = kind in {Kind.WIDE, Kind.POSITION} or (kind in _CONSTANT and value in self._wide_tables)
        return DataType.FLOAT if wide else self.target

    def wanted(self, node: onnx_ir.Node, index: int) -> DataType | None:
        """Return the dtype in which `node` must read input number `index`; None if it can read any."""
        kept = self.borders.read.get((node, index))
        if kept is not None or node not in self._readers:
            return kept
        if is_alibi(node):
            return DataType.FLOAT if index in _ALIBI_WIDE else self.target
        if not node.domain and node.op_type in {"Shape", "Size", "Cast", "CastLike"}:
            return None
        floats = [value for value in node.outputs if is_float(value)]
        if floats:
            return self.dtype(floats[0])
        return DataType.FLOAT if self._readers[node] in {Kind.WIDE, Kind.POSITION} else self.target

    def kind(self, value: onnx_ir.Value) -> Kind | None:
        """Return the kind of a value; None for computed integers and booleans."""
        value = uncast(value)
        found = self._kinds.get(value)
        if found is not None:
            return found
        if is_leaf(value):
            return Kind.WEIGHT
        return Kind.NARROW if is_float(value) else None

    def _sweep(self, node: onnx_ir.Node) -> None:
        """Classify a node and its outputs, whose inputs were classified before."""
        if node in self.borders.nodes:
            self._readers[node] = Kind.KEPT
            self._kinds.update(dict.fromkeys(node.outputs, self._kept_kind(node)))
            return
        kind = self._kind_of(node)
        self._readers[node] = kind
        for value in node.outputs:
            if is_float(value) or kind in _CONSTANT:
                self._kinds[value] = kind
        if kind == Kind.POSITION and self._makes_bias(node):
            self._biases.update(node.outputs)

    def _kept_kind(self, node: onnx_ir.Node) -> Kind:
        """Return the kind of what a node makes that keeps its dtypes: activations if it reads any, else positions."""
        sources = self.borders.sources(node)
        kinds = {self.kind(value) for value in sources}
        opaque = any(not isinstance(value.type, onnx_ir.TensorType) and value.is_graph_input() for value in sources)
        return Kind.NARROW if opaque or kinds & {Kind.NARROW, Kind.WIDE} else Kind.POSITION

    def _makes_bias(self, node: onnx_ir.Node) -> bool:
        """Return True if a node makes an ALiBi bias: positions times one number per head, or computed from such."""
        inputs = [value for value in node.inputs if value is not None]
        if any(uncast(value) in self._biases for value in inputs):
            return True
        return node.op_type in {"Mul", "MatMul"} and any(self._is_constant(x) and _is_vector(x) for x in inputs)

    def _kind_of(self, node: onnx_ir.Node) -> Kind:
        """Return the kind of what a node computes, and keep constants in fp32 that it combines with positions."""
        inputs = [value for value in node.inputs if value is not None]
        floats = [value for value in inputs if is_float(value)]
        if is_alibi(node):
            return Kind.NARROW
        if not node.domain and node.op_type in {"Cast", "CastLike"}:
            return self._cast_kind(inputs[0])
        if not node.domain and not self._admits(node):
            return self._excluded(floats)
        if node.op_type in _MOVES:
            return self._moved(node)
        if not floats:
            return Kind.POSITION
        kinds = {kind for value in floats if (kind := self.kind(value)) is not None}
        if node.op_type == "Where" and kinds <= _CONSTANT and self.kind(inputs[0]) is None:
            kinds.add(Kind.POSITION)
        if kinds == {Kind.WEIGHT} or (kinds <= _CONSTANT and node.op_type in _FOLLOWS):
            return _weakest(kinds)
        if Kind.POSITION in kinds and kinds <= {Kind.POSITION, Kind.WEIGHT, Kind.RANGE} and node.op_type != _ROTARY:
            self._widen(floats)
            return Kind.POSITION
        if node.op_type == "Attention":
            return self._attention(node)
        if node.op_type in _FOLLOWS:
            return self._followed(node, floats)
        if node.op_type == _ROTARY:
            self._widen(floats[1:])
        return Kind.NARROW if node.op_type in _NARROWS else Kind.WIDE

    def _excluded(self, floats: Sequence[onnx_ir.Value]) -> Kind:
        """Return the kind of what an operator makes that the target dtype does not have; it reads and gives fp32."""
        kinds = {self.kind(value) for value in floats}
        if kinds & {Kind.NARROW, Kind.WIDE}:
            return Kind.WIDE
        self._widen(floats)
        return Kind.POSITION

    def _cast_kind(self, source: onnx_ir.Value) -> Kind:
        """Return the kind of integers that are cast to a floating dtype.

        Constants, such as the codes of an int8 table, keep their kind; anything else is taken as positions.
        """
        kind = self.kind(source)
        return kind if kind in _CONSTANT else Kind.POSITION

    def _moved(self, node: onnx_ir.Node) -> Kind:
        """Return the kind of what an operator moves; rows or ranges if indices pick a part of a constant."""
        inputs = [value for value in node.inputs if value is not None]
        data = [value for value in inputs if is_float(value)] or inputs[:1]
        kinds = {kind for value in data if (kind := self.kind(value)) is not None}
        for strong in (Kind.NARROW, Kind.WIDE):
            if strong in kinds:
                return strong
        if Kind.POSITION in kinds or not kinds:
            self._widen(data)
            return Kind.POSITION
        by_index = any(self.kind(value) is None for value in inputs[1:])
        picked = {_PICKS[node.op_type]} if node.op_type in _PICKS and by_index else set()
        return _weakest(kinds | picked)

    def _followed(self, node: onnx_ir.Node, floats: list[onnx_ir.Value]) -> Kind:
        """Return the kind of what an elementwise operator makes of activations and other values.

        It is wide if a narrow dtype would spoil one of the values, such as angles, positions, or squares of a norm.
        """
        if not all(self._holds(value) for value in floats) or _is_square_of_a_norm(node):
            return Kind.WIDE
        kinds = {value: self.kind(value) for value in floats}
        found = set(kinds.values())
        # Rows of a table that activations are multiplied with are angles; rows that they are added to are an embedding.
        angles = {Kind.ROWS} if node.op_type == "Mul" and Kind.NARROW in found else set()
        tables = [value for value, kind in kinds.items() if kind in {Kind.RANGE, *angles}]
        if tables:
            self._widen(tables)
            return Kind.WIDE
        if Kind.WIDE in found:
            weighted = any(kind == Kind.WEIGHT and _is_vector(value) for value, kind in kinds.items())
            return Kind.NARROW if weighted and node.op_type in {"Mul", "Add"} else Kind.WIDE
        if node.op_type in {"Mul", "Div"}:  # A single number computed from lengths is a scale, such as 1/√d.
            found = {kind for value, kind in kinds.items() if kind != Kind.POSITION or _is_vector(value)}
        return Kind.WIDE if Kind.POSITION in found else Kind.NARROW

    def _attention(self, node: onnx_ir.Node) -> Kind:
        """Return WIDE for an Attention whose mask holds an ALiBi bias, and NARROW for any other.

        The operator adds the mask in the dtype of the queries, so with a bias all of it has to be in fp32.
        """
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or not is_float(mask):
            return Kind.NARROW
        biased = uncast(mask) in self._biases or self.kind(mask) == Kind.RANGE
        if biased:
            self._widen([mask])
        return Kind.WIDE if biased else Kind.NARROW

    def _lift(self, nodes: list[onnx_ir.Node]) -> None:
        """Let Concat, Neg, Slice and Split work in fp32 if their inputs and outputs are read in fp32 anyway.

        One cast before such an operator then replaces a cast behind each of its outputs.
        """
        candidates: set[onnx_ir.Node] = set()
        for node in reversed(nodes):
            if node.op_type in _LIFTS and self._readers[node] == Kind.NARROW and self._only_read_wide(node, candidates):
                candidates.add(node)
        for node in nodes:
            sources = [uncast(value) for value in node.inputs if value is not None and is_float(value)]
            if node in candidates and all(self._is_read_wide(value, candidates) for value in sources):
                self._readers[node] = Kind.WIDE
                self._kinds.update(dict.fromkeys(node.outputs, Kind.WIDE))

    def _only_read_wide(self, node: onnx_ir.Node, candidates: set[onnx_ir.Node]) -> bool:
        reads = [read for value in node.outputs for read in readers(value)]
        if not reads or any(value.is_graph_output() for value in node.outputs):
            return False
        return all(reader in candidates or self.wanted(reader, index) == DataType.FLOAT for reader, index in reads)

    def _is_read_wide(self, value: onnx_ir.Value, candidates: set[onnx_ir.Node]) -> bool:
        if self.dtype(value) == DataType.FLOAT:
            return True
        return any(
            reader not in candidates and self.wanted(reader, index) == DataType.FLOAT
            for reader, index in readers(value)
        )

    def _is_constant(self, value: onnx_ir.Value) -> bool:
        return self.kind(value) in _CONSTANT

    def _holds(self, value: onnx_ir.Value) -> bool:
        """Return False if this is a small constant with a number that the narrow dtype cannot hold."""
        array = small_constant(uncast(value))
        return array is None or fits(array, self.target)

    def _widen(self, values: Iterable[onnx_ir.Value]) -> None:
        """Keep constant tables that are combined with positions in fp32, from the constant itself on."""
        work = [uncast(value) for value in values if self._is_constant(value)]
        while work:
            value = work.pop()
            node = value.producer()
            if value in self._wide_tables or node is None:
                continue
            self._wide_tables.add(value)
            work += [uncast(item) for item in node.inputs if is_float(item) and item is not None]

    def _admits(self, node: onnx_ir.Node) -> bool:
        """Return True if ONNX defines the operator for the target dtype in all its floating inputs and outputs."""
        name = f"tensor({onnx.TensorProto.DataType.Name(self.target.value).lower()})"
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        read = _formals(node.inputs, schema.inputs)
        given = _formals(node.outputs, schema.outputs)
        if not all(name in formal.types for formal in (*read, *given)):
            return False
        if self.opset < _LATE_BODIES.get((node.op_type, self.target), 0):
            return False
        # An output whose dtype neither inputs nor attributes state has a dtype of its own, as the mean of a norm has,
        # or the default of an attribute that the node leaves out; a default of 0 means that of an input.
        follows = {formal.type_str for formal in read}
        known = [key for key in STATED if key in schema.attributes]
        states = any(key in node.attributes or not schema.attributes[key].default_value.i for key in known)
        return states or all(one.type_str in follows for one in given)


def _is_square_of_a_norm(node: onnx_ir.Node) -> bool:
    """Return True for a product of a value with itself that only means and sums read, as Pow in other norms.

    A norm's numbers are squares: from 256 on fp16 does not hold them, and a variance may come out negative.
    """
    if node.op_type != "Mul" or len({uncast(value) for value in node.inputs if value is not None}) > 1:
        return False
    found = [reader for value in node.outputs for reader, _ in readers(value)]
    return bool(found) and all(reader.op_type in _SUMS and not reader.domain for reader in found)


def _formals(
    values: Sequence[onnx_ir.Value | None], formals: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> list[onnx.defs.OpSchema.FormalParameter]:
    """Return the formal parameters of the floating values; further values belong to the last, which is variadic."""
    return [formals[min(index, len(formals) - 1)] for index, value in enumerate(values) if is_float(value)]


def fits(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: DataType) -> bool:
    """Return True if a constant can be stored in `dtype`.

    No finite number may be too large. Only if the constant is a single number, it must not be too small either.
    """
    smallest, largest = finite_limits(dtype)
    sizes = np.abs(np.asarray(array, np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return bool((sizes <= largest).all() and (array.size > 1 or (sizes >= smallest).all()))


def finite_limits(dtype: DataType) -> tuple[float, float]:
    """Return the smallest positive normal number and the largest number of a floating dtype."""
    import ml_dtypes

    found = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return float(found.smallest_normal), float(found.max)


def _weakest(kinds: set[Kind]) -> Kind:
    """Return the kind of constants that are combined: rows or a range if there is one, since they stay such."""
    return next((kind for kind in (Kind.ROWS, Kind.RANGE) if kind in kinds), Kind.WEIGHT)


def _is_vector(value: onnx_ir.Value) -> bool:
    """Return True if the value has more than one element, or its shape is unknown."""
    if value.shape is None:
        return True
    return any(dim != 1 for dim in value.shape.dims)
