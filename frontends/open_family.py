"""Choose the family of a checkpoint, by its config.json alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.family import Family
from passopt.frontends.options import MODEL_TYPES, ExportOptions
from passopt.frontends.remote_code import named_class, stock_classes
from passopt.ir.errors import ModelError


def is_remote(checkpoint: Checkpoint) -> bool:
    """Return True if only Python files of the checkpoint define the model, and no class of transformers does."""
    return checkpoint.config.get("model_type") not in MODEL_TYPES


def passed_over(checkpoint: Checkpoint, *, trust_remote_code: bool) -> str | None:
    """Return one line about the checkpoint's own class if it is left alone for transformers' class of the same name.

    Raises:
        ModelError: If the two have different names, so that nothing says that they compute the same.
    """
    own = named_class(checkpoint)
    if is_remote(checkpoint) or own is None or trust_remote_code:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = checkpoint.config["model_type"]
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    if own.rpartition(".")[2] != stock:
        raise ModelError(
            f"{checkpoint.directory}: config.json names its own class {own}, whose code would run on this machine. "
            f"Read it, then pass `trust_remote_code=True`; or remove auto_map from config.json to export transformers' "
            f"{stock} for {model_type}, which may compute something else."
        )
    return (
        f"config.json names its own class {own}: it is left alone, and transformers' {stock} is exported; "
        f"`trust_remote_code=True` exports its own"
    )


@contextlib.contextmanager
def open_family(checkpoint: Checkpoint, options: ExportOptions) -> Iterator[Family]:
    """Yield the checkpoint's family, whose classes can be imported within the block.

    The checkpoint's own class goes before transformers' class, and runs only with consent.

    Raises:
        ModelError: If the checkpoint is of no known family, or without consent to run its code.
        UsageError: If the family does not have one of the options.
    """
    passed_over(checkpoint, trust_remote_code=options.trust_remote_code)
    if not is_remote(checkpoint) and (named_class(checkpoint) is None or not options.trust_remote_code):
        from passopt.frontends.transformers_decoders import TransformersDecoder

        yield TransformersDecoder(checkpoint, options)
        return
    from passopt.frontends.baichuan import Baichuan
    from passopt.frontends.own_decoders import OwnDecoder

    family = Baichuan if checkpoint.config.get("model_type") == "baichuan" else OwnDecoder
    with stock_classes(checkpoint, trust_remote_code=options.trust_remote_code) as classes:
        yield family(checkpoint, options, classes)
