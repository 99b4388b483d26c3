"""Which values of a graph `cast` narrows and which stay in fp32, from what each is computed of and for.

Narrow: products with weights and what flows between them. Wide: norms, softmax, and everything that is computed from
positions and masks, such as ALiBi biases and rotary angles. Weights take the dtype that their readers need.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir

from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.ir.graph.operators import operators
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant

DataType = onnx_ir.DataType

#: The dtypes that are cast; fp64 is somebody's intention.
FLOATS = frozenset({DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16})


class Kind(enum.Enum):
    """What a value is made of."""

    NARROW = "activations, in the dtype of the model"
    WIDE = "activations inside an fp32 island"
    POSITION = "positions, lengths and masks only"
    WEIGHT = "weights and constants only"
    ROWS = "rows of a weight that indices pick: an embedding, or a table of angles"
    RANGE = "a range of a constant that lengths pick: a table of angles or biases"


_CONSTANT = frozenset({Kind.WEIGHT, Kind.ROWS, Kind.RANGE})
_PICKS = {"Gather": Kind.ROWS, "GatherND": Kind.ROWS, "GatherElements": Kind.ROWS, "Slice": Kind.RANGE}

#: Operators that move data: the result is in the dtype of what it moves.
_MOVES = operators(
    "AllGather AllReduce Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape",
    "ScatterElements ScatterND Slice SpaceToDepth Split Squeeze TensorScatter Tile TopK Transpose Trilu Unsqueeze",
)
#: Operators that a narrow dtype does no harm to, if what they read is narrow.
_FOLLOWS = operators(
    "Abs Add ArgMax ArgMin Celu Clip Div Dropout Elu Equal Erf Gelu Greater GreaterOrEqual HardSigmoid HardSwish",
    "IsInf IsNaN LeakyRelu Less LessOrEqual Max Mean Min Mish Mul Neg PRelu Relu Selu Sigmoid Sign Sub Sum Swish Tanh",
    "ThresholdedRelu Where",
)
#: Products with weights, and operators that keep their own sums in fp32.
_NARROWS = operators(
    "Attention Conv ConvTranspose DequantizeLinear Einsum Gemm LayerNormalization MatMul RMSNormalization",
)
#: Operators that move a cast from behind them to what they read, where that is read in fp32 anyway.
_LIFTS = operators("Concat Neg Slice Split")
#: Inputs of a function of passopt's own that are fp32 whatever the model's dtype: slopes, positions, mask.
_ALIBI = frozenset({ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE})
_ALIBI_WIDE = (3, 4, 5)
_ROTARY = "RotaryEmbedding"


def is_float(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.dtype in FLOATS


def is_dtype_cast(node: onnx_ir.Node | None) -> bool:
    """A cast between floating dtypes: what this pass takes away and puts where it belongs."""
    if node is None or node.domain or node.op_type not in {"Cast", "CastLike"}:
        return False
    return is_float(node.inputs[0]) and is_float(node.outputs[0])


def uncast(value: onnx_ir.Value) -> onnx_ir.Value:
    """What a value is before all casts between floating dtypes."""
    node = value.producer()
    while node is not None and is_dtype_cast(node):
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    return value


def readers(value: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """Who reads a value, through casts between floating dtypes, and as which input."""
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
    """A weight or constant that the caller cannot replace."""
    return constant_tensor(value) is not None


class Islands:
    """The decision for every floating value of the main graph, made in one sweep in topological order."""

    def __init__(self, graph: onnx_ir.Graph, target: DataType, opset: int) -> None:
        self.target = target
        self.opset = opset
        self._kinds: dict[onnx_ir.Value, Kind] = {}
        self._wide_tables: set[onnx_ir.Value] = set()
        self._biases: set[onnx_ir.Value] = set()
        self._readers: dict[onnx_ir.Node, Kind] = {}
        nodes = [node for node in graph if not is_dtype_cast(node)]
        for node in nodes:
            self._sweep(node)
        self._lift(nodes)

    def dtype(self, value: onnx_ir.Value) -> DataType:
        """The dtype that a computed value or graph input gets."""
        value = uncast(value)
        kind = self.kind(value)
        wide = kind in {Kind.WIDE, Kind.POSITION} or (kind in _CONSTANT and value in self._wide_tables)
        return DataType.FLOAT if wide else self.target

    def wanted(self, node: onnx_ir.Node, index: int) -> DataType | None:
        """The dtype in which `node` reads input `index`; None if any will do."""
        if node.domain == DOMAIN and node.op_type in _ALIBI:
            return DataType.FLOAT if index in _ALIBI_WIDE else self.target
        if not node.domain and node.op_type in {"Shape", "Size", "Cast", "CastLike"}:
            return None
        floats = [value for value in node.outputs if is_float(value)]
        if floats:
            return self.dtype(floats[0])
        return DataType.FLOAT if self._readers[node] in {Kind.WIDE, Kind.POSITION} else self.target

    def kind(self, value: onnx_ir.Value) -> Kind | None:
        """None for integers and booleans that are computed."""
        value = uncast(value)
        found = self._kinds.get(value)
        if found is not None:
            return found
        if is_leaf(value):
            return Kind.WEIGHT
        return Kind.NARROW if is_float(value) else None

    def _sweep(self, node: onnx_ir.Node) -> None:
        kind = self._kind_of(node)
        self._readers[node] = kind
        for value in node.outputs:
            if is_float(value) or kind in _CONSTANT:
                self._kinds[value] = kind
        if kind == Kind.POSITION and self._makes_bias(node):
            self._biases.update(node.outputs)

    def _makes_bias(self, node: onnx_ir.Node) -> bool:
        """Positions times one number per head, and what is computed of that."""
        inputs = [value for value in node.inputs if value is not None]
        if any(uncast(value) in self._biases for value in inputs):
            return True
        return node.op_type in {"Mul", "MatMul"} and any(self._is_constant(x) and _is_vector(x) for x in inputs)

    def _kind_of(self, node: onnx_ir.Node) -> Kind:
        inputs = [value for value in node.inputs if value is not None]
        floats = [value for value in inputs if is_float(value)]
        if node.domain == DOMAIN and node.op_type in _ALIBI:
            return Kind.NARROW
        if not node.domain and node.op_type in {"Cast", "CastLike"}:
            return self._cast_kind(inputs[0])
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
        if node.domain or not self._admits(node):
            return Kind.WIDE
        if node.op_type == "Attention":
            return self._attention(node)
        if node.op_type in _FOLLOWS:
            return self._followed(node, floats)
        if node.op_type == _ROTARY:
            self._widen(floats[1:])
        return Kind.NARROW if node.op_type in _NARROWS else Kind.WIDE

    def _cast_kind(self, source: onnx_ir.Value) -> Kind:
        """Integers become numbers: codes of an int8 table are rows of a weight, anything else is a position."""
        kind = self.kind(source)
        return kind if kind in _CONSTANT else Kind.POSITION

    def _moved(self, node: onnx_ir.Node) -> Kind:
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
        """Activations with anything: wide if something is that a narrow dtype would spoil."""
        if not all(self._holds(value) for value in floats):
            return Kind.WIDE
        kinds = {value: self.kind(value) for value in floats}
        found = set(kinds.values())
        # Rows that activations are multiplied with are angles; an embedding is added to.
        angles = {Kind.ROWS} if node.op_type == "Mul" and Kind.NARROW in found else set()
        tables = [value for value, kind in kinds.items() if kind in {Kind.RANGE, *angles}]
        if tables:
            self._widen(tables)
            return Kind.WIDE
        if Kind.WIDE in found:
            weighted = any(kind == Kind.WEIGHT and _is_vector(value) for value, kind in kinds.items())
            return Kind.NARROW if weighted and node.op_type in {"Mul", "Add"} else Kind.WIDE
        if node.op_type in {"Mul", "Div"}:  # a computed scale, such as 1/√d
            found = {kind for value, kind in kinds.items() if kind != Kind.POSITION or _is_vector(value)}
        return Kind.WIDE if Kind.POSITION in found else Kind.NARROW

    def _attention(self, node: onnx_ir.Node) -> Kind:
        """A mask that holds slopes · positions makes the whole operator an island: its sum is in the dtype of q."""
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or not is_float(mask):
            return Kind.NARROW
        biased = uncast(mask) in self._biases or self.kind(mask) == Kind.RANGE
        if biased:
            self._widen([mask])
        return Kind.WIDE if biased else Kind.NARROW

    def _lift(self, nodes: list[onnx_ir.Node]) -> None:
        """Move pieces of what is read in fp32 anyway in fp32 too: one cast before them, none behind each."""
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
        """True unless this is a constant that the narrow dtype has no normal number for."""
        array = small_constant(uncast(value))
        return array is None or fits(array, self.target)

    def _widen(self, values: Iterable[onnx_ir.Value]) -> None:
        """Tables that positions are combined with stay in fp32, from the constant on."""
        work = [uncast(value) for value in values if self._is_constant(value)]
        while work:
            value = work.pop()
            node = value.producer()
            if value in self._wide_tables or node is None:
                continue
            self._wide_tables.add(value)
            work += [uncast(item) for item in node.inputs if is_float(item) and item is not None]

    def _admits(self, node: onnx_ir.Node) -> bool:
        """Whether the operator exists for the narrow dtype."""
        name = f"tensor({onnx.TensorProto.DataType.Name(self.target.value).lower()})"
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        formals = [*schema.inputs[: len(node.inputs)], *schema.outputs[: len(node.outputs)]]
        return all(name in formal.types for formal in formals if "tensor(float)" in formal.types)


def fits(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: DataType) -> bool:
    """Whether no finite number of a constant is too large for `dtype`, and a single one not too small."""
    smallest, largest = finite_limits(dtype)
    sizes = np.abs(np.asarray(array, np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return bool((sizes <= largest).all() and (array.size > 1 or (sizes >= smallest).all()))


def finite_limits(dtype: DataType) -> tuple[float, float]:
    """The smallest normal and the largest number."""
    import ml_dtypes

    found = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return float(found.smallest_normal), float(found.max)


def _weakest(kinds: set[Kind]) -> Kind:
    """Rows of an embedding stay rows, whatever constant is added to them."""
    return next((kind for kind in (Kind.ROWS, Kind.RANGE) if kind in kinds), Kind.WEIGHT)


def _is_vector(value: onnx_ir.Value) -> bool:
    """More than one element; so is a value of unknown shape."""
    if value.shape is None:
        return True
    return any(dim != 1 for dim in value.shape.dims)
