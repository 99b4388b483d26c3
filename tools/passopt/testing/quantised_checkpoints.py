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
    checkpoint: Path, output: Path, form: QuantisedFormat, *, dtype: str = "fp16", activations: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Write a float checkpoint with the weights of its decoder layers in 8 bits, and return their codes and scales.

    Args:
        checkpoint: The folder of the float checkpoint.
        output: The new folder.
        form: The format.
        dtype: The number type of scales and of all other tensors: "fp16", "bf16" or "fp32".
        activations: Say in config.json that activations are to be quantised, too.

    Returns:
        By the name of each weight, its codes [out, in], int8, and its scales [out].
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
            codes, scales = _rounded(value, kind)
            found[name] = codes, scales
            tensors |= _parts(name.removesuffix(".weight"), codes, scales, form)
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = _settings(form, activations)
    (output / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return found


def _rounded(weight: Any, kind: Any) -> tuple[Any, Any]:
    """Return codes from -128 to 127 and scales, 2 · absmax / 255, as the tools of both formats choose them."""
    import numpy as np

    wide = weight.astype(np.float32)
    scales = (2 * np.abs(wide).max(axis=1) / 255).astype(kind)
    return np.clip(np.rint(wide / scales.astype(np.float32)[:, None]), -128, 127).astype(np.int8), scales


def _parts(module: str, codes: Any, scales: Any, form: QuantisedFormat) -> Mapping[str, Any]:
    import numpy as np

    rows, columns = codes.shape
    if form == "int-quantized":
        return {f"{module}.weight": codes, f"{module}.weight_scale": scales[:, None]}
    if form == "pack-quantized":
        padded = np.pad(codes, ((0, 0), (0, -columns % 4)), constant_values=-128)
        return {
            f"{module}.weight_packed": words_of(padded),
            f"{module}.weight_scale": scales[:, None],
            f"{module}.weight_shape": np.array([rows, columns], np.int64),
        }
    stored = 127 if form == "gptq" else 128
    return {
        f"{module}.qweight": np.ascontiguousarray(words_of(codes).T),
        f"{module}.qzeros": words_of(np.full((1, rows), stored - 128, np.int8)),
        f"{module}.scales": scales[None],
        f"{module}.g_idx": np.zeros(columns, np.int32),
    }


def words_of(codes: Any) -> Any:
    """Return rows of int8 codes, plus 128, in int32 words of four, the first in the lowest bits.

    Args:
        codes: The codes, whose rows are a multiple of four.
    """
    import numpy as np

    shifted = (codes.astype(np.int64) + 128).reshape(len(codes), -1, 4)
    return (shifted << np.array([0, 8, 16, 24])).sum(axis=2).astype(np.uint32).view(np.int32)


def _settings(form: QuantisedFormat, activations: bool) -> dict[str, Any]:
    if form in _GPTQ:
        return {
            "quant_method": "gptq",
            "bits": 8,
            "group_size": -1,
            "desc_act": True,
            "sym": True,
            "checkpoint_format": form,
        }
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens if activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head"],
    }
