"""Turn text into token ids and back, by tokenizer.json (tokenizers) or tokenizer.model (sentencepiece).

Text never becomes a control token of a sentencepiece model: `</s>` in a prompt is four characters, unless the model's
chat template wrote it. Tokens that a checkpoint adds to the vocabulary are found in every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from passopt.generation.added_tokens import CONFIG_NAME, AddedToken, read_added_tokens, runs, split_at
from passopt.generation.settings import read_json
from passopt.ir.errors import ModelError
from passopt.ir.json_text import stated

FAST_NAME = "tokenizer.json"
MODEL_NAME = "tokenizer.model"
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
        for switch in ("add_bos_token", "add_eos_token"):
            stated(config, switch, "true or false", str(path.parent / CONFIG_NAME))
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
    """A tokenizer from tokenizer.model, by the library sentencepiece, with the tokens that files beside it add."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path}: is not a sentencepiece model: {error}") from error
        self._size = int(self._model.get_piece_size())
        self._begin = [self._model.bos_id()] if config.get("add_bos_token", True) else []
        self._end = [self._model.eos_id()] if config.get("add_eos_token", False) else []
        controls = [index for index in range(self._size) if self._model.is_control(index)]
        self._controls = [AddedToken(self._model.id_to_piece(index), index, special=True) for index in controls]
        hidden = {*controls, self._model.unk_id()}
        self._added = [token for token in read_added_tokens(path.parent, self._known) if token.index not in hidden]
        for token in self._added:
            if token.index < self._size and self._model.id_to_piece(token.index) != token.content:
                piece = self._model.id_to_piece(token.index)
                raise ModelError(f"{path}: token {token.index} is {piece!r}, and files beside it add {token.content!r}")
        self._by_index = {token.index: token for token in self._added}

    def _known(self, text: str) -> int | None:
        index = int(self._model.piece_to_id(text))
        return index if self._model.id_to_piece(index) == text else None

    def encode(self, text: str) -> list[int]:
        return [*self._begin, *self.encode_text(text), *self._end]

    def encode_text(self, text: str) -> list[int]:
        return self._encode(text, self._added)

    def encode_template(self, text: str) -> list[int]:
        return self._encode(text, [*self._added, *self._controls])

    def _encode(self, text: str, tokens: Sequence[AddedToken]) -> list[int]:
        ids: list[int] = []
        for part in split_at(text, tokens):
            ids += [part.index] if isinstance(part, AddedToken) else map(int, self._model.encode(part))
        return ids

    def _is_special(self, index: int) -> bool:
        """Return whether an id is a special token, or only pads the vocabulary."""
        added = self._by_index.get(index)
        return added.special if added is not None else not 0 <= index < self._size

    def decode(self, ids: Sequence[int]) -> str:
        # Special tokens are left out first: the text on both sides of one is joined as if it were not there.
        kept = [int(index) for index in ids if not self._is_special(int(index))]
        texts = [
            run.content if isinstance(run, AddedToken) else str(self._model.decode(run))
            for run in runs(kept, self._by_index)
        ]
        return "".join(texts)


class _Fast:
    """A tokenizer from tokenizer.json, by the library tokenizers."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ModelError(f"{path}: is not a tokenizer: {error}") from error
        self._add_tokens(path)
        self._template = "add_bos_token" not in config
        self._begin = self._special(path, config, "bos_token") if config.get("add_bos_token") else []
        self._end = self._special(path, config, "eos_token") if config.get("add_eos_token") else []

    def _add_tokens(self, path: Path) -> None:
        """Add the tokens that files beside tokenizer.json name and it lacks, where they get the ids stated there."""
        import tokenizers

        added = read_added_tokens(path.parent, self._model.token_to_id)
        for token in sorted(added, key=lambda token: token.index):
            if self._model.token_to_id(token.content) is None and token.index == self._model.get_vocab_size():
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                entry = tokenizers.AddedToken(token.content, normalized=False, special=token.special, **flags)
                (self._model.add_special_tokens if token.special else self._model.add_tokens)([entry])

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
        known = [int(index) for index in ids if index >= 0 and self._model.id_to_token(int(index)) is not None]
        return str(self._model.decode(known, skip_special_tokens=True))


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
