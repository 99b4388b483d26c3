"""Read checkpoints of GPTQ tools (AutoGPTQ, GPTQModel and others) with symmetric 8-bit codes per output channel.

A linear y = x·W, W [K, N], is `qweight` int32 [K·bits/32, N], `scales` [groups, N], `qzeros` int32 [groups, N·bits/32]
and `g_idx` [K], the group of each input. Codes are stored plus their zero point, 128; the format "gptq" stores zero
points less 1, and "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from passopt.frontends.quantised.small_tensors import demand, in_shape, read
from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.json_text import shown
from passopt.ir.weights.dequantized import dequantized
from passopt.ir.weights.expressions import DataType, Expression, Source
from passopt.ir.weights.packed_codes import unpack_codes

METHOD = "gptq"
#: How much less than the zero points is stored, by `checkpoint_format`.
_LESS = {"gptq": 1, "gptq_v2": 0}
_BITS = 8
_CODES, _SCALES, _ZEROS, _GROUPS = "qweight", "scales", "qzeros", "g_idx"


def refusals(settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what of the settings cannot be exported exactly.

    Args:
        settings: The `quantization_config` of config.json, or the content of quantize_config.json.
        where: Where it stands, which other formats need for their messages.
    """
    bits, form = settings.get("bits"), _format(settings)
    if bits != _BITS:
        yield f"codes of {shown(bits)} bits, and not of {_BITS}"
    if form not in _LESS:
        yield f"the checkpoint_format {shown(form)}, and not one of {', '.join(_LESS)}"


def _format(settings: Mapping[str, Any]) -> object:
    return settings.get("checkpoint_format") or "gptq"


def weights_of(tensors: Mapping[str, Source], settings: Mapping[str, Any], where: Path) -> dict[str, Expression]:
    """Return the tensors with every quantised weight as a lazy weight under its name in the float model.

    Args:
        tensors: The tensors of the files by name.
        settings: The settings, of which `refusals` found none.
        where: The checkpoint, for messages.

    Raises:
        ModelError: If the tensors of a linear do not fit together, or its codes have zero points or groups.
    """
    left: dict[str, Expression] = dict(tensors)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != _CODES:
            continue
        for kind in (_CODES, _SCALES, _ZEROS, _GROUPS):
            found = left.pop(f"{module}.{kind}", None)
            if found is None and kind != _GROUPS:
                raise ModelError(f"{where}: holds {name!r} and no {module}.{kind}; is a file missing?")
        left[f"{module}.weight"] = _weight(module, tensors, _LESS[str(_format(settings))], where)
    return left


def _weight(module: str, tensors: Mapping[str, Source], less: int, where: Path) -> Expression:
    words, scales, zeros = (tensors[f"{module}.{kind}"] for kind in (_CODES, _SCALES, _ZEROS))
    demand(where, words, {DataType.INT32}, 2, "words of codes are")
    codes = unpack_codes(words.transpose(), _BITS)
    channels, inputs = codes.shape
    demand(where, scales, FLOATS, 2, "scales of groups are")
    groups = scales.shape[0]
    demand(where, scales, FLOATS, [(groups, channels)], f"{words.name!r} has {channels} output channels")
    _check_groups(tensors.get(f"{module}.{_GROUPS}"), scales, inputs, where)
    demand(where, zeros, {DataType.INT32}, [(groups, -(-channels * _BITS // 32))], "there is one per scale")
    _check_zero_points(zeros, channels, less, where)
    return dequantized(codes, in_shape(scales, channels))


def _check_groups(order: Source | None, scales: Source, inputs: int, where: Path) -> None:
    if scales.shape[0] != 1:
        raise ModelError(
            f"{where}: {scales.name!r} has {scales.shape[0]} groups of inputs; of 8 bits, export takes one scale per "
            f"output channel (group_size −1). Quantise the original checkpoint so, or with int8{{from=CALIB}}"
        )
    if order is None:
        return
    demand(where, order, {DataType.INT32, DataType.INT64}, [(inputs,)], f"there are {inputs} inputs")
    if (found := read(order)).any():
        raise ModelError(f"{where}: {order.name!r} names group {int(found.max())}, and {scales.name!r} has only one")


def _check_zero_points(zeros: Source, channels: int, less: int, where: Path) -> None:
    """Raise ModelError unless all zero points are those of symmetric codes; the words may be longer than channels."""
    middle = 1 << (_BITS - 1)
    found = read(unpack_codes(zeros, _BITS))[:, :channels].astype(int) + middle + less
    if (found == middle).all():
        return
    other = " (those of gptq_v2 are stored as they are: is checkpoint_format wrong?)" if less else ""
    raise ModelError(
        f"{where}: {zeros.name!r} has zero points from {found.min()} to {found.max()}, and symmetric int8 codes have "
        f"{middle}{other}. Quantise the original checkpoint symmetrically (sym=true), or with int8{{from=CALIB}}"
    )
