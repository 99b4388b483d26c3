"""Choose lengths for the symbolic dimensions of a graph's inputs, without tying what the graph keeps apart.

Batch, seq and past have the lengths of a decoder's contract. Every other symbol is free, and an unnamed dimension is a
symbol of its own. Whether lengths are legal is not guessed: the graph runs on them, or it does not.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir

#: The lengths that the free symbols get in turn; unequal, so that a mixed-up axis shows.
_PRIMES = (2, 3, 5, 7, 11, 13)

#: The roles of a decoder's axes in one sample.
ROLES = ("batch", "seq", "past")
#: Batch, seq and past of the samples of a decoder: a chunk after a cache, one token after a cache, a prefill with an
#: empty cache, one token alone, and a chunk after one token.
_DECODER = ((2, 3, 5), (2, 1, 6), (1, 4, 0), (1, 1, 0), (3, 4, 1))

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_TOKENS = re.compile(r"(?:\A|_)(?:input_ids|position_ids|inputs_embeds|token_type_ids)\Z")
_DECODER_TOKENS = re.compile(r"\Adecoder_(?:input_ids|inputs_embeds)\Z")
#: Inputs of a decoder that come from its encoder, such as `past_key_values.0.encoder.key`: their lengths are their own.
_ENCODER = re.compile(r"(?:\A|[_.])encoder[_.]")
_PAST = re.compile(r"past(?:_key_values)?[._].*(?:key|value|k|v)\Z|past_\d+\Z")

#: Operators that take empty axes. Others may not only refuse them: kernels of onnxruntime have crashed on them, such as
#: those of Einsum, InstanceNormalization, ConvTranspose, GRU and LSTM, which no program survives.
_TAKES_EMPTY = """
    Abs Add And ArgMax Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear
    Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu Gemm Greater
    GreaterOrEqual HardSwish Hardmax Identity If IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop MatMul MatMulInteger Max Mean Min Mod Mul Neg Not Or Pad Pow QuantizeLinear RMSNormalization
    Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape RotaryEmbedding Round Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum
    Swish Tanh Tile Transpose Trilu Unsqueeze Where Xor
"""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of the symbols in one sample.

    `known` maps symbols to lengths, `past` is the number of positions in the cache, and `ndim` the number of axes of
    inputs whose shape is not stated.
    """

    known: Mapping[str, int]
    past: int = 0
    ndim: int = 2

    def shape_of(self, value: onnx_ir.Value) -> tuple[int, ...] | None:
        """Return the shape of a graph input; None if a dimension follows from nothing that is known."""
        found = [self.length(key) for key in axes_of(value, self.ndim)]
        known = [length for length in found if length is not None]
        return tuple(known) if len(known) == len(found) else None

    def length(self, dim: int | str) -> int | None:
        """Return the length of a dimension, which is a number, a symbol or arithmetic on symbols."""
        if isinstance(dim, int):
            return dim
        if dim in self.known:
            return self.known[dim]
        try:
            length = self._computed(ast.parse(dim, mode="eval").body)
        except (SyntaxError, KeyError, ZeroDivisionError):
            return None
        return length if length >= 0 else None

    def _computed(self, term: ast.expr) -> int:
        if isinstance(term, ast.Name):
            return self.known[term.id]
        if isinstance(term, ast.Constant) and isinstance(term.value, int):
            return term.value
        if isinstance(term, ast.BinOp):
            return _OPERATORS[type(term.op)](self._computed(term.left), self._computed(term.right))
        raise KeyError(ast.dump(term))

    def __str__(self) -> str:
        """Return the lengths for people, such as `batch 2, seq 3`."""
        return ", ".join(f"{name} {length}" for name, length in self.known.items()) or "no free lengths"


def axes_of(value: onnx_ir.Value, ndim: int = 2) -> list[int | str]:
    """Return the dimensions of a graph input: numbers, or names; an unnamed one is called `input[axis]`."""
    if value.shape is None:
        return [f"{value.name}[{axis}]" for axis in range(ndim)]
    named = [dim if isinstance(dim, int) else dim.value for dim in value.shape.dims]
    return [f"{value.name}[{axis}]" if dim is None else dim for axis, dim in enumerate(named)]


def free_inputs(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Return the inputs that need a value: all but those with a default."""
    return [value for value in model.graph.inputs if (value.name or "") not in model.graph.initializers]


def symbols_of(model: onnx_ir.Model, ndim: int = 2) -> list[str]:
    """Return the free symbols of the inputs, in order; arithmetic stands for the symbols that it is made of."""
    found: dict[str, None] = {}
    for value in free_inputs(model):
        for dim in axes_of(value, ndim):
            if isinstance(dim, str):
                found.update(dict.fromkeys(_names_in(dim)))
    return list(found)


def _names_in(dim: str) -> list[str]:
    try:
        term = ast.parse(dim, mode="eval").body
    except SyntaxError:
        return [dim]
    nodes = list(ast.walk(term))
    plain = (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.expr_context)
    if not all(isinstance(node, plain) for node in nodes):
        return [dim]
    if any(isinstance(node, ast.BinOp) and type(node.op) not in _OPERATORS for node in nodes):
        return [dim]
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def roles_of(model: onnx_ir.Model) -> dict[str, str]:
    """Return what symbols of a decoder's inputs stand for: batch, seq, past or total."""
    found: dict[str, str] = {}
    names = [value.name or "" for value in model.graph.inputs]
    has_past = any(_PAST.search(name) and not _ENCODER.search(name) for name in names)
    has_both = any(_DECODER_TOKENS.search(name) for name in names)
    for value in free_inputs(model):
        name = value.name or ""
        roles = _roles(name, len(axes_of(value)), has_past)
        if has_both and not name.startswith("decoder_") and "past" not in roles:
            roles = roles[:1]  # what the encoder reads is as long as it likes
        for dim, role in zip(axes_of(value), roles):
            if role and isinstance(dim, str) and dim.isidentifier():
                found.setdefault(dim, role)
    return found


def _roles(name: str, ndim: int, has_past: bool) -> Sequence[str]:
    if _ENCODER.search(name):
        return ("batch",) if has_past else ()
    if _PAST.search(name) and ndim == 4:
        return "batch", "", "past", ""
    if _TOKENS.search(name) and ndim >= 2:
        return "batch", "seq"
    if name.endswith("attention_mask") and ndim == 2:
        return "batch", "total" if has_past else "seq"
    return ()


def takes_empty(model: onnx_ir.Model) -> bool:
    """Return whether it is safe to run the graph with empty axes."""
    nodes = [*model.graph.all_nodes(), *(node for item in model.functions.values() for node in item.all_nodes())]
    called, safe = model.functions.keys(), frozenset(_TAKES_EMPTY.split())
    return all((not node.domain and node.op_type in safe) or node.op_identifier() in called for node in nodes)


def assignments(model: onnx_ir.Model) -> Iterator[Lengths]:
    """Yield lengths to try: symbols apart, each symbol as 1 and as 0, and all symbols equal.

    Lengths of 0 are left out where a kernel might not survive them. Inputs that one Concat joins agree in other axes.
    """
    joined = _joined(model)
    for lengths in _assignments(model):
        known = {name: _follow(joined, name, lengths.known) for name in lengths.known}
        if takes_empty(model) or all(known.values()):
            yield dataclasses.replace(lengths, known=known)


def _joined(model: onnx_ir.Model) -> dict[str, int | str]:
    """Return symbols of inputs whose length a Concat makes that of another symbol, or a number."""
    found: dict[str, int | str] = {}
    for one, other in _joined_axes(model):
        for name, same in ((one, other), (other, one)):
            if isinstance(name, str) and name.isidentifier() and name != same and found.get(str(same)) != name:
                found.setdefault(name, same)
                break
    return found


def _joined_axes(model: onnx_ir.Model) -> Iterator[tuple[int | str, int | str]]:
    """Yield pairs of axes of inputs that must be as long as each other for a Concat."""
    inputs = set(model.graph.inputs)
    for node in model.graph:
        if node.op_type != "Concat" or node.domain:
            continue
        operands = [axes_of(value) for value in node.inputs if value is not None and value in inputs]
        for one, other in itertools.pairwise(operands):
            if len(one) == len(other):
                along = node.attributes["axis"].as_int() % len(one)
                yield from (pair for axis, pair in enumerate(zip(one, other, strict=True)) if axis != along)


def _follow(joined: Mapping[str, int | str], name: str, known: Mapping[str, int]) -> int:
    at: int | str = name
    for _ in joined:
        at = joined.get(at, at) if isinstance(at, str) else at
    return at if isinstance(at, int) else known.get(at, known[name])


def can_be_joined(model: onnx_ir.Model, lengths: Lengths) -> bool:
    """Return whether the inputs that one Concat joins agree in all other axes."""
    pairs = ((lengths.length(one), lengths.length(other)) for one, other in _joined_axes(model))
    return all(one is None or other is None or one == other for one, other in pairs)


def agree(shapes: Sequence[Sequence[int]], axis: int) -> bool:
    """Return whether a Concat can join tensors of these shapes along an axis.

    onnxruntime does not ask that of empty ones, and returns memory that it has not written.
    """
    if any(len(shape) != len(shapes[0]) or not -len(shape) <= axis < len(shape) for shape in shapes):
        return False
    rests = {(*shape[: axis % len(shape)], *shape[axis % len(shape) + 1 :]) for shape in shapes}
    return len(rests) <= 1


def _assignments(model: onnx_ir.Model) -> Iterator[Lengths]:
    roles = roles_of(model)
    free = [name for name in symbols_of(model) if name not in roles]
    for turn, sizes in enumerate(_DECODER if roles or free else _DECODER[:1]):
        yield _assigned(roles, sizes, {name: _PRIMES[(index + turn) % len(_PRIMES)] for index, name in enumerate(free)})
    for names in [free, *([name] for name in free)] if roles else ():  # axes as long as this step, under other names
        for turn, sizes in enumerate(_DECODER):
            rest = {name: _PRIMES[(index + turn) % len(_PRIMES)] for index, name in enumerate(free)}
            yield _assigned(roles, sizes, {**rest, **dict.fromkeys(names, sizes[1])})
    apart = {name: _PRIMES[index % len(_PRIMES)] for index, name in enumerate(free)}
    for length in (1, 0):
        for name in free[:8]:
            yield _assigned(roles, _DECODER[0], {**apart, name: length})
    for length in (3, 1, 2, 0, 4, 8) if free else ():
        yield _assigned(roles, _DECODER[0], dict.fromkeys(free, length))
    if any(value.shape is None for value in free_inputs(model)):
        yield from _other_ndims(model, roles)


def _other_ndims(model: onnx_ir.Model, roles: Mapping[str, str]) -> Iterator[Lengths]:
    for ndim in (1, 3, 4, 0):
        free = [name for name in symbols_of(model, ndim) if name not in roles]
        for turn in range(2):
            sizes = {name: _PRIMES[index % len(_PRIMES)] if turn else 2 for index, name in enumerate(free)}
            yield dataclasses.replace(_assigned(roles, _DECODER[0], sizes), ndim=ndim)


def around(model: onnx_ir.Model, legal: Lengths, limits: Sequence[int]) -> Iterator[Lengths]:
    """Yield lengths at, below and above those that the graph compares with, in one symbol and in all of them."""
    roles = roles_of(model)
    free = [name for name in legal.known if name not in roles][:4]
    for limit in limits:
        for length in (limit + 1, limit, limit - 1):
            if roles:
                yield _assigned(roles, (1, length, 0), {name: legal.known[name] for name in free})
            if {"past", "total"} & set(roles.values()):
                yield _assigned(roles, (1, 2, length), {name: legal.known[name] for name in free})
            for names in [[name] for name in free] + ([free] if len(free) > 1 else []):
                yield dataclasses.replace(legal, known={**legal.known, **dict.fromkeys(names, length)})


def tied(model: onnx_ir.Model, legal: Lengths) -> Iterator[Lengths]:
    """Yield lengths that differ from `legal` in one symbol or in two of them, and sums of two symbols as a third."""
    roles = roles_of(model)
    free = [name for name in legal.known if name not in roles][:8]
    singles = [(name,) for name in free]
    pairs = [(one, other) for index, one in enumerate(free) for other in free[index + 1 :]]
    for names in (*singles, *pairs):
        for length in (2, 1, 0) if takes_empty(model) else (2, 1):
            yield dataclasses.replace(legal, known={**legal.known, **dict.fromkeys(names, length)})
    for one, other in pairs:
        for total in (name for name in free if name not in (one, other)):
            sizes = {one: 5, other: 2, total: 7}
            yield dataclasses.replace(legal, known={**dict.fromkeys(free, 3), **legal.known, **sizes})


def _assigned(roles: Mapping[str, str], sizes: tuple[int, int, int], free: Mapping[str, int]) -> Lengths:
    batch, seq, past = sizes
    if roles and not {"past", "total"} & set(roles.values()):
        past = 0
    by_role = {"batch": batch, "seq": seq, "past": past, "total": past + seq}
    return Lengths({**{name: by_role[role] for name, role in roles.items()}, **free}, past if roles else 0)
