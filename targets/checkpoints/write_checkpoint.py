"""Write a quantised checkpoint: config.json, what stands beside it, and one safetensors file, streamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from passopt.ir.atomic_folders import staged_directory
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import StreamReport, write_weight_files

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
#: The files of a checkpoint that go along: tokenizer, configurations, code and texts.
_BESIDE = ("*.json", "*.jinja", "*.model", "*.py", "*.txt", "*.md", "LICENSE*")
#: What belongs to the weights that are not copied.
_WEIGHTS = ("*.index.json", "quantize_config.json", "quant_config.json", CONFIG_NAME)


def write_checkpoint(
    output: Path,
    source: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Expression],
    stream: StreamOptions,
    progress: Callable[[int], None] | None = None,
) -> StreamReport:
    """Write a checkpoint into a new folder, which appears whole or not at all.

    Args:
        output: The folder.
        source: The checkpoint whose other files go along.
        config: The content of config.json.
        tensors: The tensors by name.
        stream: The memory and the threads to write with.
        progress: Is given the numbers of bytes of weights written.

    Returns:
        How the weights were written.

    Raises:
        UsageError: The folder exists, or the disk or the memory is too small.
        ModelError: A tensor cannot be read.
    """
    file = WeightFile(output / WEIGHTS_NAME, tensors, plain=True)
    with staged_directory(output, file.layout.nbytes) as folder:
        for path in _beside(source):
            shutil.copyfile(path, folder / path.name)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if config["quantization_config"]["quant_method"] == "gptq":  # Where older loaders of GPTQ look for it.
            text = json.dumps(config["quantization_config"], indent=2) + "\n"
            (folder / "quantize_config.json").write_text(text, encoding="utf-8")
        placed = WeightFile(folder / WEIGHTS_NAME, tensors, plain=True)
        return write_weight_files([placed], stream, progress=progress)


def _beside(source: Path) -> list[Path]:
    left_out = {path for pattern in _WEIGHTS for path in source.glob(pattern)}
    found = {path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}
    return sorted(found - left_out)
