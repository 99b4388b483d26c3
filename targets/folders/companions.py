"""Find the tokenizer and configuration files that belong to a model."""

from __future__ import annotations

from pathlib import Path

#: Files that are copied from the model's source folder if they exist there. They are all that a tokenizer and a
#: runner need besides the model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def companions_in(folder: Path | None) -> list[Path]:
    """Return the paths of the tokenizer and configuration files in `folder`; none if `folder` is None."""
    if folder is None:
        return []
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]
