"""Does an export compute what the stock code computes? Answered on a small model of the checkpoint's own class.

The stock class runs eagerly in fp32, the exported graph in onnxruntime, on the same weights rounded to the graph's
dtype: prefill at once and in chunks, then decode, one sequence padded on the left. Errors are max|Δ| / max|reference|.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
import torch

from passopt.frontends.baichuan2 import Alibi, is_alibi
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.huggingface import DEFAULT_OPSET, TORCH_DTYPES, build_model, export_graph
from passopt.frontends.naming import cache_names
from passopt.frontends.quiet import quiet
from passopt.frontends.remote_code import stock_classes
from passopt.ir.errors import CheckError
from passopt.ir.evaluate import Evaluator
from passopt.ir.expressions import DataType
from passopt.ir.files import MODEL_NAME, save_materialized
from passopt.ir.sources import safetensors_sources
from passopt.ir.twin import fp32_twin

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Largest relative error by the graph's dtype; a bf16 graph is run as its fp32 twin.
TOLERANCES = {DataType.FLOAT: 1e-4, DataType.BFLOAT16: 1e-4, DataType.FLOAT16: 2e-2}

# No two dimensions equal, and heads that are no power of two, so that no mix-up of axes or slopes goes unnoticed.
# The roots of 16 are exact; that of 10, as a folded bf16 constant, would move the logits by 4e-3 and hide real faults.
_LAYERS, _HEADS, _HEAD_DIM = 2, 6, 16
_SMALL = {
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "hidden_size": _HEADS * _HEAD_DIM,
    "intermediate_size": 44,
    "vocab_size": 72,
    "model_max_length": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_LENGTH, _PADDING = 13, 4
_AT_ONCE, _IN_CHUNKS = (13,), (6, 5, 1, 1)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """Inputs of a padded batch and what the stock code makes of them, all at once and in fp32."""

    ids: Array
    mask: Array
    positions: Array
    outputs: dict[str, Array]


def self_check(
    checkpoint: Checkpoint,
    *,
    dtype: DataType,
    alibi: Alibi = "formula",
    opset: int = DEFAULT_OPSET,
    finish: Callable[[onnx_ir.Model], onnx_ir.Model],
) -> float:
    """The largest relative error over all outputs. `finish` is what follows an export, such as cleaning passes.

    Runs the checkpoint's code, so call it only with the user's consent. Raises CheckError beyond the tolerance.
    """
    with tempfile.TemporaryDirectory(prefix="passopt-self-check-") as name:
        scratch = Path(name)
        small, reference = _run_stock_code(checkpoint, dtype, scratch)
        graph = finish(
            export_graph(small, dtype=dtype, alibi=alibi, opset=opset, trust_remote_code=True, scratch=scratch)
        )
        if dtype == DataType.BFLOAT16:
            graph = fp32_twin(graph)
        session = _session(graph, scratch)
        error = max(_error(reference, _run_graph(session, reference, steps)) for steps in (_AT_ONCE, _IN_CHUNKS))
    if not error <= TOLERANCES[dtype]:
        raise CheckError(
            f"{checkpoint.directory}: the exported graph differs from the stock code by {error:.2e} of the largest "
            f"value; {TOLERANCES[dtype]:.0e} is allowed for {dtype.name} (measured on a small model of the same class)"
        )
    return error


def _run_stock_code(checkpoint: Checkpoint, dtype: DataType, scratch: Path) -> tuple[Checkpoint, _Reference]:
    """A small checkpoint with random weights, and the reference that its class computes from them."""
    from safetensors.torch import save_file

    small = dataclasses.replace(checkpoint, config={**checkpoint.config, **_SMALL}, tensors={})
    with quiet(), torch.no_grad(), stock_classes(checkpoint, trust_remote_code=True) as classes:
        model = build_model(classes, small, torch.float32)
        weights = {name: weight.to(TORCH_DTYPES[dtype]) for name, weight in _random_weights(model).items()}
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False, assign=True)
        reference = _reference(model.eval())
    file = scratch / "weights.safetensors"
    save_file(weights, file)
    return dataclasses.replace(small, tensors=safetensors_sources(file)), reference


def _random_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights under which activations keep their size; norm weights and lengths of rows are all distinct."""
    random = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return 0.6 + 0.8 * torch.rand(shape, generator=random)
        lengths = 0.5 + torch.rand(shape[0], 1, generator=random)
        return torch.randn(shape, generator=random) * lengths / math.sqrt(shape[-1])

    return {name: draw(weight.shape) for name, weight in model.named_parameters()}


def _reference(model: Any) -> _Reference:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, _SMALL["vocab_size"], (2, _LENGTH), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if is_alibi(model) else {"position_ids": positions}
    logits, present = model(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=False, **extra)
    states = [logits, *(state for layer in present for state in layer)]
    names = ["logits", *cache_names("present", _LAYERS)]
    outputs = {name: state.numpy() for name, state in zip(names, states, strict=True)}
    return _Reference(ids.numpy(), mask.numpy(), positions.numpy(), outputs)


def _session(graph: onnx_ir.Model, scratch: Path) -> Any:
    import onnxruntime  # type: ignore[import-untyped]

    directory = scratch / "graph"
    directory.mkdir()
    with Evaluator() as evaluator:
        save_materialized(graph, directory, evaluator)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(directory / MODEL_NAME), options, providers=["CPUExecutionProvider"])


def _run_graph(session: Any, reference: _Reference, steps: Sequence[int]) -> dict[str, Array]:
    """Feed `steps` positions at a time, each step with the cache of the one before; logits are joined."""
    inputs = {value.name: value.type for value in session.get_inputs()}
    kind = np.float16 if inputs["past.0.key"] == "tensor(float16)" else np.float32
    names = [value.name for value in session.get_outputs()]
    empty = np.zeros((2, _HEADS, 0, _HEAD_DIM), kind)
    state = dict.fromkeys(cache_names("present", _LAYERS), empty)
    logits, done = [], 0
    for count in steps:
        here = slice(done, done + count)
        feeds = {
            "input_ids": reference.ids[:, here],
            "attention_mask": reference.mask[:, : done + count],
            "position_ids": reference.positions[:, here],
            **{name.replace("present", "past", 1): cache for name, cache in state.items()},
        }
        outputs = session.run(names, {name: array for name, array in feeds.items() if name in inputs})
        state = dict(zip(names, outputs, strict=True))
        logits.append(state.pop("logits"))
        done += count
    return {"logits": np.concatenate(logits, axis=1), **state}


def _error(reference: _Reference, outputs: dict[str, Array]) -> float:
    """Over the positions that are no padding; NaN in the graph's outputs is an infinite error."""
    valid = reference.mask.astype(bool)
    errors = []
    for name, expected in reference.outputs.items():
        found = outputs[name].astype(np.float32)
        difference = np.abs(found - expected)
        by_position = difference if name == "logits" else difference.swapaxes(1, 2)
        errors.append(float(by_position[valid].max() / np.abs(expected).max()))
    return max(errors) if np.isfinite(errors).all() else math.inf
