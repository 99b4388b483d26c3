"""Write tiny checkpoints in the formats of other quantisers, by numpy alone and with codes from -128 on, as theirs.

`quantise_checkpoint` rounds the linears of the decoder layers of a float checkpoint to the nearest code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

#: What is written: two formats of compressed-tensors, and two of GPTQ, which differ in their zero points.
QuantisedFormat = Literal["int-quantized", "pack-quantized", "gptq", "gptq_v2"]

_GPTQ = ("gptq", "gptq_v2")


def quantise_checkpoint(
    checkpoint: Path,
    output: Path,
    form: QuantisedFormat,
    *,
    dtype: str = "fp16",
    activations: bool = False,
    group: int = 0,
) -> dict[str, tuple[Any, Any]]:
    """Write a float checkpoint with the weights of its decoder layers as codes, and return their codes and scales.

    Args:
        checkpoint: The folder of the float checkpoint.
        output: The new folder.
        form: The format.
        dtype: The number type of scales and of all other tensors: "fp16", "bf16" or "fp32".
        activations: Say in config.json that activations are to be quantised, too.
        group: The inputs that share a scale, for codes of 4 bits; 0 for codes of 8 bits and a scale per output channel.

    Returns:
        By the name of each weight, its codes [out, in], int8, and its scales [out], or [out, groups].
    """
    from safetensors.numpy import save_file

    from passopt.frontends.checkpoint import open_checkpoint
    from passopt.ir.dtypes import DTYPES
    from passopt.ir.weights.evaluator import Evaluator

    kind = DTYPES[dtype].numpy()  # type: ignore[index]
    found, tensors = {}, {}
    with Evaluator() as evaluator:
        for name, source in open_checkpoint(checkpoint).tensors.items():
            value = evaluator.array(source)
            if value.ndim != 2 or "layers." not in name:
                tensors[name] = value.astype(kind)
                continue
            codes, scales = _rounded(value, kind, group)
            found[name] = codes, scales
            tensors |= _parts(name.removesuffix(".weight"), codes, scales, form, group)
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = _settings(form, activations, group)
    (output / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return found


def _rounded(weight: Any, kind: Any, group: int) -> tuple[Any, Any]:
    """Return codes from -128 or -8 on, and scales, 2 · absmax / 255 or 15, as the tools of both formats choose them."""
    import numpy as np

    rows, columns = weight.shape
    largest = 7 if group else 127
    wide = weight.astype(np.float32).reshape(rows, -1, group or columns)
    scales = (2 * np.abs(wide).max(axis=2) / (2 * largest + 1)).astype(kind)
    codes = np.clip(np.rint(wide / scales.astype(np.float32)[:, :, None]), -largest - 1, largest).astype(np.int8)
    return codes.reshape(rows, columns), scales if group else scales[:, 0]


def _parts(module: str, codes: Any, scales: Any, form: QuantisedFormat, group: int) -> Mapping[str, Any]:
    import numpy as np

    rows, columns = codes.shape
    bits, counted = (4, scales) if group else (8, scales[:, None])
    if form == "int-quantized":
        return {f"{module}.weight": codes, f"{module}.weight_scale": counted}
    if form == "pack-quantized":
        padded = np.pad(codes, ((0, 0), (0, -columns % (32 // bits))))
        return {
            f"{module}.weight_packed": words_of(padded, bits),
            f"{module}.weight_scale": counted,
            f"{module}.weight_shape": np.array([rows, columns], np.int64),
        }
    zeros = np.full((counted.shape[1], rows), -1 if form == "gptq" else 0, np.int8)
    return {
        f"{module}.qweight": np.ascontiguousarray(words_of(codes, bits).T),
        f"{module}.qzeros": words_of(zeros, bits),
        f"{module}.scales": np.ascontiguousarray(counted.T),
        f"{module}.g_idx": np.arange(columns, dtype=np.int32) // (group or columns),
    }


def words_of(codes: Any, bits: int = 8) -> Any:
    """Return rows of int8 codes, plus 2^(bits − 1), in words of int32, the first in the lowest bits.

    Args:
        codes: The codes, whose rows fill words.
        bits: The bits of a code.
    """
    import numpy as np

    shifted = (codes.astype(np.int64) + (1 << (bits - 1))).reshape(len(codes), -1, 32 // bits)
    return (shifted << np.arange(0, 32, bits)).sum(axis=2).astype(np.uint32).view(np.int32)


def _settings(form: QuantisedFormat, activations: bool, group: int) -> dict[str, Any]:
    if form in _GPTQ:
        return {
            "quant_method": "gptq",
            "bits": 4 if group else 8,
            "group_size": group or -1,
            "desc_act": True,
            "sym": True,
            "checkpoint_format": form,
        }
    weights = {
        "num_bits": 4 if group else 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens if activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head"],
    }
