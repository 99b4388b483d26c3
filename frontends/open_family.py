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


def refuse_passed_over(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Raise ModelError if the checkpoint has classes of its own that would be left alone for those of transformers.

    A class of the same name may compute something else (Llama with other positions is still a LlamaForCausalLM), and a
    self-check compares transformers' class with itself. Only running the code could show that the two are the same.
    """
    if is_remote(checkpoint):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = checkpoint.config["model_type"]
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    instead = (
        f"remove auto_map from config.json to export transformers' {stock} for {model_type}, which may compute "
        f"something else"
    )
    own = named_class(checkpoint)
    if own is not None and not trust_remote_code:
        raise ModelError(
            f"{checkpoint.directory}: config.json names its own class {own}, whose code would run on this machine. "
            f"Read it, then pass `trust_remote_code=True`; or {instead}."
        )
    for role in ("AutoConfig", "AutoModel"):
        part = named_class(checkpoint, role)
        if own is None and part is not None:
            raise ModelError(
                f"{checkpoint.directory}: config.json names its own class {part} ({role} of auto_map) and no "
                f"AutoModelForCausalLM, which export needs to run its code. Name that class too; or {instead}."
            )


@contextlib.contextmanager
def open_family(checkpoint: Checkpoint, options: ExportOptions) -> Iterator[Family]:
    """Yield the checkpoint's family, whose classes can be imported within the block.

    The checkpoint's own class goes before transformers' class, and runs only with consent.

    Raises:
        ModelError: If the checkpoint is of no known family, or without consent to run its code.
        UsageError: If the family does not have one of the options.
    """
    refuse_passed_over(checkpoint, trust_remote_code=options.trust_remote_code)
    if not is_remote(checkpoint) and named_class(checkpoint) is None:
        from passopt.frontends.transformers_decoders import TransformersDecoder

        yield TransformersDecoder(checkpoint, options)
        return
    from passopt.frontends.baichuan import Baichuan
    from passopt.frontends.own_decoders import OwnDecoder

    family = Baichuan if checkpoint.config.get("model_type") == "baichuan" else OwnDecoder
    with stock_classes(checkpoint, trust_remote_code=options.trust_remote_code) as classes:
        yield family(checkpoint, options, classes)
