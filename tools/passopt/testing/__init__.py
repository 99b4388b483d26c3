"""Test passes: check a pass on a small graph, and make tiny checkpoints and decoders to try pipelines on.

The pytest fixtures `check_pass` and `golden` and the option --update-golden come from the package's pytest plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passopt.ir.lazy_names import lazy_names

if TYPE_CHECKING:
    from passopt.testing.checking import check, compare_numbers
    from passopt.testing.checkpoints import ALIBI, ROTARY, CheckpointSpec, make_checkpoint
    from passopt.testing.decoders import DecoderSpec, tiny_decoder
    from passopt.testing.quantised_checkpoints import quantise_checkpoint

__all__ = [
    "ALIBI",
    "ROTARY",
    "CheckpointSpec",
    "DecoderSpec",
    "check",
    "compare_numbers",
    "make_checkpoint",
    "quantise_checkpoint",
    "tiny_decoder",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "check": "passopt.testing.checking",
        "compare_numbers": "passopt.testing.checking",
        "ALIBI": "passopt.testing.checkpoints",
        "CheckpointSpec": "passopt.testing.checkpoints",
        "ROTARY": "passopt.testing.checkpoints",
        "make_checkpoint": "passopt.testing.checkpoints",
        "DecoderSpec": "passopt.testing.decoders",
        "tiny_decoder": "passopt.testing.decoders",
        "quantise_checkpoint": "passopt.testing.quantised_checkpoints",
    },
)
