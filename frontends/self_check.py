"""Check that an export computes what the stock code computes, on a small model of the checkpoint's own class.

The stock class runs eagerly in fp32 and the exported graph in onnxruntime, on the same weights, rounded to the graph's
dtype. They run prefill at once and in chunks, then decode; one sequence is padded on the left, one is long, and some
are at late positions. Errors are max|Δ| / max|reference|.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
import torch

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.contract_names import cache_names
from passopt.frontends.export import TORCH_DTYPES, export_family
from passopt.frontends.family import CacheShape, Family
from passopt.frontends.open_family import open_family
from passopt.frontends.options import ExportOptions, Phase
from passopt.frontends.quiet import quiet
from passopt.frontends.stock_errors import stock_errors
from passopt.ir.errors import CheckError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.serialization.model_files import MODEL_NAME, save_materialized
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.sources import safetensors_sources

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The largest relative error that is allowed, by the graph's dtype. A bf16 graph is run as its fp32 twin.
TOLERANCES = {DataType.FLOAT: 1e-4, DataType.BFLOAT16: 1e-4, DataType.FLOAT16: 2e-2}

_LENGTH, _PADDING = 13, 4
#: The length of a batch whose last tokens come behind a cache of random numbers, and how many tokens at once.
_BEHIND, _CHUNK = 40, 5
#: The length of the long sequence, if the model has so many positions.
_LONG = 1024
#: The last position that is looked at, behind a cache of random numbers, and how many such positions there are.
_LAST, _LATE = 33_000, 8
#: The numbers of positions per step, for every way to feed a graph of a phase.
_STEPS: dict[Phase, tuple[tuple[int, ...], ...]] = {
    "merged": ((13,), (6, 5, 1, 1)),
    "prefill": ((13,),),
    "decode": ((1,) * 13,),
}


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The inputs of a batch, and the outputs of the stock code, computed all at once and in fp32.

    `past` are the states of a cache before the first step, by name; `mask` and `positions` count its columns too.
    """

    shape: CacheShape
    ids: Array
    mask: Array
    positions: Array
    past: dict[str, Array]
    outputs: dict[str, Array]

    def steps(self, phase: Phase) -> tuple[tuple[int, ...], ...]:
        """Return the numbers of positions per step, for every way to feed these inputs to a graph of a phase.

        Steps with fewer positions than there are begin late: their cache is the stock code's.
        """
        length = self.ids.shape[1]
        if length == _LENGTH:
            return _STEPS[phase]
        if phase == "decode" or length == 1:
            return ((1,),)
        return ((length,), (length // 3, 1)) if phase == "merged" else ((length,),)


def self_check(
    checkpoint: Checkpoint, options: ExportOptions, *, finish: Callable[[onnx_ir.Model], onnx_ir.Model]
) -> float:
    """Return the largest relative error over all outputs of an exported small model, if it is within the tolerance.

    This runs the checkpoint's code, so it needs the same consent as an export.

    Args:
        checkpoint: The checkpoint, of which only the class and configuration are used.
        options: The options of the export to check.
        finish: Changes the exported graph before it is checked, as the passes that clean up after an export do.

    Raises:
        CheckError: If the error is larger than the tolerance for the dtype.
    """
    with tempfile.TemporaryDirectory(prefix="passopt-self-check-") as name:
        scratch = Path(name)
        with quiet(), open_family(checkpoint, options) as family:
            references = _run_stock_code(family, options, scratch)
            graph = finish(export_family(family, options, scratch, small=True))
        if options.dtype == DataType.BFLOAT16:
            graph = fp32_twin(graph)
        session = _session(graph, scratch)
        error = max(
            _error(reference, _run_graph(session, reference, steps))
            for reference in references
            for steps in reference.steps(options.phase)
        )
    if not error <= TOLERANCES[options.dtype]:
        raise CheckError(
            f"{checkpoint.directory}: the exported graph differs from the stock code by {error:.2e} of the largest "
            f"value; {TOLERANCES[options.dtype]:.0e} is allowed for {options.dtype.name} "
            f"(measured on a small model of the same class)"
        )
    return error


def _run_stock_code(family: Family, options: ExportOptions, scratch: Path) -> list[_Reference]:
    """Run a small model with random weights, and let the family's checkpoint then hold those weights."""
    from safetensors.torch import save_file

    with torch.no_grad():
        model = family.build(torch.float32, small=True)
        with stock_errors(family.checkpoint, f"{type(model).__name__} does not run"):
            shape = family.cache_shape(model)
        weights = {name: weight.to(TORCH_DTYPES[options.dtype]) for name, weight in _random_weights(model).items()}
        _load(model, {name: weight.float() for name, weight in weights.items()})
        with stock_errors(family.checkpoint, f"{type(model).__name__} does not run"):
            references = _references(family, model.eval(), shape, options.phase)
    file = scratch / "weights.safetensors"
    save_file(weights, file)
    family.checkpoint = dataclasses.replace(family.checkpoint, tensors=safetensors_sources(file))
    return references


def _load(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter its weight, and tied parameters the same weight under each of their names."""
    own = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: own[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict({name: weights[first] for name, first in names.items()}, strict=False, assign=True)


def _random_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return random weights that keep the size of activations; norm weights and lengths of rows are all distinct."""
    random = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return 0.6 + 0.8 * torch.rand(shape, generator=random)
        lengths = 0.5 + torch.rand(shape[0], 1, generator=random)
        return torch.randn(shape, generator=random) * lengths / math.sqrt(shape[-1])

    return {name: draw(weight.shape) for name, weight in model.named_parameters()}


def _references(family: Family, model: Any, shape: CacheShape, phase: Phase) -> list[_Reference]:
    """Run a padded batch, a long sequence, and one token and several tokens behind caches of several lengths."""
    mask = torch.ones(2, _LENGTH, dtype=torch.long)
    mask[1, :_PADDING] = 0
    positions = family.positions(model)
    long = min(positions or _LONG, _LONG)
    found = [_reference(family, model, shape, mask, 0)]
    ones = torch.ones(1, long, dtype=torch.long)
    if long > _LENGTH:
        found.append(_reference(family, model, shape, ones, 0))
    if phase == "prefill":
        return found
    # The stock code, too, may do something else for one token, or for several behind a cache.
    batch = torch.ones(2, min(long, _BEHIND), dtype=torch.long)
    batch[1, :_PADDING] = 0
    found.append(_reference(family, model, shape, batch, batch.shape[1] - 1))
    # Some stock code fails for several, as Baichuan's does. What the graph does then is compared with a whole prefill.
    with contextlib.suppress(Exception):
        if phase == "merged":
            found.append(_reference(family, model, shape, batch, batch.shape[1] - _CHUNK))
    found.append(_reference(family, model, shape, ones, long - 1))
    if positions is None:
        return found
    for past in _late_positions(family.numbers(), long, min(positions, _LAST)):
        found.append(_reference(family, model, shape, torch.ones(1, past + 1, dtype=torch.long), past))
    return found


def _late_positions(numbers: set[int], first: int, stop: int) -> list[int]:
    """Return positions behind the long sequence: around numbers of the configuration, and the last one."""
    around = sorted({number + shift for number in numbers for shift in (-1, 0, 1) if first < number + shift < stop - 1})
    return [*around[-_LATE:], stop - 1] if stop > first else []


def _reference(family: Family, model: Any, shape: CacheShape, mask: torch.Tensor, past: int) -> _Reference:
    """Run the stock code on all columns of `mask` but the first `past` ones, which are a cache of random numbers."""
    random = torch.Generator().manual_seed(1)
    batch, columns = mask.shape
    ids = torch.randint(1, model.config.vocab_size, (batch, columns - past), generator=random)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    sizes = (batch, shape.heads, past, shape.width)
    names = cache_names("present", shape.layers)
    # The numbers are exact in fp16 and bf16, so that graphs of these dtypes get the same cache.
    cache = [torch.randint(-8, 9, sizes, generator=random) / 8 for _ in names] if past else []
    pairs = list(zip(cache[::2], cache[1::2], strict=True))
    logits, present = family.reference(model, ids, mask, positions, pairs)
    states = [logits, *(state for layer in present for state in layer)]
    outputs = {name: state.numpy() for name, state in zip(["logits", *names], states, strict=True)}
    before = {name: state.numpy() for name, state in zip(names, cache, strict=False)}
    return _Reference(shape, ids.numpy(), mask.numpy(), positions.numpy(), before, outputs)


def _session(graph: onnx_ir.Model, scratch: Path) -> Any:
    import onnxruntime  # type: ignore[import-untyped]

    directory = scratch / "graph"
    directory.mkdir()
    save_materialized(graph, directory)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(directory / MODEL_NAME), options, providers=["CPUExecutionProvider"])


def _run_graph(session: Any, reference: _Reference, steps: Sequence[int]) -> dict[str, Array]:
    """Feed `steps` positions at a time, each step with the cache of the step before, and join the logits."""
    inputs = {value.name: value.type for value in session.get_inputs()}
    kind = np.float16 if "tensor(float16)" in inputs.values() else np.float32
    names = [value.name for value in session.get_outputs()]
    before = reference.mask.shape[1] - reference.ids.shape[1]
    done = reference.ids.shape[1] - sum(steps)
    past = reference.outputs if done else reference.past or reference.outputs
    state = {
        name: past[name][:, :, : before + done].astype(kind) for name in cache_names("present", reference.shape.layers)
    }
    logits = [reference.outputs["logits"][:, :done]]
    for count in steps:
        here = slice(done, done + count)
        feeds = {
            "input_ids": reference.ids[:, here],
            "attention_mask": reference.mask[:, : before + done + count],
            "position_ids": reference.positions[:, here],
            **{name.replace("present", "past", 1): cache for name, cache in state.items()},
        }
        outputs = session.run(names, {name: array for name, array in feeds.items() if name in inputs})
        state = dict(zip(names, outputs, strict=True))
        logits.append(state.pop("logits"))
        done += count
    return {"logits": np.concatenate(logits, axis=1), **state}


def _error(reference: _Reference, outputs: dict[str, Array]) -> float:
    """Return the largest relative error over the positions that are no padding, or infinity for NaN in the outputs."""
    valid = reference.mask.astype(bool)
    errors = []
    for name, expected in reference.outputs.items():
        found = outputs[name].astype(np.float32)
        difference = np.abs(found - expected)
        by_position = difference if name == "logits" else difference.swapaxes(1, 2)
        errors.append(float(by_position[valid[:, -by_position.shape[1] :]].max() / np.abs(expected).max()))
    return max(errors) if np.isfinite(errors).all() else math.inf
