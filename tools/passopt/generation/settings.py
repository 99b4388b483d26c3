"""Read what a model's own files say about generation: generation_config.json, then config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.generation.sampling import Sampling
from passopt.ir import json_text
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.json_text import check_kind, stated

OWN_NAME, CONFIG_NAME = "generation_config.json", "config.json"

#: The number of new tokens if neither the user nor the model's files name one.
DEFAULT_NEW_TOKENS = 256

#: Options of transformers that passopt does not have, with the values that switch them off besides null.
_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "sequence_bias": (),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}
#: The same for options that matter to sampling only.
_NOT_IMPLEMENTED_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults of a model.

    `user` and `assistant` are the token ids that begin a turn in Baichuan's chat format, `ignored` the options of
    generation_config.json that change what transformers generates, and that passopt does not have.
    """

    sampling: Sampling
    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    user: int | None
    assistant: int | None
    ignored: tuple[str, ...] = ()


def read_settings(folder: Path) -> Settings:
    """Read the settings from the files in a folder; without any, tokens are chosen greedily.

    Raises:
        ModelError: If a file is there but damaged, or if it holds an option that is out of its range.
    """
    own, config = read_json(folder / OWN_NAME), read_json(folder / CONFIG_NAME)

    def ids(key: str) -> list[int]:
        """Return the token ids under a key, which files write as one or as a list."""
        name, settings = (OWN_NAME, own) if key in own else (CONFIG_NAME, config)
        value = settings.get(key)
        found = value if isinstance(value, list) and key == "eos_token_id" else [] if value is None else [value]
        # Older files write a pad of -1 for none. As an end of the text it would never come, and is a mistake.
        found = [] if key == "pad_token_id" and found == [-1] else found
        for index in found:
            check_kind(index, "a token id", f"{folder / name}: {key}")
        return found

    ends = ids("eos_token_id")
    sampling = _sampling(own, folder / OWN_NAME)
    return Settings(
        sampling=sampling,
        max_new_tokens=stated(own, "max_new_tokens", "a number of tokens", str(folder / OWN_NAME))
        or DEFAULT_NEW_TOKENS,
        eos=frozenset(ends),
        pad=next(iter(ids("pad_token_id")), min(ends, default=0)),
        user=next(iter(ids("user_token_id")), None),
        assistant=next(iter(ids("assistant_token_id")), None),
        ignored=_ignored(own, samples=sampling.do_sample),
    )


def _sampling(own: Mapping[str, Any], path: Path) -> Sampling:
    """Return the options of choosing tokens in generation_config.json, where files also write null for a default."""

    def number(key: str, default: float) -> float:
        value = stated(own, key, "a number", str(path))
        return default if value is None else float(value)

    temperature, top_p = number("temperature", 1.0), number("top_p", 1.0)
    top_k = stated(own, "top_k", "a whole number", str(path)) if "top_k" in own else 50
    # Both leave only the most likely token, though as numbers they would divide by 0, and leave none.
    greedy = temperature == 0 or top_p == 0
    do_sample = stated(own, "do_sample", "true or false", str(path))
    try:
        return Sampling(
            do_sample=bool(do_sample) and not greedy,
            temperature=temperature or 1.0,
            top_k=top_k or 0,
            top_p=top_p or 1.0,
            repetition_penalty=number("repetition_penalty", 1.0),
        )
    except UsageError as error:
        raise ModelError(f"{path}: {error}") from error


def _ignored(settings: Mapping[str, Any], *, samples: bool) -> tuple[str, ...]:
    """Return the options that are set to something else than what switches them off."""
    options = {**_NOT_IMPLEMENTED, **(_NOT_IMPLEMENTED_SAMPLING if samples else {})}
    if "max_new_tokens" not in settings:
        options["max_length"] = (20,)
    return tuple(key for key, off in options.items() if settings.get(key) not in (None, *off))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no file.

    Raises:
        ModelError: If the file cannot be read or holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json_text.read_json(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is {type(found).__name__} instead of an object")
    return found
