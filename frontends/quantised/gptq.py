"""Read checkpoints of GPTQ tools (AutoGPTQ, GPTQModel and others) with symmetric codes of 8 or 4 bits.

A linear y = x·W, W [K, N], is `qweight` int32 [K·bits/32, N], `scales` [groups, N], `qzeros` int32 [groups, N·bits/32]
and `g_idx` [K], the group of each input. Codes are stored plus their zero point, 2^(bits − 1); the format "gptq" stores
zero points less 1, and "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from passopt.frontends.quantised.small_tensors import check_groups, check_order, demand, in_shape, read
from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.json_text import shown
from passopt.ir.weights.dequantized import dequantized
from passopt.ir.weights.expressions import DataType, Expression, Source
from passopt.ir.weights.packed_codes import CODE_BITS, unpack_codes

METHOD = "gptq"
#: How much less than the zero points is stored, by `checkpoint_format`.
_LESS = {"gptq": 1, "gptq_v2": 0}
_CODES, _SCALES, _ZEROS, _GROUPS = "qweight", "scales", "qzeros", "g_idx"


def refusals(settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what of the settings cannot be exported exactly.

    Args:
        settings: The `quantization_config` of config.json, or the content of quantize_config.json.
        where: Where it stands, which other formats need for their messages.
    """
    bits, form = settings.get("bits"), _format(settings)
    if bits not in CODE_BITS:
        yield f"codes of {shown(bits)} bits, and not of {' or '.join(map(str, CODE_BITS))}"
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
        left[f"{module}.weight"] = _weight(module, tensors, settings["bits"], _LESS[str(_format(settings))], where)
    return left


def _weight(module: str, tensors: Mapping[str, Source], bits: int, less: int, where: Path) -> Expression:
    words, scales, zeros = (tensors[f"{module}.{kind}"] for kind in (_CODES, _SCALES, _ZEROS))
    demand(where, words, {DataType.INT32}, 2, "words of codes are")
    codes = unpack_codes(words.transpose(), bits)
    channels, inputs = codes.shape
    demand(where, scales, FLOATS, 2, "scales of groups are")
    groups = scales.shape[0]
    demand(where, scales, FLOATS, [(groups, channels)], f"{words.name!r} has {channels} output channels")
    check_groups(where, scales, bits, inputs, groups)
    order = tensors.get(f"{module}.{_GROUPS}")
    if order is not None:
        check_order(where, order, inputs, groups)
    demand(where, zeros, {DataType.INT32}, [(groups, -(-channels * bits // 32))], "there is one per scale")
    _check_zero_points(zeros, channels, bits, less, where)
    return dequantized(codes, in_shape(scales, channels) if groups == 1 else scales.transpose())


def _check_zero_points(zeros: Source, channels: int, bits: int, less: int, where: Path) -> None:
    """Raise ModelError unless all zero points are those of symmetric codes; the words may be longer than channels."""
    middle = 1 << (bits - 1)
    found = read(unpack_codes(zeros, bits))[:, :channels].astype(int) + middle + less
    if (found == middle).all():
        return
    other = " (those of gptq_v2 are stored as they are: is checkpoint_format wrong?)" if less else ""
    raise ModelError(
        f"{where}: {zeros.name!r} has zero points from {found.min()} to {found.max()}, and symmetric codes have "
        f"{middle}{other}. Quantise the original checkpoint symmetrically (sym=true), or with int8{{from=CALIB}}"
    )
