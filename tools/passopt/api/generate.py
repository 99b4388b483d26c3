"""Let a compiled folder continue prompts: `passopt.Engine`, and `passopt.generate` for a single call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from passopt.generation.chat import Message, chat_ids
from passopt.generation.loop import Generation, plan_room
from passopt.generation.loop import generate as run
from passopt.generation.open_engine import Engine as LoadedEngine
from passopt.generation.open_engine import ModelFacts, open_engine, read_facts
from passopt.generation.sampling import Sampling
from passopt.generation.settings import Settings, read_settings
from passopt.generation.tokenizer import TextStream, Tokenizer, load_tokenizer
from passopt.ir.errors import UsageError
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.reporting.result import Result
from passopt.targets.tvm.engine.available_memory import check_caches

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

    def sampling(self, defaults: Sampling) -> Sampling:
        """Return the model's defaults, changed as requested; a seed, temperature, top-k or top-p turns sampling on.

        Raises UsageError if a greedy request asks for sampling, or if an option is out of its range.
        """
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        asked = [name for name in ("temperature", "top_k", "top_p", "seed") if name in given]
        if self.greedy:
            if asked:
                flag = asked[0].replace("_", "-")
                raise UsageError(f"--greedy takes the most likely token; --{flag} says otherwise")
            return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
        return dataclasses.replace(defaults, **given, do_sample=defaults.do_sample or bool(asked))


@dataclasses.dataclass(frozen=True)
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


class _Folder:
    """A compiled folder before its weights are loaded: its description, its settings and its tokenizer."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.path = folder
        self.facts: ModelFacts = read_facts(folder)
        self.settings: Settings = read_settings(folder)
        self._reporter = reporter

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def encode(self, prompt: Prompt, request: Request) -> list[int]:
        """Return the token ids of a prompt; raise UsageError if it is neither text nor ids nor a conversation."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        ids = [item for item in prompt if isinstance(item, (int, np.integer)) and not isinstance(item, bool)]
        if len(ids) == len(prompt):
            return [int(item) for item in ids]
        return self._chat([_message(item) for item in prompt], request)

    def _chat(self, messages: Sequence[Message], request: Request) -> list[int]:
        """Return the token ids of a conversation, and report it if the oldest rounds do not fit."""
        new = request.max_new_tokens or self.settings.max_new_tokens
        limits = [limit for limit in (self.facts.max_positions, request.capacity) if limit is not None]
        room = min(limits) - new if limits else None
        whole = chat_ids(messages, self.path, self.tokenizer, self.settings, None)
        if room is None or len(whole) <= room:
            return whole
        found = chat_ids(messages, self.path, self.tokenizer, self.settings, room)
        if len(found) < len(whole):
            left_out = f"the oldest {len(whole) - len(found)} of {len(whole)} tokens do not fit and are left out"
            self._reporter.say(left_out)
        return found


def _message(item: object) -> Message:
    """Return the item as a message; raise UsageError if it is none."""
    if isinstance(item, Message):
        return item
    if isinstance(item, Mapping):
        try:
            return Message(item["role"], item["content"])
        except KeyError as error:
            raise UsageError(f'a message is {{"role": …, "content": …}}, this one has no {error}') from error
    raise UsageError(f"a prompt is a text, token ids, or a list of messages; {item!r} is none of them")


class Engine:
    """A compiled folder with its weights loaded, ready to continue prompts; a folder of ranks runs a process per rank.

    Example:
        >>> with passopt.Engine.load("compiled") as engine:
        ...     print(engine.generate("The lexical structure of", max_new_tokens=32))
    """

    def __init__(self, folder: _Folder, engine: LoadedEngine) -> None:
        self._folder = folder
        self._engine = engine

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        threads: int | None = None,
        verify_weights: bool = False,
        copy_weights: bool = False,
        reporter: Reporter = SILENT,
    ) -> Engine:
        """Load a folder that `passopt.compile` has written.

        Args:
            folder: The compiled folder, or the folder of ranks.
            threads: The number of threads, of all ranks together; None for the cores of this machine.
            verify_weights: Hash all weights again, not only when a file is seen for the first time.
            copy_weights: Copy weights to memory of the process, instead of mapping the file.
            reporter: Is told about progress while weights are read.

        Raises:
            ModelError: The folder is damaged, or its library needs instructions that this CPU lacks.
            UsageError: There is not enough memory, or `threads` is less than 1.
        """
        return cls._opened(
            _Folder(Path(folder), reporter), threads, verify_weights=verify_weights, copy_weights=copy_weights
        )

    @classmethod
    def _opened(cls, folder: _Folder, threads: int | None, *, verify_weights: bool, copy_weights: bool) -> Engine:
        with progress_bar(folder._reporter, "reading weights", folder.facts.weight_bytes) as progress:
            engine = open_engine(
                folder.path,
                threads=threads,
                verify_weights=verify_weights,
                copy_weights=copy_weights,
                progress=progress,
            )
        return cls(folder, engine)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of ranks; an engine without ranks has none."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    @property
    def vocab(self) -> int:
        """Return the number of logits per position."""
        return self._folder.facts.vocab

    @property
    def max_positions(self) -> int | None:
        """Return the length of the longest sequence; None if the model has no limit."""
        return self._folder.facts.max_positions

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer beside the library; raise ModelError if there is none, or if it is damaged."""
        return self._folder.tokenizer

    def allocate(self, batch: int, capacity: int) -> None:
        """Forget all sequences and make room for `batch` new ones of `capacity` columns, or raise UsageError."""
        self._engine.allocate(batch, capacity)

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append tokens to the sequences, and return their logits in fp32 [batch, seq, vocab].

        A model that slices the last token returns [batch, 1, vocab]. Raises UsageError if a shape or a token id is
        wrong, or if the sequences outgrow the cache or the model's positions.

        Args:
            ids: Token ids [batch, seq].
            mask: 1 for tokens and 0 for padding on the left, [batch, past + seq].
        """
        return self._engine.forward(ids, mask)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, on_text: OnText | None = None, **request: Any
    ) -> GenerateResult:
        """Continue prompts together, and return the new tokens and texts.

        Args:
            prompts: A text, or a list of prompts: texts, token ids, or conversations.
            on_text: A function that gets the number of a prompt and the next piece of its text, as tokens come.
            **request: The attributes of `Request`, such as `max_new_tokens=64, greedy=True`.

        Raises:
            UsageError: A prompt is empty or too long, or the request contradicts itself.
            ModelError: The tokenizer or the chat format is missing or damaged, or logits are not finite.
        """
        asked = Request(**request)
        encoded = _encoded(self._folder, _listed(prompts), asked)
        return _run(self._folder, self._engine, encoded, asked, on_text)


def generate(
    folder: Path | str,
    prompts: Prompt | Sequence[Prompt],
    *,
    threads: int | None = None,
    verify_weights: bool = False,
    copy_weights: bool = False,
    on_text: OnText | None = None,
    on_end: Callable[[int], None] | None = None,
    reporter: Reporter = SILENT,
    **request: Any,
) -> GenerateResult:
    """Load a compiled folder, continue prompts and return the new tokens and texts, and release the folder.

    Args:
        folder: The folder that `passopt.compile` has written.
        prompts: A text, or a list of prompts: texts, token ids, or conversations. They are checked before weights are
            read.
        threads: As for `Engine.load`.
        verify_weights: As for `Engine.load`.
        copy_weights: As for `Engine.load`.
        on_text: A function that gets the number of a prompt and the next piece of its text, as tokens come.
        on_end: A function that gets the number of each prompt that has ended.
        reporter: Is told about progress.
        **request: The attributes of `Request`, such as `max_new_tokens=64, greedy=True`.

    Raises:
        ModelError: The folder or its tokenizer is damaged, this CPU cannot run the library, or logits are not finite.
        UsageError: A prompt is empty or too long, the request contradicts itself, or there is not enough memory.
    """
    asked = Request(**request)
    found = _Folder(Path(folder), reporter)
    asked.sampling(found.settings.sampling)
    encoded = _encoded(found, _listed(prompts), asked)
    room = plan_room(found.facts, encoded.ids, _longest(found, asked), asked.capacity)
    copied = found.facts.weight_bytes if copy_weights else 0
    check_caches(found.facts.caches, len(encoded.ids), room.columns, copied=copied)
    with Engine._opened(found, threads, verify_weights=verify_weights, copy_weights=copy_weights) as engine:
        return _run(found, engine._engine, encoded, asked, on_text, on_end)


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Prompts as token ids, and whether the answers are texts."""

    ids: list[list[int]]
    as_text: bool


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; a single text, list of ids or conversation becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    alone = all(isinstance(item, (int, np.integer, Message, Mapping)) for item in prompts)
    return [prompts] if prompts and alone else list(prompts)  # type: ignore[list-item, arg-type]


def _encoded(folder: _Folder, prompts: Sequence[Prompt], request: Request) -> _Encoded:
    as_text = any(isinstance(prompt, str) or (prompt and not _is_ids(prompt)) for prompt in prompts)
    return _Encoded([folder.encode(prompt, request) for prompt in prompts], as_text)


def _is_ids(prompt: Prompt) -> bool:
    return isinstance(prompt[0], (int, np.integer))


def _longest(folder: _Folder, request: Request) -> int:
    return request.max_new_tokens or folder.settings.max_new_tokens


def _run(
    folder: _Folder,
    engine: LoadedEngine,
    prompts: _Encoded,
    request: Request,
    on_text: OnText | None,
    on_end: Callable[[int], None] | None = None,
) -> GenerateResult:
    settings, as_text = folder.settings, prompts.as_text
    streams = [TextStream(folder.tokenizer) if as_text else _IdStream() for _ in prompts.ids]

    def put(row: int, token: int) -> None:
        if on_text is not None:
            on_text(row, streams[row].put(token))

    def end(row: int) -> None:
        if on_text is not None:
            on_text(row, streams[row].end())
        if on_end is not None:
            on_end(row)

    found = run(
        engine,
        prompts.ids,
        request.sampling(settings.sampling),
        max_new_tokens=_longest(folder, request),
        eos=settings.eos,
        pad=settings.pad,
        capacity=request.capacity,
        on_token=put,
        on_end=end,
    )
    texts = tuple(folder.tokenizer.decode(row.ids) for row in found.rows) if as_text else None
    return GenerateResult(tuple(map(tuple, prompts.ids)), found, texts)


class _IdStream:
    """Give token ids as text, separated by spaces."""

    def __init__(self) -> None:
        self._space = ""

    def put(self, token: int) -> str:
        text, self._space = f"{self._space}{token}", " "
        return text

    def end(self) -> str:
        return ""
