"""Define the named pipelines, such as `baichuan2` and `tp`, as plain tuples of steps.

In a step, `$option` stands for the value of the pipeline's own option of that name. Passes are idempotent, so it does
no harm if two pipelines in one run contain the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A named pipeline.

    Attributes:
        summary: What the pipeline does, as `passopt list` shows it.
        steps: The passes in order, as pipeline text.
        options: The options of the pipeline with their defaults.
        expectations: What must hold after the run, such as `fuse-attention==num_layers`.
        expected_with: Triples (option, value, expectation): an expectation that is added if the option has this value.
    """

    summary: str
    steps: tuple[str, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expectations: tuple[str, ...] = ()
    expected_with: tuple[tuple[str, str, str], ...] = ()


#: These steps leave one spelling of every computation, and each constant and length once, so that the patterns of later
#: passes match. Constants are folded twice because folding finds more once a computation has one spelling.
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
_NORMS_AND_ROTARY = ("fuse-rms-norm", "fuse-rotary")
_TIDY = ("fold-constants", "cse", "dead-code")

PIPELINES: Mapping[str, Pipeline] = {
    "baichuan2": Pipeline(
        "Fuse norms, rotary embedding and attention of Baichuan2; compute ALiBi from slopes and split q, k and v.",
        (*_CLEAN_UP, *_ALIBI, "split-packed-qkv", *_NORMS_AND_ROTARY, "fuse-attention", *_TIDY),
        {"opset": "23"},
        (
            "fuse-rms-norm==2*num_layers+1",
            "fuse-rotary==2*rotary_layers",
            "fuse-attention==num_layers",
        ),
    ),
    "fuse": Pipeline(
        "Fuse norms, activations, rotary embedding and attention of any model.",
        (
            *(*_CLEAN_UP, "decompose-einsum", *_ALIBI, "fuse-layer-norm", "fuse-gelu", *_NORMS_AND_ROTARY),
            "fuse-attention{hidden_rows=$hidden_rows}",
            *_TIDY,
        ),
        {"opset": "23", "hidden_rows": "exact"},
        # A cache proves that there is attention. Of other graphs it is reported what was left, and not demanded.
        ("fuse-attention>=decoder_attentions",),
    ),
    "tp": Pipeline(
        "Shard the weights for tensor parallelism, in one SPMD graph from which a model per rank is written.",
        ("fold-norm-head", "inject-norm-head-bias", "shard{degree=$degree,pad=$pad}", "dead-code"),
        {"degree": "2", "pad": "false"},
    ),
    "rotate": Pipeline(
        "Spread outliers over all channels, without data, so that int8{activations=dynamic} after it loses less.",
        ("fold-norm-head", "rotate-residual{seed=$seed}", "dead-code"),
        {"seed": "0"},
    ),
    "int8": Pipeline(
        "Quantise the weights of linears to symmetric int8 per channel; activations=dynamic multiplies as integers, "
        "embedding=true and head=true include these weights, "
        "from=CALIB takes the codes that `passopt calibrate` made.",
        (
            "fold-norm-head",
            "quantize-weights{embedding=$embedding,head=$head,method=$method,from=$from}",
            "quantize-activations{activations=$activations}",
            "dead-code",
        ),
        {"embedding": "false", "head": "false", "activations": "none", "method": "auto", "from": ""},
        # If not a single linear was found, something is wrong with the model or the pipeline.
        ("quantize-weights>=1",),
        (("activations", "dynamic", "quantize-activations>=1"),),
    ),
    "int8-cache": Pipeline(
        "Store the KV cache in 8 bits with a scale per position and head; keys=channel evens out the channels of keys.",
        ("quantize-cache{keys=$keys,values=$values}", "dead-code"),
        {"keys": "channel", "values": "token"},
        ("quantize-cache==2*num_layers",),
    ),
    "int4": Pipeline(
        "Quantise the weights of linears to 4 bits with a scale per group of inputs; symmetric=false adds zero points, "
        "head=true includes the head, from=CALIB takes the codes that `passopt calibrate --bits 4 --group N` made.",
        (
            "fold-norm-head",
            "quantize-groups{group=$group,symmetric=$symmetric,head=$head,method=$method,from=$from}",
            "dead-code",
        ),
        {"group": "64", "method": "auto", "symmetric": "true", "head": "false", "from": ""},
        ("quantize-groups>=1",),
    ),
}
