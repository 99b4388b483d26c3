"""Open a checkpoint directory as published: config.json beside safetensors or PyTorch .bin weights, whole or in shards.

Opening one reads only headers and indexes, and of a quantised one zero points and orders. No byte of a weight is read,
no code of the checkpoint runs, and torch is not needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.frontends.quantised.scheme import SUPPORTED, Scheme, scheme_of
from passopt.ir.errors import ModelError
from passopt.ir.json_text import read_json, shown, stated
from passopt.ir.regular_files import open_regular
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.sources import safetensors_sources, torch_sources

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"

#: The names of weight files in order of preference: safetensors come first, since they need no unpickling.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: Such as gptq_model-8bit--1g.safetensors.
_GPTQ_FILES = "gptq_model-*bit-*.safetensors"

#: The switches of bitsandbytes, and the names that other quantisers have for the number of bits.
_SWITCHES, _BITS = ("load_in_4bit", "load_in_8bit"), ("bits", "w_bit", "num_bits")

#: The keys of config.json under which quantisers describe themselves.
_QUANTISERS = ("quantization_config", "compression_config")

#: What the values of config.json are that decide how a checkpoint is exported.
_READ = {
    "model_type": "a text",
    "architectures": "a list of texts",
    "auto_map": "an object",
    "text_config": "an object",
    "attn_config": "an object",
    "transformers_version": "a text",
    "model_max_length": "a whole number",
}

#: The beginning of what git puts in the place of a large file that was not fetched.
LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, and its tensors by state dict name. `directory` is absolute.

    Attributes:
        directory: The folder.
        config: The content of config.json, without what it says of a quantiser.
        tensors: Tensors in files; a quantised weight is made of its codes and scales.
        scheme: How the weights are quantised; None if they are floats.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Expression]
    scheme: Scheme | None = None


def open_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`.

    Raises:
        ModelError: If something is missing or damaged; the message says what.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such checkpoint directory")
    _refuse_adapter(directory)
    config_path = directory / CONFIG_NAME
    if not config_path.exists():
        files = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"name the file {directory / files[0]}" if files else "name the directory of a Hugging Face checkpoint"
        raise ModelError(f"{directory}: has no {CONFIG_NAME}; {hint}")
    config = _read_json(config_path)
    _check_kinds(config, config_path)
    scheme = _scheme(directory, config)
    tensors = _tensors(directory) if scheme is None else _quantised_tensors(directory)
    if scheme is None:
        return Checkpoint(directory.absolute(), config, tensors)
    plain = {key: value for key, value in config.items() if key not in _QUANTISERS}
    return Checkpoint(directory.absolute(), plain, scheme.weights(tensors, directory), scheme)


def _check_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError if a value that passopt itself reads is of another kind; sizes are for the class to judge."""
    for key, kind in _READ.items():
        stated(config, key, kind, str(path))
    for role, name in (config.get("auto_map") or {}).items():
        names = name if isinstance(name, list) and name else [name]
        if not all(one is None or isinstance(one, str) for one in names):
            raise ModelError(
                f"{path}: auto_map.{role} is {shown(name)}, expected MODULE.CLASS, or a list of such names"
            )


def _refuse_adapter(directory: Path) -> None:
    """Raise ModelError for the folder of a LoRA or other adapter, which holds only changes to another model."""
    path = directory / ADAPTER_NAME
    holds_model = any((directory / name).exists() for name in WEIGHT_NAMES)
    holds_adapter = any(directory.glob("adapter_model*"))
    if not path.exists() or (holds_model and not holds_adapter):
        return
    adapter = _read_json(path)
    kind, base = adapter.get("peft_type") or "PEFT", adapter.get("base_model_name_or_path") or "its base model"
    raise ModelError(
        f"{directory}: holds a {kind} adapter ({ADAPTER_NAME}) of {base}, not a model of its own. Merge it first, with "
        f"the package peft: PeftModel.from_pretrained(base, {str(directory)!r}).merge_and_unload().save_pretrained"
        f"(MERGED), where base is the loaded {base}; then export MERGED."
    )


def _scheme(directory: Path, config: Mapping[str, Any]) -> Scheme | None:
    """Return how the weights are quantised, or None; raise ModelError if they cannot be exported exactly.

    This comes before anything else that may be odd about the weights.
    """
    found = _quantisation(directory, config)
    if found is None:
        return None
    place, settings, described = found
    scheme, reasons = scheme_of(settings, f"{directory}: {place}")
    if scheme is not None:
        return scheme
    why = f", which cannot be kept exactly: {'; '.join(reasons)}" if reasons else ""
    raise ModelError(
        f"{directory}: quantised checkpoint: {place} says {described}{why}. Export takes {SUPPORTED}. Of others take "
        f"the checkpoint from which it was made, and quantise with a pass afterwards (int8)."
    )


def _quantisation(directory: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str] | None:
    """Return where a checkpoint says that its weights are quantised, its settings and their text, or None.

    There are no settings where they are those of a part of the model, since nothing is known of its other parts.
    """
    path = directory / CONFIG_NAME
    for place in (config, config.get("text_config") or {}):
        for key in _QUANTISERS:
            settings = stated(place, key, "an object", str(path))
            if settings and _is_quantised(settings, f"{path}: {key}"):
                return f"{key} of {CONFIG_NAME}", settings if place is config else {}, _described(settings)
        if stated(place, "quantization_bit", "a whole number", str(path)):
            return f"quantization_bit of {CONFIG_NAME}", {}, f"{place['quantization_bit']} bits"
    for name in ("quantize_config.json", "quant_config.json"):  # Beside checkpoints of older versions of GPTQ and AWQ.
        if (directory / name).exists():
            settings = _read_json(directory / name)
            # Before there was a `quant_method`, only GPTQ had "desc_act".
            known = {"quant_method": "gptq", **settings} if "desc_act" in settings else settings
            return name, known, _described(known)
    return None


def _is_quantised(settings: Mapping[str, Any], where: str) -> bool:
    """Return whether the settings quantise: only bitsandbytes' may be there with both of their switches off."""
    switches = [stated(settings, key, "true or false", where) for key in _SWITCHES if key in settings]
    method = stated(settings, "quant_method", "a text", where)
    is_off = bool(switches) and not any(switches)
    return not (is_off and method in (None, "bitsandbytes") and not any(settings.get(key) for key in _BITS))


def _described(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "no method")
    bits = next((settings[key] for key in _BITS if key in settings), None)
    if bits is None:
        bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
    return str(method) if bits is None else f"{method}, {bits} bits"


def _tensors(directory: Path) -> dict[str, Source]:
    path = next((directory / name for name in WEIGHT_NAMES if (directory / name).exists()), None)
    if path is None:
        raise ModelError(f"{directory}: has a {CONFIG_NAME} but no weights; looked for {', '.join(WEIGHT_NAMES)}")
    if path.suffix == ".json":
        return _indexed_tensors(path)
    return _file_tensors(path)


def _quantised_tensors(directory: Path) -> dict[str, Source]:
    """Return the tensors of a quantised checkpoint, whose only file AutoGPTQ calls after its settings."""
    named = sorted(directory.glob(_GPTQ_FILES))
    if len(named) == 1 and not any((directory / name).exists() for name in WEIGHT_NAMES):
        return _file_tensors(named[0])
    return _tensors(directory)


def _indexed_tensors(index: Path) -> dict[str, Source]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f'{index}: has no "weight_map" from tensor names to files')
    shards = {file: _shard_tensors(index, file) for file in sorted(set(weight_map.values()))}
    absent = sorted(name for name, file in weight_map.items() if name not in shards[file])
    if absent:
        raise ModelError(
            f"{index}: {_some(absent)} not in the shard that it names ({weight_map[absent[0]]}); "
            f"index and shards are of different checkpoints, download them again"
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _shard_tensors(index: Path, file: str) -> dict[str, Source]:
    if Path(file).name != file:
        raise ModelError(f"{index}: names the shard {file!r}, which is not a file beside it; refused")
    path = index.parent / file
    if not path.exists():
        raise ModelError(f"{path}: shard is missing, though {index.name} names it; download it again")
    return _file_tensors(path)


def _file_tensors(path: Path) -> dict[str, Source]:
    try:
        with open_regular(path) as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if head == LFS_POINTER:
        raise ModelError(f"{path}: a git-lfs pointer instead of weights; fetch them with: git lfs pull")
    return safetensors_sources(path) if path.suffix == ".safetensors" else torch_sources(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _some(names: list[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
