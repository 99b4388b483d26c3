"""Define what is asked of a model that continues prompts, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from passopt.api import checked
from passopt.generation.chat import Message
from passopt.generation.loop import Generation
from passopt.generation.sampling import Sampling
from passopt.ir.errors import UsageError
from passopt.reporting.result import Result

#: A text, a conversation of messages (or mappings with "role" and "content"), or token ids.
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message | Mapping[str, str]]"
#: A function that gets the number of a prompt, from 0 on, and the next piece of its text or of its ids.
OnText: TypeAlias = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of a generation besides the prompts; None stands for what the model's own files say.

    Attributes:
        max_new_tokens: The largest number of new tokens for each prompt.
        greedy: Always choose the most likely token, without a repetition penalty unless one is given.
        temperature: Sample with this temperature; smaller is closer to greedy.
        top_k: Sample from this many of the most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens that together have this probability.
        repetition_penalty: Above 1, make tokens less likely that were said already.
        seed: Sample with this seed, so that every run gives the same text.
        capacity: The number of columns of the cache; None for what is needed.
    """

    max_new_tokens: int | None = None
    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("capacity", 1)):
            checked.whole(name, getattr(self, name), least)

    def sampling(self, defaults: Sampling) -> Sampling:
        """Return the model's defaults, changed as requested; a seed, temperature, top-k or top-p turns sampling on.

        Args:
            defaults: What the model's generation_config.json says.

        Raises:
            UsageError: A greedy request asks for sampling, or an option is out of its range.
        """
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        asked = [name for name in ("temperature", "top_k", "top_p", "seed") if name in given]
        if self.greedy:
            if asked:
                raise UsageError(f"`greedy` takes the most likely token; `{asked[0]}` says otherwise")
            return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
        return dataclasses.replace(defaults, **given, do_sample=defaults.do_sample or bool(asked))


@dataclasses.dataclass(frozen=True, repr=False)
class GenerateResult(Result):
    """The result of a generation.

    Attributes:
        prompts: The token ids of each prompt, as the model got them.
        generation: The new token ids of all rows and why they ended, times in seconds, bytes of the cache.
        texts: The text of each row; None if all prompts were token ids.
    """

    prompts: tuple[tuple[int, ...], ...]
    generation: Generation
    texts: tuple[str, ...] | None

    def to_text(self) -> str:
        rows = len(self.prompts)
        texts = self.texts or [" ".join(map(str, row.ids)) for row in self.generation.rows]
        return "\n".join(heading(row, rows) + text for row, text in enumerate(texts))

    def to_json(self) -> dict[str, Any]:
        found = self.generation
        rows: list[dict[str, Any]] = [
            {"prompt_ids": list(prompt), "ids": list(row.ids), "end": row.end}
            for prompt, row in zip(self.prompts, found.rows, strict=True)
        ]
        for row, text in zip(rows, self.texts or ()):
            row["text"] = text
        return {
            "rows": rows,
            "prompt_tokens": found.prompt_tokens,
            "new_tokens": found.new_tokens,
            "first_token_seconds": found.first_token,
            "total_seconds": found.total,
            "tokens_per_second": found.tokens_per_second,
            "cache_bytes": found.cache_bytes,
        }

    def summary(self) -> str:
        """Return the figures in one line: tokens, seconds to the first one, tokens per second, bytes of the cache."""
        found = self.generation
        speed = found.tokens_per_second
        parts = [
            f"{found.prompt_tokens} prompt tokens, first new token after {found.first_token:.3f} s",
            f"{found.new_tokens} new tokens" + (f", {speed:.2f} tokens/s" if speed is not None else ""),
            f"cache {found.cache_bytes:,} bytes",
        ]
        if any(row.end == "positions" for row in found.rows):
            parts.append("ended where the model's positions end")
        return "; ".join(parts)


def heading(row: int, rows: int) -> str:
    """Return the line above answer `row`, counted from 0, that separates it from others; "" if `rows` is 1."""
    return "" if rows == 1 else f"== {row + 1}\n"
