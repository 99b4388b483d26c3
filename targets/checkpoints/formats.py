"""Say what tensors and settings quantised linears are, in the formats of compressed-tensors and GPTQ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from passopt.ir.errors import UsageError
from passopt.ir.weights import literals
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.packed_codes import codes_per_word, pack_codes

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: Two formats of compressed-tensors, with a code per byte or four in a word, and the first format of GPTQ tools.
QuantisedFormat: TypeAlias = Literal["int-quantized", "pack-quantized", "gptq"]
FORMATS: tuple[QuantisedFormat, ...] = ("int-quantized", "pack-quantized", "gptq")

#: What GPTQ's first format stores for the zero points of symmetric codes, 128 and 8: words of one less.
_ZERO_POINTS = {8: 0x7F7F7F7F, 4: 0x77777777}
#: GPTQ tools quantise the linears of layers; whether the head is quantised, too, has a setting of its own.
_IN_LAYER = re.compile(r"\.\d+\.")


def tensors_of(module: str, codes: Expression, scales: Array, form: QuantisedFormat) -> dict[str, Expression]:
    """Return the tensors that a quantised linear is in a format, by their names.

    Args:
        module: The name of the linear.
        codes: Its codes [out, in], int8.
        scales: Its scales, [out] for codes of 8 bits, and [out, groups] for codes of 4 bits.
        form: The format.

    Raises:
        UsageError: If the format does not hold a linear of these sizes.
    """
    channels, inputs = codes.shape
    bits, counted = (4, scales) if scales.ndim == 2 else (8, scales[:, None])
    if form == "int-quantized":
        return {f"{module}.weight": codes, f"{module}.weight_scale": literals.Literal.of(counted)}
    per_word = codes_per_word(bits)
    if form == "pack-quantized":
        return {
            f"{module}.weight_packed": pack_codes(codes.pad(1, inputs + -inputs % per_word), bits),
            f"{module}.weight_scale": literals.Literal.of(counted),
            f"{module}.weight_shape": literals.Literal.of(np.array([channels, inputs], np.int64)),
        }
    if channels % per_word or inputs % per_word:
        raise UsageError(
            f"{module} has {inputs} inputs and {channels} outputs, and GPTQ holds multiples of {per_word} only; "
            f"write it as compressed-tensors"
        )
    return {
        f"{module}.qweight": pack_codes(codes, bits).transpose(),
        f"{module}.qzeros": literals.Fill(DataType.INT32, (counted.shape[1], channels // per_word), _ZERO_POINTS[bits]),
        f"{module}.scales": literals.Literal.of(np.ascontiguousarray(counted.T)),
        f"{module}.g_idx": literals.Literal.of(np.arange(inputs, dtype=np.int32) // (inputs // counted.shape[1])),
    }


def settings_of(
    form: QuantisedFormat, group: int, left_out: Sequence[str], *, has_head: bool, activations: bool
) -> Mapping[str, Any]:
    """Return the `quantization_config` of config.json.

    Args:
        form: The format.
        group: The inputs that share a scale, for codes of 4 bits; 0 for codes of 8 bits.
        left_out: The names of linears whose weights stay floats.
        has_head: Whether the head is quantised, too.
        activations: Whether activations are to be quantised while the model runs, a scale per token.
    """
    bits = 4 if group else 8
    if form == "gptq":
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": has_head,
            "checkpoint_format": "gptq",
        }
        if in_layers := [name for name in left_out if _IN_LAYER.search(name)]:
            settings["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in in_layers}
        return settings
    tokens = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "dynamic": False,
        "group_size": group or None,
        "actorder": None,
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": tokens if activations else None}},
        "ignore": [*left_out, *([] if has_head or "lm_head" in left_out else ["lm_head"])],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
