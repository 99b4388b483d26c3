"""Read what a model's own files say about generation: generation_config.json, then config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from passopt.generation.sampling import Sampling
from passopt.ir import json_text
from passopt.ir.errors import ModelError, UsageError

#: The number of new tokens if neither the user nor the model's files name one.
DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults of a model; `user` and `assistant` are the token ids that begin a turn in Baichuan's chat format."""

    sampling: Sampling
    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    user: int | None
    assistant: int | None


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
        sampling = Sampling(
            do_sample=bool(own.get("do_sample", False)),
            temperature=float(own.get("temperature") or 1.0),
            top_k=int(own.get("top_k", 50) or 0),
            top_p=float(own.get("top_p") or 1.0),
            repetition_penalty=float(own.get("repetition_penalty") or 1.0),
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
    )


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
