"""Write the tokenizer in a GGUF file's metadata in the files of Hugging Face checkpoints.

A vocabulary of byte-level BPE becomes tokenizer.json. One of sentencepiece becomes tokenizer.model, for which the
metadata holds everything: pieces, scores and kinds.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.frontends.gguf.pre_tokenizers import pre_tokenizer_of
from passopt.ir.errors import ModelError

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
#: Special tokens by their names in tokenizer_config.json.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
#: Kinds of tokens, which are those of sentencepiece.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class UnknownTokenizer(Exception):
    """The tokenizer is of a kind that cannot be written; the message says which, and what is supported."""


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, where: Path) -> None:
    """Write the tokenizer, its configuration and the chat template into a folder.

    Args:
        metadata: The metadata of the file.
        folder: The folder.
        where: The file, for messages.

    Raises:
        UnknownTokenizer: If it is of a kind that is not supported; then only the chat template was written.
        ModelError: If its parts do not fit together.
    """
    template = metadata.get(_TEMPLATE)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    values = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    kind, tokens = values.get("model"), values.get("tokens")
    write = {"gpt2": _write_byte_level, "llama": _write_sentencepiece}.get(str(kind))
    if write is None or not tokens:
        raise UnknownTokenizer(f"the tokenizer is of the kind {kind!r}" if tokens else "the file holds no tokenizer")
    _check(values, where)
    try:
        switches = write(values, folder)
    except UnknownTokenizer:
        raise
    except Exception as error:  # The libraries raise errors of their own, and of any kind.
        raise ModelError(f"{where}: its tokenizer is damaged: {error}") from error
    names = {role: _token(values, own) for role, own in _ROLES.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        **switches,
        **{role: token for role, token in names.items() if token is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check(values: Mapping[str, Any], where: Path) -> None:
    tokens = values["tokens"]
    for name in ("tokens", "token_type", "scores", "merges"):
        if name in values and not isinstance(values[name], list):
            raise ModelError(f"{where}: {_PREFIX}{name} is {values[name]!r}, expected a list")
    for name in ("token_type", "scores"):
        if name in values and len(values[name]) != len(tokens):
            raise ModelError(f"{where}: has {len(tokens)} tokens, and {len(values[name])} entries in {_PREFIX}{name}")
    for key, value in values.items():
        if key.endswith("_token_id") and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise ModelError(f"{where}: {_PREFIX}{key} is {value!r}, and there are {len(tokens)} tokens")


def _token(values: Mapping[str, Any], role: str) -> str | None:
    index = values.get(f"{role}_token_id")
    return None if index is None else values["tokens"][index]


def _write_byte_level(values: Mapping[str, Any], folder: Path) -> dict[str, bool]:
    """Write tokenizer.json; return whether a text begins and ends with the tokens for that."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    split = pre_tokenizer_of(values.get("pre"))
    if split is None:
        raise UnknownTokenizer(f"the tokenizer splits words by the rule {values.get('pre')!r}")
    tokens = values["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} tokens occur twice")
    # No token begins with a space, so the first one behind the first character separates.
    merges = [(merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]) for merge in values["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.ignore_merges))
    tokenizer.pre_tokenizer = split.build()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, values.get("token_type") or [], strict=False))
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in kinds
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    switches = {
        "add_bos_token": bool(values.get("add_bos_token", split.adds_bos)),
        "add_eos_token": bool(values.get("add_eos_token", False)),
    }
    _add_ends(tokenizer, values, switches)
    tokenizer.save(str(folder / "tokenizer.json"))
    return switches


def _add_ends(tokenizer: Any, values: Mapping[str, Any], switches: Mapping[str, bool]) -> None:
    """Let the tokenizer add the tokens of begin and end, for programs that do not read the switches."""
    from tokenizers import processors

    ends = {role: _token(values, role) for role in ("bos", "eos") if switches[f"add_{role}_token"]}
    if missing := [role for role, token in ends.items() if token is None]:
        raise ValueError(f"it is to add {missing[0]}_token, which has no id")
    if not ends:
        return
    names = [ends.get("bos"), "$A", ends.get("eos")]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=[name for name in names if name],
                special_tokens=[(token, values[f"{role}_token_id"]) for role, token in ends.items()],
            ),
        ]
    )


def _write_sentencepiece(values: Mapping[str, Any], folder: Path) -> dict[str, bool]:
    """Write tokenizer.model; return whether a text begins and ends with the tokens for that."""
    # The classes of this module are made when it is imported, so type checkers do not know them.
    pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    tokens, scores = values["tokens"], values.get("scores")
    kinds = values.get("token_type")
    if scores is None or kinds is None:
        raise ValueError("it has no scores, or no kinds of tokens")
    model = pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = 6 in kinds
    unknown = values.get("unknown_token_id", kinds.index(_UNKNOWN) if _UNKNOWN in kinds else 0)
    for role, index in (("unk", unknown), ("bos", values.get("bos_token_id")), ("eos", values.get("eos_token_id"))):
        if index is not None:
            setattr(trainer, f"{role}_id", index)
            setattr(trainer, f"{role}_piece", tokens[index])
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(values.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    data = model.SerializeToString()
    _check_sentencepiece(data)
    (folder / "tokenizer.model").write_bytes(data)
    return {
        "add_bos_token": bool(values.get("add_bos_token", True)),
        "add_eos_token": bool(values.get("add_eos_token", False)),
        "add_prefix_space": normalizer.add_dummy_prefix,
        "legacy": True,
    }


def _check_sentencepiece(data: bytes) -> None:
    import sentencepiece

    sentencepiece.SentencePieceProcessor(model_proto=data)
