"""Choose the family of a checkpoint, by its config.json alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.family import Family
from passopt.frontends.options import MODEL_TYPES, ExportOptions


def is_remote(checkpoint: Checkpoint) -> bool:
    """Return True if the model is defined by Python files of the checkpoint, not by a class of transformers."""
    return checkpoint.config.get("model_type") not in MODEL_TYPES


@contextlib.contextmanager
def open_family(checkpoint: Checkpoint, options: ExportOptions) -> Iterator[Family]:
    """Yield the checkpoint's family, whose classes can be imported within the block.

    transformers' own class is preferred to code in the checkpoint, which runs only with consent.

    Raises:
        ModelError: If the checkpoint is of no known family, or without consent to run its code.
        UsageError: If the family does not have one of the options.
    """
    if not is_remote(checkpoint):
        from passopt.frontends.transformers_decoders import TransformersDecoder

        yield TransformersDecoder(checkpoint, options)
        return
    from passopt.frontends.baichuan2 import Baichuan2
    from passopt.frontends.remote_code import stock_classes

    with stock_classes(checkpoint, trust_remote_code=options.trust_remote_code) as classes:
        yield Baichuan2(checkpoint, options, classes)
