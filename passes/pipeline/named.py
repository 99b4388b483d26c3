"""Named pipelines: plain tuples of steps, expanded visibly. `{option}` hands the pipeline's option to a step.

Passes are idempotent, so steps that pipelines share may repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Steps in order, the options with their defaults, and what must hold after it ran (`PASS==N`).

    `expected_with` adds what must hold where an option has a value: `(option, value, expectation)`.
    """

    summary: str
    steps: tuple[str, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expectations: tuple[str, ...] = ()
    expected_with: tuple[tuple[str, str, str], ...] = ()


#: One spelling of everything, and each constant and length once. Folding finds more in what has one spelling.
_CLEAN_UP = (
    "legalize{opset=$opset}",
    "fold-constants",
    "canonicalize",
    "fold-constants",
    "unmerge-heads",
    "cse",
    "dead-code",
)
_ALIBI = ("dematerialize-alibi", "dematerialize-alibi-row")
_FUSE = ("fuse-rms-norm", "fuse-rotary", "fuse-attention", "fold-constants", "cse", "dead-code")

PIPELINES: Mapping[str, Pipeline] = {
    "baichuan2": Pipeline(
        "Fuse norms, rotary embedding and attention of Baichuan2, ALiBi from slopes, q, k and v apart.",
        (*_CLEAN_UP, *_ALIBI, "split-packed-qkv", *_FUSE),
        {"opset": "23"},
        (
            "fuse-rms-norm==2*num_layers+1",
            "fuse-rotary==2*rotary_layers",
            "fuse-attention==num_layers",
        ),
    ),
    "fuse": Pipeline(
        "Fuse norms, rotary embedding and attention of any decoder.",
        (*_CLEAN_UP, *_ALIBI, *_FUSE),
        {"opset": "23"},
        ("fuse-attention==num_layers",),
    ),
    "tp": Pipeline(
        "Tensor parallelism: one SPMD graph whose weights are shards; ranks come apart in the target.",
        ("fold-norm-head", "inject-norm-head-bias", "shard{degree=$degree,pad=$pad}", "dead-code"),
        {"degree": "2", "pad": "false"},
    ),
    "int8": Pipeline(
        "Symmetric per-channel int8 weights, dequantised, or multiplied as integers with activations=dynamic; "
        "embedding and head stay unless asked for.",
        (
            "fold-norm-head",
            "quantize-weights{embedding=$embedding,head=$head}",
            "quantize-activations{activations=$activations}",
            "dead-code",
        ),
        {"embedding": "false", "head": "false", "activations": "none"},
        # A model without a single linear that was found is a surprise, not a success.
        ("quantize-weights>=1",),
        (("activations", "dynamic", "quantize-activations>=1"),),
    ),
}
