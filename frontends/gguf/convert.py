"""Write what a GGUF file holds as a Hugging Face checkpoint: configuration, weights, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from passopt.frontends.checkpoint import CONFIG_NAME, WEIGHT_NAMES, Checkpoint, open_checkpoint
from passopt.frontends.gguf.configuration import architecture_of, config_of, token_ids
from passopt.frontends.gguf.pre_tokenizers import NAMES
from passopt.frontends.gguf.reader import GgufFile
from passopt.frontends.gguf.tensors import nbytes_of, parameters_of, write_tensors
from passopt.frontends.gguf.tokenizer import UnknownTokenizer, write_tokenizer
from passopt.ir.errors import UsageError


def check_gguf(model: GgufFile) -> None:
    """Raise ModelError, without reading weights, if the file's model is not supported."""
    config_of(model)
    parameters_of(model, architecture_of(model))


def write_checkpoint(
    model: GgufFile, folder: Path, say: Callable[[str], None], tell: Callable[[int], None]
) -> Checkpoint:
    """Write the checkpoint into a new folder, and open it. Memory does not grow with the model.

    Args:
        model: The open GGUF file.
        folder: The folder, which must not exist, in one that does.
        say: Is told if there is no tokenizer that can be written.
        tell: Is given the numbers of bytes of weights written.

    Raises:
        ModelError: If the model is not supported, or if the file is damaged.
        UsageError: If the disk is too small.
    """
    config = config_of(model)
    needed, free = nbytes_of(model), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UsageError(
            f"{folder.parent}: the dequantised weights need {needed:,} bytes for the time of the export, the disk has "
            f"{free:,} free"
        )
    folder.mkdir()
    _write_json(folder / CONFIG_NAME, config)
    _write_json(folder / "generation_config.json", token_ids(model))
    try:
        write_tokenizer(model.metadata, folder, model.path)
    except UnknownTokenizer as error:
        say(
            f"{model.path.name}: {error}, so the output has no tokenizer; supported are sentencepiece ('llama'), and "
            f"byte-level BPE ('gpt2') with {', '.join(NAMES)}"
        )
    write_tensors(model, architecture_of(model), config, folder / WEIGHT_NAMES[0], tell)
    return open_checkpoint(folder)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
