"""Turn the documents of data sets into token ids: texts as they are, conversations in the model's chat format."""

from __future__ import annotations

from pathlib import Path

from passopt.frontends.calibration.text_files import Document
from passopt.generation.chat import Message, chat_ids
from passopt.generation.settings import read_settings
from passopt.generation.tokenizer import Tokenizer


class DocumentEncoder:
    """A function from a document to its token ids, without those that begin every text.

    Args:
        tokenizer: The tokenizer.
        folder: The folder of the tokenizer, in which the chat format lies.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder

    def __call__(self, document: Document) -> list[int]:
        if not document.messages:
            return self._tokenizer.encode_text(document.text)
        messages = [Message(role, content) for role, content in document.messages]
        return chat_ids(messages, self._folder, self._tokenizer, read_settings(self._folder), None)


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before every text, such as that of `<s>`."""
    probe = "a"
    whole, text = tokenizer.encode(probe), tokenizer.encode_text(probe)
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    return []
