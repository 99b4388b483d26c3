"""Name the inputs, outputs and metadata that a decoder keeps through every pass, and read its sizes from them."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir

from passopt.ir.errors import ModelError

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LOGITS = "logits"
#: What follows the name of a past or present that holds codes, in the name of the input or output with their scales
#: `[batch, kv_heads, past, 1]`.
SCALES = ".scales"

#: Key of model metadata: the tensor-parallel degree of an SPMD graph; absent before the pass `shard`.
DEGREE = "passopt.degree"
#: Key of model metadata: the number of kv heads before sharding, without padding. A single kv head is replicated.
KV_HEADS = "passopt.kv_heads"
#: Key of node metadata: the index of a collective in the order in which every rank runs the collectives.
COLLECTIVE = "passopt.collective"
#: Key of model metadata: the largest number of positions for which the graph computes what the original model does.
MAX_POSITIONS = "passopt.max_positions"
#: Key of model metadata: the seed by which the residual stream is rotated; absent before the pass `rotate-residual`.
ROTATION = "passopt.rotation"
#: Key of model metadata: what the pass `smooth` has smoothed with which alpha, such as "down=0.5 norm=0.5".
SMOOTHED = "passopt.smoothed"
#: Key of model metadata: the error that export's self-check measured, or "skipped".
SELF_CHECK = "passopt.self_check"

#: The keys under which config.json files store the length of the longest sequence.
LENGTH_KEYS = ("max_position_embeddings", "model_max_length", "n_positions", "max_seq_len")

_LAYER_WEIGHT = re.compile(r"\b(?:layers|h|blocks)\.(\d+)\.")
_PAST_KEY = re.compile(r"past\.(\d+)\.key\Z")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder, read from the graph's inputs: a past is `[batch, kv_heads, past, head_dim]` per layer.

    `cache_dtype` is the dtype of the cache, `dtype` that of the numbers in it: that of the scales of a cache in 8 bits.
    """

    layers: int
    kv_heads: int
    head_dim: int
    has_position_ids: bool
    cache_dtype: onnx_ir.DataType
    dtype: onnx_ir.DataType


def find_decoder(model: onnx_ir.Model) -> Decoder | None:
    """Return the sizes of an exported decoder, or None for any other graph."""
    inputs = {value.name: value for value in model.graph.inputs}
    pasts = [value for name, value in inputs.items() if name and _PAST_KEY.match(name)]
    scales = inputs.get(f"{pasts[0].name}{SCALES}") if pasts else None
    if INPUT_IDS not in inputs or not pasts:
        return None
    shape, dtype = pasts[0].shape, pasts[0].dtype
    if shape is None or dtype is None or len(shape) != 4:
        return None
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    numbers = dtype if scales is None or scales.dtype is None else scales.dtype
    return Decoder(len(pasts), heads, width, POSITION_IDS in inputs, dtype, numbers)


def is_position_input(value: onnx_ir.Value) -> bool:
    """Return whether a value is the input position_ids of an exported decoder, which callers never give below 0."""
    graph = value.graph if value.name == POSITION_IDS and value.is_graph_input() else None
    names = [item.name or "" for item in graph.inputs] if graph is not None else []
    return INPUT_IDS in names and any(_PAST_KEY.match(name) for name in names)


def layer_count(model: onnx_ir.Model) -> int | None:
    """Return the number of decoder layers, or None if the graph shows none.

    The cache inputs are counted; without a cache, the layer numbers in the names of the weights.
    """
    decoder = find_decoder(model)
    if decoder is not None:
        return decoder.layers
    found = {match[1] for name in model.graph.initializers if (match := _LAYER_WEIGHT.search(name))}
    return len(found) or None


def decoder_of(model: onnx_ir.Model) -> Decoder:
    """Return the sizes of an exported decoder.

    Raises:
        ModelError: If the graph does not have a decoder's inputs; the message lists the expected ones and those found.
    """
    decoder = find_decoder(model)
    if decoder is None:
        names = ", ".join(str(value.name) for value in model.graph.inputs)
        raise ModelError(
            f"not an exported decoder: expected inputs {INPUT_IDS}, {ATTENTION_MASK} and past.N.key/value "
            f"[batch, kv_heads, past, head_dim], found: {names}"
        )
    return decoder


def degree_of(model: onnx_ir.Model) -> int:
    """Return the tensor-parallel degree; 1 for a model that is not sharded."""
    return int(model.metadata_props.get(DEGREE, "1"))


def positions_of(model: onnx_ir.Model) -> int | None:
    """Return the number of positions that the model can take, or None if nothing in it bounds them.

    Bounds are tables of rotary angles or learned positions, a baked ALiBi mask, and what the export found; the smallest
    counts.
    """
    tables = model.graph.initializers.items()
    found: list[tuple[onnx_ir.Value | None, int]] = [
        (value, -2) for name, value in tables if name.startswith("rotary.") or name == "alibi.future_mask"
    ]
    positions = next((value for value in model.graph.inputs if value.name == POSITION_IDS), None)
    for node, index in positions.uses() if positions is not None else ():
        if node.op_type == "Gather" and index == 1:
            found.append((node.inputs[0], 0))
        if node.op_type == "RotaryEmbedding" and index == 3:
            found += [(table, 0) for table in node.inputs[1:3]]
    lengths = [_length(table, axis) for table, axis in found if table is not None and table.is_initializer()]
    if (stated := model.metadata_props.get(MAX_POSITIONS, "")).isdigit():
        lengths.append(int(stated))
    return min((length for length in lengths if length is not None), default=None)


def _length(table: onnx_ir.Value, axis: int) -> int | None:
    dims = list(table.shape or ())
    length = dims[axis] if len(dims) >= max(-axis, 1) else None
    return length if isinstance(length, int) else None
