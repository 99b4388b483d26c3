"""Write a small decoder by hand: attention, MLP and KV cache, unsplit or as one SPMD graph.

No dimension equals another, weights are seeded, and the same seed gives the same model at every degree.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from safetensors.numpy import save_file

from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.graph.decoder import DEGREE
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.sources import safetensors_sources

_TEXT_NAMES = {DataType.FLOAT: "float", DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Sizes of the unsplit model, and how it is split.

    Attributes:
        degree: Ranks; more than 1 makes the SPMD graph of every rank.
        layers: Decoder layers.
        heads: Attention heads.
        head_dim: The width of one head.
        hidden: The width of the hidden state, which need not be heads · head_dim.
        intermediate: The width of the MLP.
        vocab: Rows of the embedding and of the head.
        positions: The longest sequence.
        dtype: The dtype of weights and activations.
        quantized: True if the linears of the decoder layers are int8.
    """

    degree: int = 1
    layers: int = 2
    heads: int = 3
    head_dim: int = 4
    hidden: int = 10
    intermediate: int = 22
    vocab: int = 34
    positions: int = 48
    dtype: DataType = DataType.FLOAT
    quantized: bool = False

    def padded(self, length: int) -> int:
        """Return a length rounded up to a multiple of the degree.

        Args:
            length: The length of the unsplit model.
        """
        return -(-length // self.degree) * self.degree


def tiny_decoder(spec: DecoderSpec | None = None, *, seed: int = 0, checkpoint: Path | None = None) -> onnx_ir.Model:
    """Return a small decoder.

    If it is split, it has an AllReduce after each attention and each MLP, and one AllGather of the logits.

    Args:
        spec: The sizes and the degree; None for the defaults.
        seed: The seed of the weights.
        checkpoint: A safetensors file to read the weights from, which is the same for every degree. It is written if it
            does not exist. None keeps the weights in memory.
    """
    return _Writer(spec or DecoderSpec(), seed).model(checkpoint)


class _Writer:
    """Write the ONNX text of a decoder line by line, and collect its constants."""

    def __init__(self, spec: DecoderSpec, seed: int) -> None:
        self.spec = spec
        self._random = np.random.default_rng(seed)
        self._lines: list[str] = []
        self._constants: dict[str, np.ndarray[Any, np.dtype[Any]] | Expression] = {}
        self._collectives = 0
        self._inside = spec.padded(spec.heads)

    def model(self, checkpoint: Path | None) -> onnx_ir.Model:
        spec = self.spec
        self._prelude()
        for layer in range(spec.layers):
            self._attention(layer)
            self._mlp(layer)
        self._head()
        if checkpoint is not None:
            self._move_weights(checkpoint)
        model = parse_model(self._text())
        for name, content in self._constants.items():
            _fill(model, name, content)
        counted = (node for node in model.graph if node.domain)
        for index, node in enumerate(counted):
            node.metadata_props["passopt.collective"] = str(index)
            node.name = f"{node.op_type}.{index}"
        if spec.degree > 1:
            model.metadata_props[DEGREE] = str(spec.degree)
        return model

    def _move_weights(self, checkpoint: Path) -> None:
        """Let every weight come from the file instead of memory."""
        names = {name: name.removesuffix(".codes").removesuffix(".scales") for name in self._constants}
        weights = {name: base for name, base in names.items() if base.endswith(".weight")}
        if not checkpoint.exists():
            arrays = {base: _array(_literal(self._constants[name])) for name, base in weights.items()}
            save_file(arrays, checkpoint)
        sources = safetensors_sources(checkpoint)
        for name, base in weights.items():
            self._constants[name] = _rebased(self._constants[name], sources[base])

    def _text(self) -> str:
        spec, kind = self.spec, _TEXT_NAMES[self.spec.dtype]
        local = self._inside // spec.degree
        cache = [f"{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]
        inputs = [
            "int64[batch,seq] input_ids",
            'int64[batch,"past+seq"] attention_mask',
            "int64[batch,seq] position_ids",
            *(f'{kind}[batch,{local},past,{spec.head_dim}] "past.{name}"' for name in cache),
            *(f'{_declared(content)} "{name}"' for name, content in self._constants.items()),
        ]
        outputs = [
            f"{kind}[batch,seq,{spec.vocab}] logits",
            *(f'{kind}[batch,{local},"past+seq",{spec.head_dim}] "present.{name}"' for name in cache),
        ]
        body = "\n".join(self._lines)
        imports = '["" : 21, "com.microsoft" : 1]'
        return (
            f"<ir_version: 10, opset_import: {imports}>\n"
            f"decoder ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
        )

    def _add(self, *lines: str) -> None:
        self._lines += lines

    def _constant(self, name: str, content: np.ndarray[Any, np.dtype[Any]] | Expression) -> str:
        self._constants[name] = content
        return f'"{name}"'

    def _weight(self, *shape: int) -> Expression:
        values = self._random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        return Literal.of(values).cast(self.spec.dtype)

    def _prelude(self) -> None:
        spec = self.spec
        kind = spec.dtype.numpy()
        for name, number in (("zero", 0), ("one", 1), ("two", 2)):
            self._constant(name, np.array(number))
        self._constant("axis.1", np.array([1]))
        self._constant("bias.hidden", np.array(-10000.0, kind))
        self._constant("bias.shown", np.array(0.0, kind))
        slopes = Literal.of(alibi_slopes(spec.heads).reshape(-1, 1, 1)).cast(spec.dtype)
        self._constant("alibi.slopes", self._split(slopes, 0))
        embedding = self._constant("model.embed.weight", self._weight(spec.vocab, spec.hidden))
        positions = self._constant("positions.weight", self._weight(spec.positions, spec.hidden))
        self._add(
            'past = Shape <start = 2, end = 3> ("past.0.key")',
            "total = Shape <start = 1, end = 2> (attention_mask)",
            "first = Squeeze(past)",
            "last = Squeeze(total)",
            "columns = Range(zero, last, one)",
            "rows = Range(first, last, one)",
            'row = Unsqueeze(rows, "axis.1")',
            "causal = GreaterOrEqual(row, columns)",
            "shown = Cast <to = 9> (attention_mask)",
            'shown3 = Unsqueeze(shown, "axis.1")',
            "visible = And(causal, shown3)",
            'visible4 = Unsqueeze(visible, "axis.1")',
            'bias = Where(visible4, "bias.shown", "bias.hidden")',
            f"columns_f = Cast <to = {spec.dtype.value}> (columns)",
            'alibi = Mul("alibi.slopes", columns_f)',
            "scores_bias = Add(bias, alibi)",
            f"embedded = Gather({embedding}, input_ids)",
            f"position = Gather({positions}, position_ids)",
            "x0 = Add(embedded, position)",
        )

    def _split(self, weight: Expression, axis: int) -> Expression:
        """Return the weight padded to a multiple of the degree and sharded."""
        degree = self.spec.degree
        if degree == 1:
            return weight
        return weight.pad(axis, self.spec.padded(weight.shape[axis])).shard(axis, degree)

    def _split_heads(self, weight: Expression, axis: int) -> Expression:
        if self.spec.degree == 1:
            return weight
        return weight.pad(axis, self._inside * self.spec.head_dim).shard(axis, self.spec.degree)

    def _linear(self, out: str, x: str, name: str, weight: Expression) -> None:
        """Add the product of `x` and a weight [out, in]."""
        if not self.spec.quantized or name.startswith("lm_head"):
            self._add(f"{out}_t = Transpose <perm = [1, 0]> ({self._constant(f'{name}.weight', weight)})")
        else:
            codes, scales = weight.quantize(0)
            codes_name = self._constant(f"{name}.weight.codes", codes)
            scales_name = self._constant(f"{name}.weight.scales", scales)
            self._add(
                f"{out}_w = DequantizeLinear <axis = 0> ({codes_name}, {scales_name})",
                f"{out}_t = Transpose <perm = [1, 0]> ({out}_w)",
            )
        self._add(f"{out} = MatMul({x}, {out}_t)")

    def _norm(self, out: str, x: str, name: str) -> None:
        scale = 1 + self._random.normal(0, 0.1, self.spec.hidden).astype(np.float32)
        weight = self._constant(f"{name}.weight", Literal.of(scale).cast(self.spec.dtype))
        self._add(
            f"{out}_f = Cast <to = 1> ({x})",
            f"{out}_s = Mul({out}_f, {out}_f)",
            f"{out}_m = ReduceMean <keepdims = 1> ({out}_s, {self._constant('axis.last', np.array([-1]))})",
            f"{out}_r = Sqrt({out}_m)",
            f"{out}_d = Div({out}_f, {out}_r)",
            f"{out}_c = Cast <to = {self.spec.dtype.value}> ({out}_d)",
            f"{out} = Mul({out}_c, {weight})",
        )

    def _reduced(self, value: str) -> str:
        if self.spec.degree == 1:
            return value
        self._add(f"{value}_sum = com.microsoft.AllReduce({value})")
        return f"{value}_sum"

    def _attention(self, layer: int) -> None:
        spec, prefix = self.spec, f"model.layers.{layer}"
        width = spec.heads * spec.head_dim
        self._norm(f"n{layer}", f"x{layer}", f"{prefix}.input_layernorm")
        shape = self._constant("heads.shape", np.array([0, 0, self._inside // spec.degree, spec.head_dim]))
        flat = self._constant("flat.shape", np.array([0, 0, self._inside // spec.degree * spec.head_dim]))
        scale = self._constant("heads.scale", np.array(spec.head_dim**-0.5, spec.dtype.numpy()))
        for part in ("q", "k", "v"):
            out = f"{part}{layer}"
            weight = self._split_heads(self._weight(width, spec.hidden), 0)
            self._linear(out, f"n{layer}", f"{prefix}.self_attn.{part}_proj", weight)
            self._add(
                f"{out}_h = Reshape({out}, {shape})",
                f"{out}_p = Transpose <perm = [0, 2, 1, 3]> ({out}_h)",
            )
        self._add(
            f'"present.{layer}.key" = Concat <axis = 2> ("past.{layer}.key", k{layer}_p)',
            f'"present.{layer}.value" = Concat <axis = 2> ("past.{layer}.value", v{layer}_p)',
            f'kt{layer} = Transpose <perm = [0, 1, 3, 2]> ("present.{layer}.key")',
            f"s{layer} = MatMul(q{layer}_p, kt{layer})",
            f"ss{layer} = Mul(s{layer}, {scale})",
            f"sb{layer} = Add(ss{layer}, scores_bias)",
            f"p{layer} = Softmax <axis = -1> (sb{layer})",
            f'c{layer} = MatMul(p{layer}, "present.{layer}.value")',
            f"ct{layer} = Transpose <perm = [0, 2, 1, 3]> (c{layer})",
            f"cf{layer} = Reshape(ct{layer}, {flat})",
        )
        weight = self._split_heads(self._weight(spec.hidden, width), 1)
        self._linear(f"o{layer}", f"cf{layer}", f"{prefix}.self_attn.o_proj", weight)
        self._add(f"h{layer} = Add(x{layer}, {self._reduced(f'o{layer}')})")

    def _mlp(self, layer: int) -> None:
        spec, prefix = self.spec, f"model.layers.{layer}.mlp"
        self._norm(f"m{layer}", f"h{layer}", f"model.layers.{layer}.post_attention_layernorm")
        up = self._split(self._weight(spec.intermediate, spec.hidden), 0)
        self._linear(f"u{layer}", f"m{layer}", f"{prefix}.up_proj", up)
        self._add(f"g{layer} = Sigmoid(u{layer})", f"a{layer} = Mul(u{layer}, g{layer})")
        down = self._split(self._weight(spec.hidden, spec.intermediate), 1)
        self._linear(f"d{layer}", f"a{layer}", f"{prefix}.down_proj", down)
        self._add(f"x{layer + 1} = Add(h{layer}, {self._reduced(f'd{layer}')})")

    def _head(self) -> None:
        spec = self.spec
        self._norm("nf", f"x{spec.layers}", "model.norm")
        weight = self._split(self._weight(spec.vocab, spec.hidden), 0)
        if spec.degree == 1:
            self._linear("logits", "nf", "lm_head", weight)
            return
        self._linear("l", "nf", "lm_head", weight)
        self._add(f"gathered = com.microsoft.AllGather <axis = 2, group_size = {spec.degree}> (l)")
        end = self._constant("vocab.end", np.array([spec.vocab]))
        axis, start = self._constant("vocab.axis", np.array([2])), self._constant("vocab.start", np.array([0]))
        self._add(f"logits = Slice(gathered, {start}, {end}, {axis})")


def _literal(content: np.ndarray[Any, np.dtype[Any]] | Expression) -> Literal:
    assert isinstance(content, Expression)
    return next(part for part in content.walk() if isinstance(part, Literal))


def _array(literal: Literal) -> np.ndarray[Any, np.dtype[Any]]:
    return np.frombuffer(literal.data, literal.dtype.numpy()).reshape(literal.shape)


def _rebased(content: np.ndarray[Any, np.dtype[Any]] | Expression, source: Expression) -> Expression:
    """Return the same expression with `source` in place of its literal."""
    assert isinstance(content, Expression)
    if isinstance(content, Literal):
        return source
    (operand,) = content.operands
    return dataclasses.replace(content, operand=_rebased(operand, source))  # type: ignore[call-arg]


def _declared(content: np.ndarray[Any, np.dtype[Any]] | Expression) -> str:
    dtype = content.dtype if isinstance(content, Expression) else DataType.from_numpy(content.dtype)
    name = {**_TEXT_NAMES, DataType.INT64: "int64", DataType.INT8: "int8"}[dtype]
    return f"{name}[{','.join(map(str, content.shape))}]" if content.shape else name


def _fill(model: onnx_ir.Model, name: str, content: np.ndarray[Any, np.dtype[Any]] | Expression) -> None:
    """Turn a declared input into an initializer."""
    value = next(value for value in model.graph.inputs if value.name == name)
    model.graph.inputs.remove(value)
    value.const_value = (
        LazyWeight(content, name) if isinstance(content, Expression) else onnx_ir.tensor(content, name=name)
    )
    model.graph.register_initializer(value)
