"""Find the tokenizer and configuration files that go along with a model."""

from __future__ import annotations

from pathlib import Path

#: Copied from the model's source, where they exist: all that a tokenizer and a runner need besides the model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def companions_in(folder: Path | None) -> list[Path]:
    """The tokenizer and configuration files that lie in `folder`."""
    if folder is None:
        return []
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]
