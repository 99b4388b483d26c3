"""Turn conversations into token ids, in Baichuan's format of role tokens or by the model's own chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from passopt.generation.added_tokens import CONFIG_NAME, MAP_NAME
from passopt.generation.settings import Settings, read_json
from passopt.generation.tokenizer import Tokenizer, token_text
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.json_text import check_kind

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TEMPLATE_NAME = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation; `role` is system, user or assistant.

    Raises:
        UsageError: If the role is unknown, the content is not text, or a message of the user is blank.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in (SYSTEM, USER, ASSISTANT):
            raise UsageError(f"a message has the role {self.role!r}, expected {SYSTEM}, {USER} or {ASSISTANT}")
        if not isinstance(self.content, str):
            found = type(self.content).__name__
            raise UsageError(f"a message of the {self.role} has content of type {found}, expected text")
        if self.role == USER and not self.content.strip():
            raise UsageError("a message of the user is empty: there is nothing to answer")


def chat_ids(
    messages: Sequence[Message], folder: Path, tokenizer: Tokenizer, settings: Settings, room: int | None
) -> list[int]:
    """Return the prompt that lets the assistant answer, in the format of the model in `folder`.

    Args:
        messages: The conversation.
        folder: The folder of the compiled model.
        tokenizer: The tokenizer of the model.
        settings: The settings of the model, which hold the role tokens of Baichuan's format.
        room: The largest number of tokens that the prompt may have; None for no limit. Only Baichuan's format says what
            to leave out, so a prompt of a chat template may still be longer.

    Raises:
        ModelError: If the model has no chat format, or if its template fails.
        UsageError: If the conversation has no message of a user, has a system message that is not the first, or does
            not fit; also if the template needs jinja2 and that is not installed.
    """
    _check(messages)
    if settings.user is not None and settings.assistant is not None:
        return baichuan_ids(messages, tokenizer.encode, user=settings.user, assistant=settings.assistant, room=room)
    return tokenizer.encode_template(_rendered(messages, folder))


def _check(messages: Sequence[Message]) -> None:
    if not any(message.role == USER for message in messages):
        raise UsageError("the conversation has no message of a user")
    for index, message in enumerate(messages):
        if index and message.role == SYSTEM:
            raise UsageError(f"message {index} is of the system; only the first one may be")


def baichuan_ids(
    messages: Sequence[Message],
    encode: Callable[[str], list[int]],
    *,
    user: int,
    assistant: int,
    room: int | None = None,
) -> list[int]:
    """Return the token ids of a conversation in Baichuan's format.

    They are the system text, then every message after the token of its role, then the token that begins the answer. A
    round begins with each message of the user. Only the newest rounds that fit in `room` beside the system text are
    kept, each of them whole.

    Args:
        messages: The conversation.
        encode: A function from text to token ids.
        user: The token that begins a message of the user.
        assistant: The token that begins a message of the assistant.
        room: The largest number of tokens; None for no limit.

    Raises:
        UsageError: If the last round does not fit.
    """
    if room is not None and room < 1:
        raise UsageError(
            "no room for a prompt beside the new tokens: ask for fewer of them, or for a larger `capacity`"
        )
    first = encode(messages[0].content) if messages[0].role == SYSTEM else []
    answers = messages[-1].role != ASSISTANT
    budget = None if room is None else room - len(first)
    history: list[int] = []
    for turns in reversed(_rounds(messages)):
        ids = [index for turn in turns for index in (user if turn.role == USER else assistant, *encode(turn.content))]
        if history and budget is not None and len(ids) + len(history) > budget:
            break
        if not history and room is not None and (needed := len(first) + len(ids) + answers) > room:
            raise UsageError(
                f"the last message takes {needed} tokens with the system text, and there is room for {room} beside "
                f"the new ones. Shorten it, or ask for fewer new tokens."
            )
        history = ids + history
        if budget is not None and len(history) >= budget:
            break
    ids = first + history
    if answers:
        ids.append(assistant)
    return ids if room is None else ids[-room:]


def _rounds(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the messages in rounds, each of which begins with a message of the user; system messages are left out."""
    rounds: list[list[Message]] = []
    for message in messages:
        if message.role == SYSTEM:
            continue
        if message.role == USER or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return rounds


def _rendered(messages: Sequence[Message], folder: Path) -> str:
    """Return the conversation as text, rendered by the model's chat template."""
    config = read_json(folder / CONFIG_NAME)
    source = _template(folder, config)
    try:
        import jinja2
        import jinja2.sandbox
    except ModuleNotFoundError as error:
        raise UsageError(
            "this model's chat template needs jinja2: pip install jinja2, or prompt without chat"
        ) from error

    def complain(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = complain
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = {**read_json(folder / MAP_NAME), **{role: value for role, value in config.items() if value is not None}}
    tokens = {role: text for role in roles if (text := token_text(named, role)) is not None}
    answer = messages[-1].role != ASSISTANT
    try:
        template = environment.from_string(source)
        turns = [dataclasses.asdict(message) for message in messages]
        return template.render(messages=turns, add_generation_prompt=answer, **tokens)
    except jinja2.TemplateError as error:
        raise ModelError(f"{folder}: its chat template fails: {error}") from error
    except Exception as error:  # the template is code of the model's author, which may do anything wrong
        raise ModelError(f"{folder}: its chat template fails with {type(error).__name__}: {error}") from error


def _template(folder: Path, config: dict[str, Any]) -> str:
    beside = folder / TEMPLATE_NAME
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{beside}: cannot be read as UTF-8 text: {error}") from error
    found, where = config.get("chat_template"), f"{folder / CONFIG_NAME}: chat_template"
    if isinstance(found, list):  # several templates with names
        for entry in found:
            check_kind(entry, "an object", f"an entry of {where}")
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None:
        check_kind(found, "a text", where)
    if not isinstance(found, str):
        raise ModelError(
            f"{folder}: has no chat format: generation_config.json names no user_token_id and assistant_token_id, "
            f"{CONFIG_NAME} has no chat_template. Prompt without `chat`."
        )
    return found
