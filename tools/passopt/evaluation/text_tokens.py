"""Turn a text, or a calibration set in one of its published formats, into token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import blake3
import numpy as np

from passopt.frontends.calibration.documents import Source
from passopt.generation.documents import DocumentEncoder, begin_ids
from passopt.generation.tokenizer import Tokenizer
from passopt.ir.errors import UsageError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The characters of a plain text that are read at first for each wanted token; where tokens are longer, more are read.
_CHARACTERS = 8


@dataclasses.dataclass(frozen=True)
class TextTokens:
    """The token ids of a text.

    Attributes:
        name: What reports call the text: the path of its file.
        ids: The token ids, int64.
        is_cut: Whether the text goes on after them.
    """

    name: str
    ids: Array
    is_cut: bool

    def digest(self) -> str:
        """Return the blake3 digest of the ids as little-endian int32."""
        return str(blake3.blake3(self.ids.astype("<i4").tobytes()).hexdigest())


@dataclasses.dataclass(frozen=True)
class TextReader:
    """A tokenizer with the ids that it puts before a text.

    Attributes:
        tokenizer: The tokenizer.
        folder: Where its chat template lies.
        begin: The ids that it begins every text with, such as that of `<s>`.
    """

    tokenizer: Tokenizer
    folder: Path
    begin: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path) -> TextReader:
        """Return the reader of a tokenizer, from which it learns what begins a text."""
        return cls(tokenizer, folder, tuple(begin_ids(tokenizer)))

    def read(self, source: Source, most: int, *, with_begin: bool) -> TextTokens:
        """Return at most `most` tokens from the beginning of a set.

        A plain text is one text, tokenised as a whole. Of other sets, every document is tokenised by itself, and they
        follow one another.

        Args:
            source: The file and its format.
            most: The number of tokens.
            with_begin: Whether the ids that begin a text for the model stand before every text.

        Raises:
            UsageError: If the set is empty.
            ModelError: If the file cannot be read, or is not of its format.
        """
        begin = self.begin if with_begin else ()
        if source.format == "text":
            ids, is_cut = self._plain(source, most, begin)
        else:
            ids, is_cut = self._documents(source, most, begin)
        if len(ids) <= len(begin):
            raise UsageError(f"{source.path}: holds no text")
        return TextTokens(str(source.path), ids, is_cut)

    def _plain(self, source: Source, most: int, begin: tuple[int, ...]) -> tuple[Array, bool]:
        """Return the tokens of one text; only as much of it is read as they need."""
        pieces = (document.text for document in source.documents())
        text, size = "", most * _CHARACTERS
        while True:
            more = list(_up_to(pieces, size - len(text)))
            text += "".join(more)
            ids = [*begin, *self.tokenizer.encode_text(text)]
            # The last tokens may change with what follows them, so a few more than wanted are read.
            if len(ids) > most + 16 or not more:
                return np.array(ids[:most], np.int64), len(ids) > most
            size *= 2

    def _documents(self, source: Source, most: int, begin: tuple[int, ...]) -> tuple[Array, bool]:
        ids: list[int] = []
        encode = DocumentEncoder(self.tokenizer, self.folder)
        for document in source.documents():
            ids += [*begin, *encode(document)]
            if len(ids) > most:
                return np.array(ids[:most], np.int64), True
        return np.array(ids, np.int64), False


def _up_to(pieces: Iterator[str], characters: int) -> Iterator[str]:
    """Yield pieces of a text until they have so many characters."""
    while characters > 0:
        piece = next(pieces, None)
        if piece is None:
            return
        yield piece
        characters -= len(piece)
