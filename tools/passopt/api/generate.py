"""Let a compiled folder continue prompts: `passopt.Engine`, and `passopt.generate` for a single call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from passopt.api.generate_result import GenerateResult, OnText, Prompt, Request
from passopt.generation.chat import Message, chat_ids
from passopt.generation.loop import cache_size_for
from passopt.generation.loop import generate as run
from passopt.generation.open_engine import Engine as LoadedEngine
from passopt.generation.open_engine import ModelFacts, open_engine, read_facts
from passopt.generation.settings import Settings, read_settings
from passopt.generation.tokenizer import TextStream, Tokenizer, load_tokenizer
from passopt.ir.errors import UsageError
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.targets.tvm.engine.available_memory import check_caches


class _Folder:
    """A compiled folder before its weights are loaded: its description, its settings and its tokenizer."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.path = folder
        self.facts: ModelFacts = read_facts(folder)
        self.settings: Settings = read_settings(folder)
        self._reporter = reporter
        if self.settings.ignored:
            reporter.say(f"generation_config.json sets what passopt does not have: {', '.join(self.settings.ignored)}")

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

    Use `Engine.load` to make one. An engine is closed at the end of a `with` block, or by `close`.

    Args:
        folder: What is known of the folder before its weights are loaded.
        engine: The engine with the weights.

    Example:
        >>> with passopt.Engine.load("compiled") as engine:
        ...     print(engine.generate("The lexical structure of", max_new_tokens=32))
    """

    def __init__(self, folder: _Folder, engine: LoadedEngine) -> None:
        self._folder = folder
        self._loaded = engine
        self._is_closed = False

    @property
    def _engine(self) -> LoadedEngine:
        if self._is_closed:
            raise UsageError(f"{self._folder.path}: this engine was closed; load it again")
        return self._loaded

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.vocab} logits, at most {self.max_positions} positions"
        return f"<passopt.Engine of {self._folder.path}: {state}>"

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
        """Load what `passopt.compile` has written.

        Args:
            folder: The compiled folder, or the folder of ranks.
            threads: The number of threads, of all ranks together; None for the cores of this machine.
            verify_weights: Hash all weights again, not only when a file is seen for the first time.
            copy_weights: Copy weights to memory of the process, instead of mapping the file.
            reporter: Is told about progress while weights are read.

        Returns:
            The engine, which owns its processes and caches until it is closed.

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
        close = getattr(self._loaded, "close", None)
        if close is not None:
            close()
        self._is_closed = True

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
        """Forget everything, and make room in the cache for new sequences.

        Args:
            batch: Sequences that run side by side.
            capacity: Positions of each of them, padding included.

        Raises:
            UsageError: The caches do not fit into the available memory.
        """
        self._engine.allocate(batch, capacity)

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append tokens to the sequences, and return their logits.

        Args:
            ids: Token ids [batch, seq].
            mask: 1 for tokens and 0 for padding on the left, [batch, past + seq].

        Returns:
            Logits in fp32 [batch, seq, vocab]; [batch, 1, vocab] of a model that slices the last token.

        Raises:
            UsageError: A shape or a token id is wrong, or the sequences outgrow the cache or the model's positions.
        """
        return self._engine.forward(ids, mask)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        capacity: int | None = None,
        on_text: OnText | None = None,
    ) -> GenerateResult:
        """Continue prompts together.

        Args:
            prompts: A text, or a list of prompts: texts, token ids, or conversations.
            max_new_tokens: The largest number of new tokens for each prompt. Here and below, None stands for what the
                model's files say.
            greedy: Always choose the most likely token, without a repetition penalty unless one is given.
            temperature: Sample with this temperature; smaller is closer to greedy.
            top_k: Sample from this many of the most likely tokens; 0 for all.
            top_p: Sample from the most likely tokens that together have this probability.
            repetition_penalty: Above 1, make tokens less likely that were said already.
            seed: Sample with this seed, so that every run gives the same text.
            capacity: The number of columns of the cache; None for what is needed.
            on_text: A function that gets the number of a prompt and the next piece of its text, as tokens come.

        Returns:
            The texts or token ids of all prompts, with times and the bytes of the cache.

        Raises:
            UsageError: A prompt is empty or too long, or the request contradicts itself.
            ModelError: The tokenizer or the chat format is missing or damaged, or logits are not finite.
        """
        asked = Request(
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            capacity=capacity,
        )
        encoded = _encoded(self._folder, _listed(prompts), asked)
        return _run(self._folder, self._engine, encoded, asked, on_text)


def generate(
    folder: Path | str,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    greedy: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    capacity: int | None = None,
    threads: int | None = None,
    verify_weights: bool = False,
    copy_weights: bool = False,
    on_text: OnText | None = None,
    on_end: Callable[[int], None] | None = None,
    reporter: Reporter = SILENT,
) -> GenerateResult:
    """Load a compiled folder, continue prompts, and let it go. What is wrong with them is told before weights are read.

    Args:
        folder: What `passopt.compile` has written.
        prompts: A text, or a list of prompts: texts, token ids, or conversations.
        max_new_tokens: As for `Engine.generate`.
        greedy: As for `Engine.generate`.
        temperature: As for `Engine.generate`.
        top_k: As for `Engine.generate`.
        top_p: As for `Engine.generate`.
        repetition_penalty: As for `Engine.generate`.
        seed: As for `Engine.generate`.
        capacity: As for `Engine.generate`.
        threads: As for `Engine.load`.
        verify_weights: As for `Engine.load`.
        copy_weights: As for `Engine.load`.
        on_text: A function that gets the number of a prompt and the next piece of its text, as tokens come.
        on_end: A function that gets the number of each prompt that has ended.
        reporter: Is told about progress.

    Returns:
        The texts or token ids of all prompts, with times and the bytes of the cache.

    Raises:
        ModelError: The folder or its tokenizer is damaged, this CPU cannot run the library, or logits are not finite.
        UsageError: A prompt is empty or too long, the request contradicts itself, or there is not enough memory.
    """
    asked = Request(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        capacity=capacity,
    )
    found = _Folder(Path(folder), reporter)
    asked.sampling(found.settings.sampling)
    encoded = _encoded(found, _listed(prompts), asked)
    size = cache_size_for(found.facts, encoded.ids, _longest(found, asked), asked.capacity)
    copied = found.facts.weight_bytes if copy_weights else 0
    check_caches(found.facts.caches, len(encoded.ids), size.columns, copied=copied)
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
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise UsageError(f"prompts are a text, token ids, messages, or a list of those, not {prompts!r}")
    alone = all(isinstance(item, (int, np.integer, Message, Mapping)) for item in prompts)
    if not alone and any(not isinstance(item, Sequence) or isinstance(item, bytes) for item in prompts):
        raise UsageError("a list of prompts holds texts, lists of token ids, or lists of messages, and nothing else")
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
