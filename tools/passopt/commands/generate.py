"""Continue prompts with a compiled model: `passopt generate DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passopt.ir.errors import UsageError
from passopt.terminal.arguments import count, positive

if TYPE_CHECKING:
    from passopt.api.generate_result import Prompt

SUMMARY = "Continue prompts with a compiled model. Text goes to stdout; speed and memory of the cache to stderr."
EXAMPLE = """passopt generate baichuan2.lib --prompt 'The lexical structure of' --max-new-tokens 64 --stream
  passopt generate baichuan2.lib --chat --prompt 'What is a compiler?' --temperature 0.3 --seed 1
  passopt generate baichuan2.lib --prompt-file questions.txt --chat --greedy --json
  echo '5 17 203' | passopt generate baichuan2.lib --ids"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("directory", metavar="DIR", help="compiled folder that passopt compile has written")
    command.add_argument(
        "--prompt", metavar="TEXT", action="append", help="continue this text; may be repeated (default: read stdin)"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="continue every line of this UTF-8 file")
    command.add_argument(
        "--messages", metavar="FILE", help='answer a conversation: a JSON list of {"role": …, "content": …}'
    )
    command.add_argument(
        "--chat", action="store_true", help="take prompts as questions, and write them in the model's chat format"
    )
    command.add_argument("--system", metavar="TEXT", help="with --chat: system text before each question")
    command.add_argument(
        "--ids",
        action="store_true",
        help="read prompts as token ids separated by spaces, and print token ids, instead of text",
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="generate at most N tokens per prompt; the default of this and of all sampling options is read from "
        "generation_config.json, or is 256 tokens and greedy without that file",
    )
    command.add_argument(
        "--greedy",
        action="store_true",
        help="always choose the most likely token, without a repetition penalty unless one is given",
    )
    command.add_argument(
        "--temperature", type=float, metavar="T", help="sample with temperature T; smaller is closer to greedy"
    )
    command.add_argument(
        "--top-k", type=count, metavar="K", help="sample from the K most likely tokens; 0 means from all"
    )
    command.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens that together have probability P",
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="with R above 1: make tokens less likely that were said already",
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="sample with seed N, so that every run gives the same text"
    )
    command.add_argument("--stream", action="store_true", help="print text as tokens come, not only at the end")
    command.add_argument(
        "--threads", type=positive, metavar="N", help="use N threads, for all ranks together (default: one per core)"
    )
    command.add_argument(
        "--capacity",
        type=positive,
        metavar="N",
        help="make room for N columns (prompt and new tokens) in the cache (default: as many as needed)",
    )
    command.add_argument(
        "--verify-weights",
        action="store_true",
        help="hash all weights again before they are used (default: only when a file is seen for the first time)",
    )
    command.add_argument(
        "--copy-weights",
        action="store_true",
        help="copy weights to memory instead of mapping the file; this is faster where the page cache lies on another "
        "NUMA node, as in some virtual machines, but other processes cannot share the copy",
    )
    command.add_argument("--json", action="store_true", help="print token ids, text and figures as JSON")


def main(options: argparse.Namespace) -> int:
    """Print the text that the model generates; errors in the prompts are reported before weights are loaded."""
    _check_sources(options)
    from passopt.api.generate import generate
    from passopt.terminal.console import Console, print_json

    console = Console(options.command)
    prompts = _prompts(options)
    writer = None if options.json or not options.stream else _Writer(len(prompts))
    result = generate(
        options.directory,
        prompts,
        threads=options.threads,
        verify_weights=options.verify_weights,
        copy_weights=options.copy_weights,
        on_text=writer.put if writer else None,
        on_end=writer.end if writer else None,
        reporter=console,
        max_new_tokens=options.max_new_tokens,
        greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        capacity=options.capacity,
    )
    if options.json:
        print_json(result.to_json(), ensure_ascii=False, indent=1)
    elif not writer:
        print(result)
    console.say(result.summary())
    return 0


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
        raise UsageError("--json prints one result at the end, so it cannot --stream; drop one of them")


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """Return one prompt per text: its ids, a conversation, or the text itself."""
    if options.messages:
        return [_messages(options.messages)]
    texts = _texts(options)
    if options.ids:
        return [_ids(text) for text in texts]
    if not options.chat:
        return list(texts)
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [[*system, {"role": "user", "content": text}] for text in texts]


def _texts(options: argparse.Namespace) -> list[str]:
    """Return one text per --prompt, one per line of --prompt-file, or all of stdin."""
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
    from pathlib import Path

    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _messages(path: str) -> Sequence[Any]:
    from passopt.generation.chat import Message
    from passopt.ir.json_text import parse_json

    text = _read(path)
    try:
        return [Message(entry["role"], entry["content"]) for entry in parse_json(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}: is no list of {{"role": …, "content": …}}: {error}') from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise UsageError(f"--ids: expected token ids separated by spaces: {error}") from error


class _Writer:
    """Print answers as their text comes.

    Prompts are answered at the same time but printed in order, so an answer waits until those before it have ended.
    """

    def __init__(self, rows: int) -> None:
        from passopt.api.generate_result import heading

        self._waiting = [heading(row, rows) for row in range(rows)]
        self._ended = [False] * rows
        self._turn = 0
        self._flush()

    def put(self, row: int, text: str) -> None:
        self._waiting[row] += text
        self._flush()

    def end(self, row: int) -> None:
        self._waiting[row] += "\n"
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
