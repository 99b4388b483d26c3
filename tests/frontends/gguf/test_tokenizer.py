"""Tokenizers of GGUF files: the same tokens and texts as those of the tokenizers from which the metadata was made."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from passopt.frontends.gguf.pre_tokenizers import NAMES, pre_tokenizer_of
from passopt.frontends.gguf.tokenizer import UnknownTokenizer, write_tokenizer
from passopt.generation.chat import Message, chat_ids
from passopt.generation.settings import read_settings
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import ModelError

TEXTS = (
    "The quick brown fox jumped over 12345 lazy dogs; it's 3.14.",
    "  two spaces,\ttabs\n\n\nand lines \n of   them   ",
    "Größe, naïve café, 你好世界, 1٣²½, 🙂🙂 don't DON'T",
    "x = a[0] + $b ** 2 <= c^d | ~e",
    "",
    " ",
)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(pre: str, split: Any, controls: list[str], words: list[str]) -> tuple[dict[str, Any], Any]:
    """Return the metadata of a small vocabulary and the tokenizer that was trained for it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=controls,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS, "the lazy dogs jumped over the quick brown foxes and it's them"] * 3, trainer
    )
    tokenizer.add_tokens(words)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    kinds = [CONTROL if token in controls else USER_DEFINED if token in words else NORMAL for token in tokens]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": vocabulary[controls[0]],
        "eos_token_id": vocabulary[controls[1]],
    }
    return named(values), tokenizer


def named(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": TEMPLATE}


def own_split(name: str) -> Any:
    """Return the words rule as the models' published tokenizers have it, where it is in the library itself."""
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    rule = pre_tokenizer_of(name)
    assert rule is not None
    return rule.build()


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "qwen2", "llama-bpe", "tekken", "default", "deepseek-coder"])
def test_byte_level_tokens_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    metadata, original = byte_level(name, own_split(name), ["<|user|>", "<|end|>", "<|assistant|>"], ["<think>"])
    write_tokenizer(metadata, tmp_path, tmp_path / "m.gguf")
    found = load_tokenizer(tmp_path)
    for text in (*TEXTS, "<think>so<|end|> <|user|>"):
        expected = original.encode(text, add_special_tokens=False).ids
        assert found.encode_text(text) == expected
        assert found.decode(expected) == original.decode(expected)
    begin = [metadata["tokenizer.ggml.bos_token_id"]] if name in ("llama-bpe", "tekken") else []
    plain = original.encode("dogs", add_special_tokens=False).ids
    assert found.encode("dogs") == [*begin, *plain]
    # Programs that know nothing of passopt read the same.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("dogs")["input_ids"] == [*begin, *plain]
    assert theirs.eos_token == "<|end|>"
    assert theirs.apply_chat_template([{"role": "user", "content": "dogs"}], tokenize=False) == (
        "<|user|>dogs<|end|><|assistant|>"
    )


WORDS = {
    "smollm": ["It", "'s", " ", "1", "2", "3", "\n\n", " don", "'t", " ", " DON", "'", "T", "!?", "\n"],
    "gpt-2": ["It", "'s", " 123", "\n\n", " don", "'t", " ", " DON", "'", "T", "!?", "\n"],
    "llama-bpe": ["It", "'s", " ", "123", "\n\n", " don", "'t", " ", " DON", "'T", "!?\n"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "\n\n", " don", "'t", " ", " DON", "'T", "!?\n"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "\n\n", " don", "'t", " ", " DON", "'T", "!?\n"],
    "default": ["It", "'", "s", " ", "123", "\n\n", " don", "'", "t", " ", " DON", "'", "T", "!?", "\n"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_are_split_as_the_rule_says(name: str) -> None:
    text = "It's 123\n\n don't  DON'T!?\n"
    rule = pre_tokenizer_of(name)
    assert rule is not None
    assert [text[start:stop] for _, (start, stop) in rule.build().pre_tokenize_str(text)] == WORDS[name]


def test_every_rule_can_be_built() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        rule = pre_tokenizer_of(name)
        assert rule is not None
        rule.build()


def test_switches_of_the_metadata_win(tmp_path: Path) -> None:
    metadata, original = byte_level("llama-bpe", own_split("llama-bpe"), ["<s>", "</s>"], [])
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    write_tokenizer(metadata, tmp_path, tmp_path / "m.gguf")
    expected = [*original.encode("dogs").ids, original.token_to_id("</s>")]
    assert load_tokenizer(tmp_path).encode("dogs") == expected
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("dogs")["input_ids"] == expected


def test_a_word_that_is_a_token_is_not_merged(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "abc"]
    values = {"model": "gpt2", "tokens": tokens, "token_type": [NORMAL] * 5, "merges": ["a b"], "add_bos_token": False}
    for name, expected in (("llama-bpe", [4]), ("qwen2", [3, 2])):
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(named({**values, "pre": name}), folder, tmp_path / "m.gguf")
        assert load_tokenizer(folder).encode_text("abc") == expected


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Return a sentencepiece model as Llama's are: byte fallback, all spaces kept, texts unchanged."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(text for text in TEXTS if text.strip()), "the lazy dogs jumped over the foxes"] * 4),
        model_writer=data,
        model_type="bpe",
        vocab_size=390,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|user|>", "<|end|>", "<|assistant|>"],
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())


def metadata_of(model: Any) -> dict[str, Any]:
    ids = range(model.get_piece_size())

    def kind(index: int) -> int:
        tests = (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        )
        return next((number for test, number in tests if test(index)), NORMAL)

    kinds = [USER_DEFINED if model.id_to_piece(index) == "<think>" else kind(index) for index in ids]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(index) for index in ids],
        "scores": [model.get_score(index) for index in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return named(values)


def test_sentencepiece_tokens_are_those_of_the_original(pieces: Any, tmp_path: Path) -> None:
    write_tokenizer(metadata_of(pieces), tmp_path, tmp_path / "m.gguf")
    found = load_tokenizer(tmp_path)
    for text in (*TEXTS, "<think> so"):
        ids = pieces.encode(text)
        assert found.encode_text(text) == ids
        assert found.encode(text) == [1, *ids]
        assert found.decode(ids) == pieces.decode(ids)
    end = pieces.piece_to_id("<|end|>")
    assert found.encode_template("dogs<|end|>") == [*pieces.encode("dogs"), end]


def test_sentencepiece_without_a_space_before_texts(pieces: Any, tmp_path: Path) -> None:
    write_tokenizer(metadata_of(pieces) | {"tokenizer.ggml.add_space_prefix": False}, tmp_path, tmp_path / "m.gguf")
    first = load_tokenizer(tmp_path).encode_text("dogs")[0]
    assert not pieces.id_to_piece(first).startswith("▁")


def test_conversations_use_the_template_of_the_file(pieces: Any, tmp_path: Path) -> None:
    write_tokenizer(metadata_of(pieces), tmp_path, tmp_path / "m.gguf")
    found = load_tokenizer(tmp_path)
    ids = chat_ids([Message("user", "dogs")], tmp_path, found, read_settings(tmp_path), None)
    assert [pieces.id_to_piece(index) for index in (ids[0], ids[-1])] == ["<|user|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "the kind 'bert'"),
        ({"model": "gpt2", "pre": "falcon-h9"}, "splits words by the rule 'falcon-h9'"),
        ({"model": "gpt2", "pre": None}, "splits words by the rule None"),
        ({"tokens": None}, "no tokenizer"),
    ],
)
def test_other_tokenizers_are_named(changes: dict[str, Any], message: str, pieces: Any, tmp_path: Path) -> None:
    metadata = metadata_of(pieces) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(UnknownTokenizer, match=message):
        write_tokenizer(metadata, tmp_path, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["chat_template.jinja"]


def test_odd_values_end_in_a_tokenizer_or_in_a_message(pieces: Any, tmp_path: Path) -> None:
    odd = (None, "x", -1, 0, 1, 2.5, [], [1], ["a"], [None], True, [[1]], ["a b"])
    for metadata in (metadata_of(pieces), byte_level("gpt-2", own_split("gpt-2"), ["<s>", "</s>"], [])[0]):
        for key in metadata:
            for value in odd:
                try:
                    write_tokenizer({**metadata, key: value}, tmp_path, tmp_path / "m.gguf")
                except (ModelError, UnknownTokenizer):
                    continue


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5]}, "390 tokens, and 1 entries in tokenizer.ggml.scores"),
        ({"eos_token_id": 390}, "eos_token_id is 390, and there are 390 tokens"),
        ({"scores": None}, "its tokenizer is damaged: it has no scores"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["x y"]}, "its tokenizer is damaged"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["x"]}, "its tokenizer is damaged"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": ["a"] * 390}, "389 tokens occur twice"),
    ],
)
def test_damaged_tokenizers_are_refused(changes: dict[str, Any], message: str, pieces: Any, tmp_path: Path) -> None:
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in (metadata_of(pieces) | changed).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        write_tokenizer(metadata, tmp_path, tmp_path / "m.gguf")
