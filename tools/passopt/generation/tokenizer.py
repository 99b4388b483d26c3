"""Turn text into token ids and back, by tokenizer.json (tokenizers) or tokenizer.model (sentencepiece).

Text never becomes a control token: `</s>` in a prompt is four characters, unless the model's chat template wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from passopt.generation.settings import read_json
from passopt.ir.errors import ModelError

FAST_NAME = "tokenizer.json"
MODEL_NAME = "tokenizer.model"
CONFIG_NAME = "tokenizer_config.json"
#: The character that decoders write for bytes that are not valid UTF-8, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: The largest number of bytes of an unfinished character.
_UNFINISHED = 3


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, with the begin and end tokens that the model's configuration asks for."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text alone, as of a part of a longer text."""

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of what a chat template wrote: control tokens are recognised, and none is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without control tokens and ids that only pad the vocabulary."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in the folder `path`, or in the file `path`.

    Raises:
        ModelError: If there is no tokenizer, or if it is damaged.
    """
    if path.is_file():
        config = read_json(path.parent / CONFIG_NAME)
        return _Fast(path, config) if path.suffix == Path(FAST_NAME).suffix else _SentencePiece(path, config)
    for name in (FAST_NAME, MODEL_NAME):
        if (path / name).is_file():
            return load_tokenizer(path / name)
    raise ModelError(
        f"{path}: no tokenizer, neither {MODEL_NAME} nor {FAST_NAME}. Put one there; generate takes token ids as well "
        f"(`ids`), verify one from elsewhere (`tokenizer`)."
    )


def token_text(config: dict[str, Any], role: str) -> str | None:
    """Return the text of a special token such as `bos_token`, which files write as a string or as an object.

    The result is None if the configuration does not name that token.
    """
    entry = config.get(role)
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


class _SentencePiece:
    """A tokenizer from tokenizer.model, by the library sentencepiece."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path}: is not a sentencepiece model: {error}") from error
        self._size = int(self._model.get_piece_size())
        self._begin = [self._model.bos_id()] if config.get("add_bos_token", True) else []
        self._end = [self._model.eos_id()] if config.get("add_eos_token", False) else []

    def encode(self, text: str) -> list[int]:
        return [*self._begin, *self.encode_text(text), *self._end]

    def encode_text(self, text: str) -> list[int]:
        return [int(index) for index in self._model.encode(text)]

    def encode_template(self, text: str) -> list[int]:
        pieces = [self._model.id_to_piece(index) for index in range(self._size) if self._model.is_control(index)]
        ids: list[int] = []
        for control, part in _split(text, pieces):
            ids += [self._model.piece_to_id(part)] if control else self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(index) for index in ids if 0 <= index < self._size]))


def _split(text: str, words: Sequence[str]) -> list[tuple[bool, str]]:
    """Return the parts of `text` in order, each with whether it is one of `words`; empty parts are left out."""
    if not words:
        return [(False, text)] if text else []
    parts = re.split("(" + "|".join(map(re.escape, words)) + ")", text)
    return [(index % 2 == 1, part) for index, part in enumerate(parts) if part]


class _Fast:
    """A tokenizer from tokenizer.json, by the library tokenizers."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ModelError(f"{path}: is not a tokenizer: {error}") from error
        self._template = "add_bos_token" not in config
        self._begin = self._special(path, config, "bos_token") if config.get("add_bos_token") else []
        self._end = self._special(path, config, "eos_token") if config.get("add_eos_token") else []

    def _special(self, path: Path, config: dict[str, Any], role: str) -> list[int]:
        text = token_text(config, role)
        index = None if text is None else self._model.token_to_id(text)
        if index is None:
            raise ModelError(f"{path}: {CONFIG_NAME} adds {role}, which is {text!r}: not in the vocabulary")
        return [index]

    def encode(self, text: str) -> list[int]:
        # Without the two switches of older configurations, the file's own post-processor knows what to add.
        found: list[int] = self._model.encode(text, add_special_tokens=self._template).ids
        return [*self._begin, *found, *self._end]

    def encode_text(self, text: str) -> list[int]:
        found: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return found

    def encode_template(self, text: str) -> list[int]:
        return self.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.get_vocab_size()
        return str(self._model.decode([int(index) for index in ids if 0 <= index < size], skip_special_tokens=True))


class TextStream:
    """Give the text of tokens as they arrive.

    Only whole characters are given, and in total they are the same text as that of all tokens decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        #: The tokens that are decoded again with every new one, because the text of a token depends on those before it.
        #: `_given` counts the characters of their text that were already given.
        self._window: list[int] = []
        self._given = 0

    def put(self, token: int) -> str:
        """Return the new text that is complete with `token`; usually it is all the text of this token."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = len(text.rstrip(_REPLACEMENT))
        # An unfinished character is at most three bytes long, so all text before these will not change any more.
        new = self._advance(text, max(whole, len(text) - _UNFINISHED))
        alone = self._tokenizer.decode([token])
        if whole == len(text) and alone and _REPLACEMENT not in alone:
            self._window, self._given = [token], len(alone)
        return new

    def end(self) -> str:
        """Return the rest of the text: bytes that never became a character."""
        text = self._tokenizer.decode(self._window)
        return self._advance(text, len(text))

    def _advance(self, text: str, stop: int) -> str:
        new = text[self._given : stop]
        self._given = max(self._given, stop)
        return new
