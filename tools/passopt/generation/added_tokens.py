"""Read the tokens that a checkpoint adds beside its vocabulary, and find them in text.

They are in tokenizer_config.json (`added_tokens_decoder`), in added_tokens.json or, as mere texts of tokens that the
vocabulary has, in special_tokens_map.json.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from passopt.generation.settings import read_json
from passopt.ir.errors import ModelError
from passopt.ir.json_text import check_kind, shown, stated

ADDED_NAME = "added_tokens.json"
MAP_NAME = "special_tokens_map.json"
CONFIG_NAME = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in text as a whole.

    Attributes:
        content: The text.
        index: The token id.
        special: The token controls the model, and is no text when it is generated.
        lstrip: The token takes white space before it with it.
        rstrip: The token takes white space behind it with it.
        single_word: The token is found only where no letter or digit is next to it.
    """

    content: str
    index: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        """Return the regular expression that finds the token, with the text in a group."""
        before = (r"\s*" if self.lstrip else "") + (r"(?<!\w)" if self.single_word else "")
        behind = (r"(?!\w)" if self.single_word else "") + (r"\s*" if self.rstrip else "")
        return f"{before}({re.escape(self.content)}){behind}"


def read_added_tokens(folder: Path, known: Callable[[str], int | None]) -> list[AddedToken]:
    """Return the tokens that the files in `folder` add to a vocabulary.

    Args:
        folder: The folder of the tokenizer.
        known: A function from text to the id of the token with this text in the vocabulary, or None.

    Raises:
        ModelError: If a file is damaged, or if two tokens have one text or one id.
    """
    config, roles = read_json(folder / CONFIG_NAME), read_json(folder / MAP_NAME)
    places = ((config, folder / CONFIG_NAME), (roles, folder / MAP_NAME))
    special = {text for place, path in places for text in _special_texts(place, path)}
    found: dict[str, AddedToken] = {}
    decoder = stated(config, "added_tokens_decoder", "an object", str(folder / CONFIG_NAME))
    for index, entry in (decoder or {}).items():
        _add(found, _decoded(folder / CONFIG_NAME, index, entry))
    for content, index in read_json(folder / ADDED_NAME).items():
        check_kind(index, "a token id", f"{folder / ADDED_NAME}: the id of {content!r}")
        if content not in found:  # What tokenizer_config.json says goes before this file of older versions.
            _add(found, AddedToken(content, index, special=content in special))
    for content in sorted(special - found.keys()):
        index = known(content)
        if index is not None:
            _add(found, AddedToken(content, index, special=True))
    return list(found.values())


def _decoded(path: Path, index: str, entry: Any) -> AddedToken:
    # Python also takes the digits of other scripts for numbers, and takes a superscript for a digit.
    if not re.fullmatch("[0-9]{1,10}", index):
        raise ModelError(f"{path}: added_tokens_decoder has the key {shown(index)}, expected a token id")
    check_kind(int(index), "a token id", f"{path}: the key {index} of added_tokens_decoder")
    where = f"{path}: added_tokens_decoder[{index}]"
    check_kind(entry, "an object", where)
    check_kind(entry.get("content"), "a text", f"{where}: content")
    flags = ("special", "lstrip", "rstrip", "single_word")
    return AddedToken(
        entry["content"], int(index), **{flag: bool(stated(entry, flag, "true or false", where)) for flag in flags}
    )


def _add(found: dict[str, AddedToken], token: AddedToken) -> None:
    other = next((one for one in found.values() if token.index == one.index or token.content == one.content), None)
    if other is not None:
        raise ModelError(
            f"the tokenizer adds {token.content!r} as {token.index} and {other.content!r} as {other.index}; "
            f"{CONFIG_NAME}, {ADDED_NAME} and {MAP_NAME} are of different models"
        )
    if token.content:
        found[token.content] = token


def _special_texts(place: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yield the texts of the special tokens of a file, each a text, or an object with its content."""
    entries: list[tuple[str, Any]] = [(role, place.get(role)) for role in _ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = place.get(key)
        if more is not None and not isinstance(more, list | dict):
            raise ModelError(f"{path}: {key} is {shown(more)}, expected a list or an object of tokens")
        entries += [(key, entry) for entry in (more.values() if isinstance(more, dict) else more or [])]
    for key, entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is not None:
            check_kind(text, "a text", f"{path}: {key}")
        if text:
            yield text


def split_at(text: str, tokens: Iterable[AddedToken]) -> list[AddedToken | str]:
    """Return the tokens in `text` and the parts between them, in order; of two that begin together, the longer one."""
    ordered = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    if not ordered:
        return [text] if text else []
    found: list[AddedToken | str] = []
    end = 0
    for match in re.finditer("|".join(token.pattern for token in ordered), text):
        found += [text[end : match.start()], ordered[(match.lastindex or 1) - 1]]
        end = match.end()
    return [part for part in (*found, text[end:]) if part]


def runs(ids: Sequence[int], added: Mapping[int, AddedToken]) -> Iterator[AddedToken | list[int]]:
    """Yield the added tokens among `ids`, and the runs of other ids between them, in order."""
    run: list[int] = []
    for index in ids:
        if index not in added:
            run.append(index)
            continue
        if run:
            yield run
        yield added[index]
        run = []
    if run:
        yield run
