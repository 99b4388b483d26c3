"""`passopt generate`: text from a compiled folder. Text on stdout, speed and memory on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from passopt.commands.progress import Progress
from passopt.generation.chat import Message, chat_ids
from passopt.generation.loop import Generation, plan_room
from passopt.generation.loop import generate as run
from passopt.generation.open_engine import Bounds, Engine, open_engine, read_facts
from passopt.generation.sampling import Sampling
from passopt.generation.settings import Settings, read_settings
from passopt.generation.tokenizer import TextStream, Tokenizer, load_tokenizer
from passopt.ir.errors import UsageError
from passopt.targets.tvm.engine.available_memory import check_caches


def generate(options: argparse.Namespace) -> int:
    """Everything that can be wrong with the prompts is told before the weights are loaded."""
    folder = Path(options.directory)
    _check_sources(options)
    facts = read_facts(folder)
    settings = read_settings(folder)
    sampling = _sampling(options, settings.sampling)
    tokenizer = None if options.ids else load_tokenizer(folder)
    texts = _texts(options)
    conversations = _conversations(options, texts)
    longest = options.max_new_tokens or settings.max_new_tokens
    prompts = _prompts(options, folder, texts, conversations, tokenizer, settings, facts, longest)
    room = plan_room(facts, prompts, longest, options.capacity)
    copied = facts.weight_bytes if options.copy_weights else 0
    check_caches(facts.caches, len(prompts), room.columns, copied=copied)
    engine = _open(folder, facts.weight_bytes, options)
    writer = None if options.json or not options.stream else _Writer(_pieces(tokenizer), len(prompts))
    result = run(
        engine,
        prompts,
        sampling,
        max_new_tokens=longest,
        eos=settings.eos,
        pad=settings.pad,
        capacity=options.capacity,
        on_token=writer.token if writer else None,
        on_end=writer.end if writer else None,
    )
    if options.json:
        print(json.dumps(_report(result, prompts, tokenizer), ensure_ascii=False, indent=1))
    elif not writer:
        _print_all(result, tokenizer)
    _say(result)
    return 0


def _open(folder: Path, nbytes: int, options: argparse.Namespace) -> Engine:
    """The engine, with a bar while weights are read: the first time of a file, or to copy them."""
    progress = Progress("reading weights", nbytes)
    try:
        return open_engine(
            folder,
            threads=options.threads,
            verify_weights=options.verify_weights,
            copy_weights=options.copy_weights,
            progress=progress,
        )
    finally:
        progress.close()


def _check_sources(options: argparse.Namespace) -> None:
    given = [name for name in ("prompt", "prompt_file", "messages") if getattr(options, name)]
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{flags} both say what to continue; give one of them")
    if options.ids and (options.chat or options.messages or options.system):
        raise UsageError("--ids takes token ids as they are; --chat, --system and --messages need text")
    if options.system and not options.chat:
        raise UsageError("--system belongs to --chat")
    if options.stream and options.json:
        raise UsageError("--json prints when all is known: it cannot --stream")


def _sampling(options: argparse.Namespace, defaults: Sampling) -> Sampling:
    """The model's own defaults, and what the command line says instead. A seed or a temperature asks for sampling."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.greedy:
        unused = [name for name in ("temperature", "top_k", "top_p", "seed") if name in given]
        if unused:
            raise UsageError(f"--greedy takes the most likely token; --{unused[0].replace('_', '-')} says otherwise")
        return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
    asked = any(name in given for name in ("temperature", "top_k", "top_p", "seed"))
    return dataclasses.replace(defaults, **given, do_sample=defaults.do_sample or asked)


def _texts(options: argparse.Namespace) -> list[str]:
    """One prompt per --prompt, one per line of --prompt-file, or all of stdin."""
    if options.messages:
        return []
    if options.prompt:
        blank = [number for number, text in enumerate(options.prompt, 1) if not text.strip()]
        if blank:
            raise UsageError(f"prompt {blank[0]} is empty: there is nothing to continue from")
        return list(options.prompt)
    if options.prompt_file:
        lines = _read(options.prompt_file).splitlines()
        if not lines:
            raise UsageError(f"{options.prompt_file}: is empty; one prompt per line is expected")
        blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
        if blank:
            raise UsageError(f"{options.prompt_file}: line {blank[0]} is blank; one prompt per line is expected")
        return lines
    if sys.stdin.isatty():
        print("passopt generate: reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    text = sys.stdin.read()
    if not text.strip():
        raise UsageError("standard input is empty: there is nothing to continue from; pipe a text in, or give --prompt")
    return [text]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _conversations(options: argparse.Namespace, texts: Sequence[str]) -> list[list[Message]]:
    if options.messages:
        return [_messages(options.messages)]
    if not options.chat:
        return []
    system = [Message("system", options.system)] if options.system else []
    return [[*system, Message("user", text)] for text in texts]


def _messages(path: str) -> list[Message]:
    text = _read(path)
    try:
        return [Message(entry["role"], entry["content"]) for entry in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}: is no list of {{"role": …, "content": …}}: {error}') from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _prompts(
    options: argparse.Namespace,
    folder: Path,
    texts: Sequence[str],
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer | None,
    settings: Settings,
    bounds: Bounds,
    max_new_tokens: int,
) -> list[list[int]]:
    if tokenizer is None:
        return [_ids(text) for text in texts]
    if conversations:
        limits = [limit for limit in (bounds.max_positions, options.capacity) if limit is not None]
        room = min(limits) - max_new_tokens if limits else None
        return [_chat(messages, folder, tokenizer, settings, room) for messages in conversations]
    return [tokenizer.encode(text) for text in texts]


def _chat(
    messages: Sequence[Message], folder: Path, tokenizer: Tokenizer, settings: Settings, room: int | None
) -> list[int]:
    """The prompt of one conversation; that its oldest rounds do not fit is said on stderr."""
    whole = chat_ids(messages, folder, tokenizer, settings, None)
    if room is None or len(whole) <= room:
        return whole
    found = chat_ids(messages, folder, tokenizer, settings, room)
    if len(found) < len(whole):
        left_out = f"the oldest {len(whole) - len(found)} of {len(whole)} tokens do not fit and are left out"
        print(f"passopt generate: {left_out}", file=sys.stderr)
    return found


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise UsageError(f"--ids: expected token ids separated by spaces: {error}") from error


def _pieces(tokenizer: Tokenizer | None) -> Callable[[], TextStream | _IdStream]:
    return _IdStream if tokenizer is None else lambda: TextStream(tokenizer)


class _IdStream:
    """Token ids, separated by spaces."""

    def __init__(self) -> None:
        self._space = ""

    def put(self, token: int) -> str:
        text, self._space = f"{self._space}{token}", " "
        return text

    def end(self) -> str:
        return ""


class _Writer:
    """Prints as tokens come. Prompts are answered at once but printed in order: others wait until it is their turn."""

    def __init__(self, make: Callable[[], TextStream | _IdStream], rows: int) -> None:
        self._streams = [make() for _ in range(rows)]
        self._waiting = [_heading(row, rows) for row in range(rows)]
        self._ended = [False] * rows
        self._turn = 0
        self._flush()

    def token(self, row: int, token: int) -> None:
        self._waiting[row] += self._streams[row].put(token)
        self._flush()

    def end(self, row: int) -> None:
        self._waiting[row] += self._streams[row].end() + "\n"
        self._ended[row] = True
        self._flush()

    def _flush(self) -> None:
        while self._turn < len(self._waiting):
            if self._waiting[self._turn]:
                sys.stdout.write(self._waiting[self._turn])
                sys.stdout.flush()
                self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self._turn += 1


def _heading(row: int, rows: int) -> str:
    """Tells several answers apart; a single one stands for itself."""
    return "" if rows == 1 else f"== {row + 1}\n"


def _print_all(result: Generation, tokenizer: Tokenizer | None) -> None:
    for row, found in enumerate(result.rows):
        text = " ".join(map(str, found.ids)) if tokenizer is None else tokenizer.decode(found.ids)
        print(_heading(row, len(result.rows)) + text)


def _report(result: Generation, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer | None) -> dict[str, object]:
    rows = [
        {"prompt_ids": list(prompt), "ids": list(row.ids), "end": row.end}
        | ({} if tokenizer is None else {"text": tokenizer.decode(row.ids)})
        for prompt, row in zip(prompts, result.rows, strict=True)
    ]
    return {
        "rows": rows,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "first_token_seconds": result.first_token,
        "total_seconds": result.total,
        "tokens_per_second": result.tokens_per_second,
        "cache_bytes": result.cache_bytes,
    }


def _say(result: Generation) -> None:
    speed = result.tokens_per_second
    parts = [
        f"{result.prompt_tokens} prompt tokens, first new token after {result.first_token:.3f} s",
        f"{result.new_tokens} new tokens" + (f", {speed:.2f} tokens/s" if speed is not None else ""),
        f"cache {result.cache_bytes:,} bytes",
    ]
    if any(row.end == "positions" for row in result.rows):
        parts.append("ended where the model's positions end")
    print("passopt generate: " + "; ".join(parts), file=sys.stderr)
