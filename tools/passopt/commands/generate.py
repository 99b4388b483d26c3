"""Continue prompts by a compiled model: `passopt generate DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passopt.ir.errors import UsageError
from passopt.terminal.arguments import count, positive

if TYPE_CHECKING:
    from passopt.api.generate import Prompt

SUMMARY = "Continue prompts by a compiled model. Text on stdout; tokens/s, time to first token and memory on stderr."
EXAMPLE = """passopt generate baichuan2.lib --prompt 'The lexical structure of' --max-new-tokens 64 --stream
  passopt generate baichuan2.lib --chat --prompt 'What is a compiler?' --temperature 0.3 --seed 1
  passopt generate baichuan2.lib --prompt-file questions.txt --chat --greedy --json
  echo '5 17 203' | passopt generate baichuan2.lib --ids"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to its parser."""
    command.add_argument("directory", metavar="DIR", help="what passopt compile has written")
    command.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated (default: stdin)")
    command.add_argument("--prompt-file", metavar="FILE", help="one prompt per line")
    command.add_argument("--messages", metavar="FILE", help='a conversation: JSON list of {"role": …, "content": …}')
    command.add_argument("--chat", action="store_true", help="prompts are questions, in the model's chat format")
    command.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    command.add_argument(
        "--ids", action="store_true", help="token ids, separated by spaces, instead of text: in and out"
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="default: generation_config.json's, as for all of sampling; without one 256, greedy",
    )
    command.add_argument(
        "--greedy", action="store_true", help="always the most likely token; no penalty unless you ask for one"
    )
    command.add_argument("--temperature", type=float, metavar="T", help="sample; smaller is closer to greedy")
    command.add_argument("--top-k", type=count, metavar="K", help="sample from the K most likely tokens; 0: all")
    command.add_argument("--top-p", type=float, metavar="P", help="sample from those that together have probability P")
    command.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: less of what was said already")
    command.add_argument("--seed", type=int, metavar="N", help="sample, the same every time")
    command.add_argument("--stream", action="store_true", help="print while tokens come")
    command.add_argument("--threads", type=positive, metavar="N", help="default: the cores of this machine")
    command.add_argument("--capacity", type=positive, metavar="N", help="columns of the cache (default: as needed)")
    command.add_argument(
        "--verify-weights", action="store_true", help="hash all weights again (default: once per file)"
    )
    command.add_argument(
        "--copy-weights",
        action="store_true",
        help="copy weights to memory, instead of mapping the file: faster where the page cache lies on another NUMA "
        "node, as in some virtual machines, but shared with no other process",
    )
    command.add_argument("--json", action="store_true", help="print ids, text and figures as JSON")


def main(options: argparse.Namespace) -> int:
    """Print what the model writes. Whatever is wrong with the prompts is told before weights are loaded."""
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
        raise UsageError("--json prints when all is known: it cannot --stream")


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """One prompt per text: ids, a conversation, or the text itself."""
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
    """One prompt per --prompt, one per line of --prompt-file, or all of stdin."""
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
    import json

    from passopt.generation.chat import Message

    text = _read(path)
    try:
        return [Message(entry["role"], entry["content"]) for entry in json.loads(text)]
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
    """Prints as text comes. Prompts are answered at once but printed in order: others wait until it is their turn."""

    def __init__(self, rows: int) -> None:
        from passopt.api.generate import heading

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
