"""Read checkpoints of compressed-tensors, as llm-compressor writes them, with symmetric weights of 8 or 4 bits.

A linear is `weight` int8 [N, K], or `weight_packed` int32 with `weight_shape`, and `weight_scale` [N, 1] or
[N, groups].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from passopt.frontends.quantised.small_tensors import check_groups, check_order, demand, in_shape, read
from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.json_text import shown, stated
from passopt.ir.weights.dequantized import dequantized
from passopt.ir.weights.expressions import DataType, Expression, Source
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.packed_codes import CODE_BITS, unpack_codes

METHOD = "compressed-tensors"
#: naive-quantized is the older name of int-quantized.
_FORMATS = ("int-quantized", "naive-quantized", "pack-quantized")
#: What the weights of a linear are called, behind the name of its module.
_WEIGHT, _PACKED, _SHAPE, _SCALE = "weight", "weight_packed", "weight_shape", "weight_scale"
_ZERO_POINT, _ORDER = "weight_zero_point", "weight_g_idx"


def refusals(settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what of the settings cannot be exported exactly.

    Args:
        settings: The `quantization_config` of config.json.
        where: Where it stands, for messages about values of a wrong kind.
    """
    if settings.get("format") not in _FORMATS:
        yield f"the format {shown(settings.get('format'))}, and not one of {', '.join(_FORMATS)}"
    if settings.get("quantization_status", "compressed") != "compressed":
        yield f"quantization_status {shown(settings['quantization_status'])}, and not compressed weights"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        yield f"sparsity_config, of the format {shown(settings['sparsity_config']['format'])}"
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            yield f"{key}, which export does not know"
    groups = stated(settings, "config_groups", "an object", where) or {}
    if not groups:
        yield "no config_groups"
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            yield f"the group {name}, which is {shown(group)}"
            continue
        yield from (f"{reason} (in {name})" for reason in _of_group(group))
    kinds = {(group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, Mapping)}
    if len(kinds) > 1:
        yield f"groups of {' and '.join(map(str, kinds))} bits, of which no tensor says which it has"


def _of_group(group: Mapping[str, Any]) -> Iterator[str]:
    weights = group.get("weights") or {}
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in CODE_BITS:
        kind = f"{weights.get('num_bits')} bits of the type {shown(weights.get('type'))}"
        yield f"weights of {kind}, and not int of {' or '.join(map(str, CODE_BITS))}"
    if not weights.get("symmetric", True):
        yield "weights with zero points, which symmetric codes do not hold"
    if weights.get("strategy", "channel") not in ("channel", "tensor", "group"):
        yield f"a scale per {weights['strategy']}, and not per output channel or group"
    if group.get("output_activations"):
        yield "quantised output_activations"
    activations = group.get("input_activations")
    if activations and not activations.get("dynamic"):
        yield "static input_activations, whose scales were measured"


def activations_of(settings: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint is meant to run with int8 activations, quantised while it runs."""
    return any(group.get("input_activations") for group in settings["config_groups"].values())


def weights_of(tensors: Mapping[str, Source], settings: Mapping[str, Any], where: Path) -> dict[str, Expression]:
    """Return the tensors with every quantised weight as a lazy weight under its name in the float model.

    Args:
        tensors: The tensors of the files by name.
        settings: The settings, of which `refusals` found none.
        where: The checkpoint, for messages.

    Raises:
        ModelError: If the tensors of a linear do not fit together.
    """
    (bits,) = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    left: dict[str, Expression] = dict(tensors)
    modules = [name.removesuffix(f".{_SCALE}") for name in tensors if name.endswith(f".{_SCALE}")]
    for module in modules:
        parts = {
            part: tensors[f"{module}.{part}"]
            for part in (_WEIGHT, _PACKED, _SHAPE, _SCALE, _ZERO_POINT, _ORDER)
            if f"{module}.{part}" in tensors
        }
        for part in parts:
            del left[f"{module}.{part}"]
        codes = _codes(module, parts, bits, where)
        _check_zero_points(parts, where)
        scales = _scales(parts[_SCALE], bits, codes.shape, where)
        if _ORDER in parts:
            check_order(where, parts[_ORDER], codes.shape[1], scales.shape[1] if len(scales.shape) == 2 else 1)
        left[f"{module}.{_WEIGHT}"] = dequantized(codes, scales)
    for name, tensor in left.items():
        if name.endswith(f".{_PACKED}") or (name.endswith(f".{_WEIGHT}") and tensor.dtype == DataType.INT8):
            module = name.rpartition(".")[0]
            raise ModelError(f"{where}: holds codes {name!r} and no {module}.{_SCALE}; is a file missing?")
    return left


def _codes(module: str, parts: Mapping[str, Source], bits: int, where: Path) -> Expression:
    if _PACKED not in parts:
        if _WEIGHT not in parts:
            raise ModelError(f"{where}: holds {module}.{_SCALE}, and neither {_WEIGHT} nor {_PACKED} beside it")
        demand(where, parts[_WEIGHT], {DataType.INT8}, 2, "its scale says")
        return parts[_WEIGHT]
    words = parts[_PACKED]
    demand(where, words, {DataType.INT32}, 2, "words of codes are")
    codes = unpack_codes(words, bits)
    if _SHAPE not in parts:
        return codes
    demand(where, parts[_SHAPE], {DataType.INT64, DataType.INT32}, [(2,)], "the shape of a matrix is")
    rows, columns = (int(length) for length in read(parts[_SHAPE]))
    if rows != codes.shape[0] or not codes.shape[1] - 32 // bits < columns <= codes.shape[1]:
        raise ModelError(
            f"{where}: {words.name!r} holds {list(codes.shape)} codes, by {parts[_SHAPE].name!r} there are "
            f"{[rows, columns]}"
        )
    return codes.slice(1, 0, columns)


def _check_zero_points(parts: Mapping[str, Source], where: Path) -> None:
    """Raise ModelError unless zero points are all zero, as some versions store them beside symmetric codes."""
    if _ZERO_POINT in parts and read(parts[_ZERO_POINT]).any():
        raise ModelError(
            f"{where}: {parts[_ZERO_POINT].name!r} has zero points that are not 0, which symmetric codes do not "
            f"hold. Quantise the original checkpoint symmetrically"
        )


def _scales(scale: Source, bits: int, shape: tuple[int, ...], where: Path) -> Expression:
    """Return a scale per channel, or per group of its inputs; one for the whole weight is repeated."""
    channels, inputs = shape
    if len(scale.shape) == 2 and scale.shape[0] == channels and scale.shape[1] > 1:
        demand(where, scale, FLOATS, 2, "scales of groups are")
        check_groups(where, scale, bits, inputs, scale.shape[1])
        return scale
    one: list[tuple[int, ...]] = [(1,), (), (1, 1)]
    demand(where, scale, FLOATS, [(channels, 1), (channels,), *one], "there is one per output channel, or one in all")
    if scale.shape in one and channels != 1:
        value = read(in_shape(scale, 1))
        return Literal.of(np.repeat(value, channels))
    return in_shape(scale, channels)
