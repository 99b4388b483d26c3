"""A tiny decoder with a tokenizer of single letters beside it, as a folder; and what it says, run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import passopt
from passopt.targets.onnxruntime.session import Session
from passopt.testing import DecoderSpec, tiny_decoder
from passopt.verification.sampling.cache_inputs import empty_cache

#: Every letter of a text is a token; the decoder has 34.
LETTERS = "\n ABCDabcdefghijklmnopqrstuvwxyz"
WORDS = "the model reads a text and then it says how likely each of the letters was given those before it\n"

Array = np.ndarray


def save_tokenizer(folder: Path, *, begin: bool = False, letters: str = LETTERS) -> None:
    """Write a tokenizer.json; with `begin`, its post-processor puts <s> before a text."""
    vocab = {letter: index + 2 for index, letter in enumerate(letters)} | {"<unk>": 0, "<s>": 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    if begin:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def save_decoder(folder: Path, *, seed: int = 0, begin: bool = False, **spec: Any) -> Path:
    """Write a model folder."""
    checkpoint = folder.parent / f"{folder.name}.safetensors"
    passopt.save(tiny_decoder(DecoderSpec(**spec), seed=seed, checkpoint=checkpoint), folder)
    save_tokenizer(folder, begin=begin)
    return folder


class Lab:
    """A folder with the models `one`, `other` with other weights, and `int8` made of `one`; and `text.txt`.

    Its methods write more models, encode texts, and run a model at once without any of our loops.
    """

    words = WORDS
    save_decoder = staticmethod(save_decoder)
    save_tokenizer = staticmethod(save_tokenizer)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = root / "text.txt"
        self.one, self.other, self.int8 = (root / name for name in ("one", "other", "int8"))
        self._sessions: dict[Path, tuple[Session, Any]] = {}

    @staticmethod
    def encode(text: str) -> list[int]:
        """Return the ids of a text."""
        return [LETTERS.index(letter) + 2 for letter in text]

    def log_probabilities(self, folder: Path, ids: list[int]) -> Array:
        """Return the log-probabilities [tokens, vocab] after each of the ids."""
        if folder not in self._sessions:
            model = passopt.load(folder).ir
            self._sessions[folder] = Session(model), empty_cache(model)
        session, empty = self._sessions[folder]
        tokens = np.array([ids], np.int64)
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids))[None],
            **empty,
        }
        logits = session.run(feeds)["logits"][0].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    found = Lab(tmp_path_factory.mktemp("models"))
    save_decoder(found.one)
    save_decoder(found.other, seed=7)
    passopt.run(found.one, "int8", found.int8)
    found.text.write_text(WORDS * 6, encoding="utf-8")
    return found
