"""Read what a model's own files say about generation: generation_config.json, then config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.generation.sampling import Sampling
from passopt.ir import json_text
from passopt.ir.errors import ModelError, UsageError

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
    own = read_json(folder / "generation_config.json")
    config = read_json(folder / "config.json")

    def number(key: str) -> int | None:
        value = own.get(key, config.get(key))
        return value if isinstance(value, int) else None

    eos = own.get("eos_token_id", config.get("eos_token_id"))
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(end, int) for end in ends):
        raise ModelError(f"{folder}: eos_token_id is {eos!r}, expected a token id or a list of them")
    try:
        temperature, top_p = (float(_stated(own, key, 1.0)) for key in ("temperature", "top_p"))
        # Both leave only the most likely token, though as numbers they would divide by 0, and leave none.
        greedy = temperature == 0 or top_p == 0
        sampling = Sampling(
            do_sample=bool(own.get("do_sample", False)) and not greedy,
            temperature=temperature or 1.0,
            top_k=int(own.get("top_k", 50) or 0),
            top_p=top_p or 1.0,
            repetition_penalty=float(_stated(own, "repetition_penalty", 1.0)),
        )
        longest = int(own.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'generation_config.json'}: is damaged: {error}") from error
    except UsageError as error:
        raise ModelError(f"{folder / 'generation_config.json'}: {error}") from error
    pad = number("pad_token_id")
    return Settings(
        sampling=sampling,
        max_new_tokens=longest,
        eos=frozenset(ends),
        pad=pad if pad is not None else min(ends, default=0),
        user=number("user_token_id"),
        assistant=number("assistant_token_id"),
        ignored=_ignored(own, samples=sampling.do_sample),
    )


def _stated(settings: Mapping[str, Any], key: str, default: float) -> Any:
    """Return what is stated under a key; files also write null for the default."""
    value = settings.get(key)
    return default if value is None else value


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
