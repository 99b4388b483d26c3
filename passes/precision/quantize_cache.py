"""Define the pass `quantize-cache`, which stores the KV cache of a decoder as int8 codes with a scale per row."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.attention.fused import AttentionParts, find_attention
from passopt.ir.attention.int8_cache import has_int8_cache
from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.errors import PassError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import SCALES, decoder_of, find_decoder
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.linears import LARGEST_CODE
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.accuracy import QualityBar, lossy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: From this opset on, QuantizeLinear and DequantizeLinear take scales of blocks, and an output type.
_OPSET_OF_BLOCKS = 21
_POSITIONS, _CHANNELS = 2, 3


@dataclasses.dataclass(frozen=True)
class QuantizeCache(Pass):
    """Store keys and values in 8 bits, since decoding long sequences takes the time to read the cache.

    Before: ``y, present = Attention(q, k, v, mask, past)``, likewise for AlibiAttention and for the values
    After:  ``codes = QuantizeLinear(k', scales)``, ``scales = ReduceMax(Abs(k'), -1) / 127`` (1 for a row of zeros),
            ``y = Attention(q', DequantizeLinear(codes, scales), …, DequantizeLinear(past, past.scales))``,
            ``present = Concat(past, codes)``, ``present.scales = Concat(past.scales, scales)``
    A row, which is one position of one head, has a scale of its own, and the attention reads new rows as they are
    stored. So no row depends on another, on padding or on how a prompt is cut into chunks, and nothing stored is ever
    quantised again. With ``keys=token``, q' and k' are q and k. Keys have channels that stand out in every position,
    and cost the others their precision. A scale for each channel cannot be known before the keys are: of a first chunk
    of one token it would be useless. With ``keys=channel``, queries and keys are therefore multiplied by one
    orthogonal matrix, ``q' = MatMul(q, R)``, ``k' = MatMul(k, R)``, which leaves their products as they are and all
    channels of a key about equally large.
    """

    name = "quantize-cache"
    after = ("fuse-attention", "cast")
    #: A code is off by at most 1/254 of the largest number of its row.
    #: A trained model of 135M parameters: KL 0.0007 with keys=token and 0.0002 with keys=channel, 0.005 at 99 %.
    accuracy = lossy(1e-2, bar=QualityBar(kl=0.0025, kl99=0.015, top1=0.95))
    changes_interface: ClassVar[bool] = True

    keys: Literal["channel", "token"] = "channel"
    values: Literal["token"] = "token"

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Quantise the cache of all layers in place; raise PassError if that of any layer cannot be."""
        if has_int8_cache(model):
            return PassResult()
        attentions = self._attentions(model)
        editor = Editor(model, self.name)
        decoder = decoder_of(model)
        shared = _Shared.of(editor, decoder.dtype, decoder.head_dim if self.keys == "channel" else None)
        for node, parts in attentions.items():
            _quantise(editor, node, parts, shared)
        return PassResult(modified=True, matches=2 * len(attentions), tries=2 * len(attentions))

    def _attentions(self, model: onnx_ir.Model) -> dict[onnx_ir.Node, AttentionParts]:
        """Return the attention of each layer, or raise PassError and say what is missing."""
        opset = model.graph.opset_imports.get("", 0)
        decoder = find_decoder(model)
        if decoder is None:
            raise PassError(
                f"{self.name}: expected a decoder with input_ids and past.N.key/value [batch, kv_heads, past, "
                f"head_dim], found {', '.join(str(value.name) for value in model.graph.inputs)}. Without a cache there "
                f"is nothing to store; export with `phase=merged`."
            )
        if opset < _OPSET_OF_BLOCKS:
            raise PassError(
                f"{self.name}: a scale per row needs opset {_OPSET_OF_BLOCKS}, this model has {opset}. "
                f"Run legalize{{opset=23}} first."
            )
        complete_types(model)
        found = {}
        for layer in range(decoder.layers):
            names = f"past.{layer}.key", f"past.{layer}.value"
            pair = [next((value for value in model.graph.inputs if value.name == name), None) for name in names]
            key, value = pair
            if key is None or value is None:
                raise PassError(f"{self.name}: expected inputs {names[0]} and {names[1]}, found {pair}")
            node = self._reader(key)
            parts = find_attention(node)
            if parts is None or parts.past_key is not key or parts.past_value is not value:
                raise PassError(
                    f"{self.name}: {called(node)} reads {key.name}, but not {value.name} as its past values"
                )
            self._check(node, parts, layer)
            found[node] = parts
        return found

    def _reader(self, past: onnx_ir.Value) -> onnx_ir.Node:
        """Return the one attention that reads a past; only the shape of it may be read by others."""
        readers = [node for node in past.consumers() if node.op_type != "Shape" or node.domain]
        fused = [node for node in readers if find_attention(node) is not None]
        others = [called(node) for node in readers if node not in fused]
        if len(fused) != 1 or others:
            raise PassError(
                f"{self.name}: expected one fused attention that reads {past.name}, found "
                f"{', '.join([*map(called, fused), *others]) or 'none'}. Run fuse first; "
                f"`passopt why fuse-attention MODEL` says what kept it from matching."
            )
        return fused[0]

    def _check(self, node: onnx_ir.Node, parts: AttentionParts, layer: int) -> None:
        """Raise PassError unless new rows are [b, h, s, d] in a dtype of models, and the present is only an output."""
        for what, past, new in (("key", parts.past_key, parts.key), ("value", parts.past_value, parts.value)):
            dims = dimensions(new)
            assert past is not None
            if past.dtype not in MODEL_FLOATS or new.dtype != past.dtype:
                raise PassError(f"{self.name}: {past.name} is {past.dtype}, new rows {new.dtype}: expected one float")
            if dims is None or len(dims) != 4 or not isinstance(dims[_CHANNELS], int):
                raise PassError(
                    f"{self.name}: {called(node)} gets {new.name} {dims}, expected [batch, kv_heads, seq, head_dim]"
                )
            output = node.outputs[1 if what == "key" else 2] if len(node.outputs) > 2 else None
            if output is None or output.name != f"present.{layer}.{what}" or not output.is_graph_output():
                found = None if output is None else output.name
                raise PassError(f"{self.name}: expected {called(node)} to give present.{layer}.{what}, found {found}")
            if output.uses():
                reader = called(output.consumers()[0])
                raise PassError(f"{self.name}: {reader} reads {output.name}, which is to hold codes")
        if len(dimensions(parts.query) or []) != 4 or len(node.outputs) > 3:
            raise PassError(f"{self.name}: {called(node)} is not over queries [batch, heads, seq, head_dim] alone")


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The constants that all layers share: those of scales, and the matrices that turn queries and keys, if any do.

    The matrices are [1, 1, d, d], with the axes of batch and heads: they are no weights of a linear, which could be
    sharded or quantised.
    """

    last_axis: onnx_ir.Value
    largest_code: onnx_ir.Value
    zero: onnx_ir.Value
    one: onnx_ir.Value
    turn: tuple[onnx_ir.Value, onnx_ir.Value] | None

    @classmethod
    def of(cls, editor: Editor, dtype: onnx_ir.DataType, width: int | None) -> _Shared:
        """Add the constants to the graph; `width` is that of heads to turn."""
        kind = dtype.numpy()
        builder = editor.builder("cache")

        def constant(name: str, array: Array) -> onnx_ir.Value:
            return builder.initializer(f"cache.{name}", array)

        last_axis = constant("last-axis", np.array([-1]))
        numbers = {"largest-code": LARGEST_CODE, "zero": 0, "one": 1}
        largest, zero, one = (constant(name, np.array(number, kind)) for name, number in numbers.items())
        turn = None
        if width is not None:
            query, key = (matrix.astype(kind)[None, None] for matrix in turning_matrices(width))
            turn = constant("turn.query", query), constant("turn.key", key)
        editor.insert(builder.built, before=editor.graph[0])
        return cls(last_axis, largest, zero, one, turn)


def _quantise(editor: Editor, node: onnx_ir.Node, parts: AttentionParts, shared: _Shared) -> None:
    """Store the keys and values of one attention as codes."""
    key = parts.key
    if shared.turn is not None:
        builder = editor.builder(f"{parts.query.name}.turned")
        query = builder.MatMul(parts.query, shared.turn[0])
        builder.hint = f"{key.name}.turned"
        key = builder.MatMul(key, shared.turn[1])
        editor.insert(builder.built, before=node, origins=[node])
        node.replace_input_with(0, query)
    for past, new, index in ((parts.past_key, key, 1), (parts.past_value, parts.value, 2)):
        assert past is not None
        _store(editor, node, past, new, index, shared)


def _store(
    editor: Editor, node: onnx_ir.Node, past: onnx_ir.Value, new: onnx_ir.Value, index: int, shared: _Shared
) -> None:
    """Store new rows as codes, of which input and output `index` of an attention are the numbers."""
    graph, dims, dtype = editor.graph, dimensions(past) or [], past.dtype
    assert dtype is not None
    (known,) = [number for number, value in enumerate(node.inputs) if value is past]
    scales = onnx_ir.Value(
        name=editor.unique(f"{past.name}{SCALES}"),
        type=onnx_ir.TensorType(dtype),
        shape=onnx_ir.Shape([*dims[:_CHANNELS], 1]),
    )
    place = next(number for number, value in enumerate(graph.inputs) if value is past)
    graph.inputs.insert(place + 1, scales)
    past.type = onnx_ir.TensorType(onnx_ir.DataType.INT8)
    builder = editor.builder(f"{new.name}.cached")
    rows = {"axis": _CHANNELS, "block_size": dims[_CHANNELS]}
    largest = builder.ReduceMax(builder.Abs(new), shared.last_axis, keepdims=1)
    quotient = builder.Div(largest, shared.largest_code)
    new_scales = builder.Where(builder.Equal(quotient, shared.zero), shared.one, quotient)
    codes = builder.QuantizeLinear(new, new_scales, **rows, output_dtype=onnx_ir.DataType.INT8.value)
    stored = builder.DequantizeLinear(codes, new_scales, **rows)
    wide = builder.DequantizeLinear(past, scales, **rows)
    grown = builder.Concat(past, codes, axis=_POSITIONS)
    grown_scales = builder.Concat(scales, new_scales, axis=_POSITIONS)
    editor.insert(builder.built, before=node, origins=[node])
    node.replace_input_with(index, stored)
    node.replace_input_with(known, wide)
    _give(editor, node.outputs[index], grown, grown_scales)


def _give(editor: Editor, present: onnx_ir.Value, codes: onnx_ir.Value, scales: onnx_ir.Value) -> None:
    """Let the model give codes and scales in place of `present`, whose name and lengths they take."""
    outputs, name = editor.graph.outputs, present.name or ""
    place = next(number for number, value in enumerate(outputs) if value is present)
    present.name = editor.unique(f"{name}.numbers")
    dims = dimensions(present) or []
    codes.name, codes.shape = name, onnx_ir.Shape(dims)
    scales.name, scales.shape = editor.unique(f"{name}{SCALES}"), onnx_ir.Shape([*dims[:_CHANNELS], 1])
    outputs[place] = codes
    outputs.insert(place + 1, scales)


def turning_matrices(width: int) -> tuple[Array, Array]:
    """Return matrices A and B [d, d] for queries and keys with A·Bᵀ = 1, under which all channels get a share of each.

    They are a Hadamard matrix with random signs, times a cosine transform for the odd factor of `width`. The powers of
    two are shared out so that the elements are exact in 16 bits, too, where `width` is a power of two.
    """
    exponent = (width & -width).bit_length() - 1
    hadamard = np.ones((1, 1))
    for _ in range(exponent):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    digest = hashlib.shake_256(b"signs of channels").digest(-(-width // 8))
    signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8))[:width]
    turned = signs[:, None] * np.kron(hadamard, _cosines(width >> exponent))
    return turned * 2.0 ** -((exponent + 1) // 2), turned * 2.0 ** -(exponent // 2)


def _cosines(length: int) -> Array:
    """Return the orthogonal cosine transform [length, length]."""
    place, wave = np.arange(length)[:, None] + 0.5, np.arange(length)[None, :]
    found: Array = np.cos(np.pi / length * place * wave) * np.sqrt(np.where(wave == 0, 1.0, 2.0) / length)
    return found
