"""Check a transformed model against the original in onnxruntime, on seeded inputs, with stated tolerances.

int8 candidates are checked twice: against a twin dequantised by numpy from their own codes, and against the original.
bf16 models run through their fp32 twins; sharded ones with all ranks joined in one graph.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.decoder import decoder_of, degree_of, positions_of
from passopt.ir.weights.expressions import DataType
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.verification.dequantised_twin import dequantised_twin, has_dynamic_activations, is_quantized
from passopt.verification.layerwise import Label, run_layerwise
from passopt.verification.report import PERPLEXITY, Row, VerifyReport, compare, compare_perplexity
from passopt.verification.scenarios import (
    Observation,
    Scenario,
    make_scenarios,
    observe,
    perplexity,
    text_windows,
    vocabulary_of,
)

ORIGINAL = "against the original"
NUMPY_TWIN = "against its own codes, dequantised by numpy"

#: Without tables that limit them, models are tried up to this many positions.
_UNLIMITED = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest relative error of logits and cache, and largest |perplexity ratio − 1|."""

    outputs: float
    perplexity: float


#: Defaults by what is compared. Exact and reassociating passes (tp) share one: sums in another order differ by some
#: 1e-7 per operation. Two bf16 models both run in fp32, but a pass may have stored a constant, rounded to bf16, which
#: the original computes while it runs. "bf16 and wider" is a bf16 model against one that is not. "int8" is a quantised
#: model against one that is not: there the perplexity decides, and the outputs catch the absurd. So in "int8
#: activations", where either model quantises them while it runs: ranks do so by their own part of a row.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(outputs=1e-5, perplexity=1e-4),
    "fp16": Tolerance(outputs=2e-2, perplexity=5e-3),
    "bf16": Tolerance(outputs=5e-3, perplexity=1e-3),
    "bf16 and wider": Tolerance(outputs=5e-2, perplexity=1e-2),
    "int8": Tolerance(outputs=1e-1, perplexity=5e-3),
    "int8 activations": Tolerance(outputs=1e-1, perplexity=1e-2),
}
#: Of an int8 graph against its numpy twin.
TWIN_TOLERANCES: Mapping[DataType, Tolerance] = {
    DataType.FLOAT: Tolerance(outputs=1e-5, perplexity=1e-4),
    DataType.FLOAT16: Tolerance(outputs=2e-3, perplexity=1e-3),
}
#: Where activations are quantised while the graph runs: what two kernels round differently may fall on either side of
#: a half, and a code that is off by one is 1/254 of its row's largest number.
DYNAMIC_TWIN_TOLERANCE = Tolerance(outputs=3e-2, perplexity=2e-3)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """`lengths` of prefills in tokens, `tokens` of a text for perplexity in overlapping windows, `tolerance` instead of
    the default for outputs. `max_positions` defaults to what the reference's tables hold. `scratch` is where weights
    lie while a model runs (default: the system's temporary folder; it needs the size of a model, or of a layer).
    `on_piece` is told number and count of each layer that `layerwise` has done."""

    seed: int = 0
    lengths: tuple[int, ...] = (1, 7, 33)
    max_positions: int | None = None
    tolerance: float | None = None
    tokens: tuple[int, ...] = ()
    window: int = 256
    stride: int = 128
    layerwise: bool = False
    threads: int = 2
    scratch: Path | None = None
    on_piece: Callable[[int, int], None] | None = None


def verify(reference: onnx_ir.Model, candidate: onnx_ir.Model, *, options: VerifyOptions | None = None) -> VerifyReport:
    """Run both and compare. Raises ModelError for graphs that are no decoders or that do not have one interface."""
    options = options or VerifyOptions()
    notes: list[str] = []
    reference = runnable(reference, "reference", notes)
    heads = decoder_of(reference).kv_heads
    candidate = runnable(candidate, "candidate", notes, heads)
    _check_interfaces(reference, candidate)
    kind = _kind(reference, candidate)
    tolerance = chosen_tolerance(TOLERANCES[kind], options)
    limits = positions_of(reference), positions_of(candidate)
    scenarios = scenarios_within(limits, vocabulary_of(reference), options, notes)
    notes.append(f"{kind}: outputs within {tolerance.outputs:.0e}, perplexity within {tolerance.perplexity:.0e}")
    run = _verify_layerwise if options.layerwise else _verify_whole
    report = run(reference, candidate, scenarios, tolerance, options)
    if options.tokens and not any(row.output == PERPLEXITY for row in report.rows):
        notes.append("text: no perplexity, since a model gives logits of the last position only")
    return dataclasses.replace(report, notes=tuple(notes))


def runnable(model: onnx_ir.Model, role: str, notes: list[str], heads: int | None = None) -> onnx_ir.Model:
    """The model as onnxruntime can run it on a CPU; what had to be done for that is added to `notes`."""
    if degree_of(model) > 1:
        notes.append(f"{role}: {degree_of(model)} ranks, joined in one graph")
        model = join_ranks(rank_models(model), heads=heads)
    collective = next((node for node in model.graph if is_collective(node)), None)
    if collective is not None:
        raise ModelError(f"{role}: has {collective.op_type} {collective.name!r}, but only one rank's weights")
    decoder_of(model)
    if not _is_bf16(model):
        return model
    from passopt.ir.graph.fp32_twin import fp32_twin

    notes.append(f"{role}: bf16, run through its fp32 twin")
    twin = fp32_twin(model)
    twin.metadata_props[_WAS_BF16] = "1"
    return twin


_WAS_BF16 = "passopt.was_bf16"


def is_bf16_twin(model: onnx_ir.Model) -> bool:
    """Whether `runnable` made this model of one in bf16."""
    return _WAS_BF16 in model.metadata_props


def _is_bf16(model: onnx_ir.Model) -> bool:
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return any(value.dtype == DataType.BFLOAT16 for value in values)


def _kind(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> str:
    """The row of `TOLERANCES`: by the less precise of the two models."""
    if any(has_dynamic_activations(model) for model in (reference, candidate)):
        return "int8 activations"
    if is_quantized(candidate) and not is_quantized(reference):
        return "int8"
    bf16 = [is_bf16_twin(model) for model in (reference, candidate)]
    if any(bf16):
        return "bf16" if all(bf16) else "bf16 and wider"
    dtypes = {decoder_of(model).cache_dtype for model in (reference, candidate)}
    return "fp16" if DataType.FLOAT16 in dtypes else "fp32"


def chosen_tolerance(default: Tolerance, options: VerifyOptions) -> Tolerance:
    """The default, but for outputs what the user says."""
    return default if options.tolerance is None else Tolerance(options.tolerance, default.perplexity)


def _check_interfaces(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    one, other = decoder_of(reference), decoder_of(candidate)
    for what in ("layers", "kv_heads", "head_dim"):
        expected, found = getattr(one, what), getattr(other, what)
        if expected != found:
            raise ModelError(f"the candidate has {what} {found}, the reference {expected}: not the same model")
    if vocabulary_of(reference) != vocabulary_of(candidate):
        raise ModelError(
            f"the candidate has {vocabulary_of(candidate)} logits, the reference {vocabulary_of(reference)}: "
            f"not the same model"
        )


def scenarios_within(
    limits: Iterable[int | None], vocab: int, options: VerifyOptions, notes: list[str]
) -> list[Scenario]:
    """What fits into all limits that are known: seeded inputs, and windows of a text if there is one."""
    limit = min((limit for limit in (options.max_positions, *limits) if limit is not None), default=_UNLIMITED)
    scenarios = make_scenarios(vocab, limit, options.lengths, options.seed)
    if not options.tokens:
        return scenarios
    window = min(options.window, limit)
    stride = min(options.stride, max(1, window // 2))
    notes.append(f"text: {len(options.tokens)} tokens in windows of {window}, {stride} apart")
    return scenarios + text_windows(options.tokens, window, stride)


def _verify_whole(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    tolerance: Tolerance,
    options: VerifyOptions,
) -> VerifyReport:
    """One model is in memory at a time."""
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch)
    found = observe(candidate, scenarios, session)
    rows: list[Row] = []
    if is_quantized(candidate):
        with tempfile.TemporaryDirectory(prefix="passopt-twin-", dir=options.scratch) as folder:
            twin = observe(dequantised_twin(candidate, Path(folder)), scenarios, session)
        rows += compare_all(NUMPY_TWIN, scenarios, twin, found, _twin_tolerance(candidate))
    expected = observe(reference, scenarios, session)
    rows += compare_all(ORIGINAL, scenarios, expected, found, tolerance)
    return VerifyReport(tuple(rows))


def compare_all(
    comparison: str,
    scenarios: Sequence[Scenario],
    expected: Sequence[Observation],
    found: Sequence[Observation],
    tolerance: Tolerance,
) -> list[Row]:
    """Rows for all outputs of all scenarios, and one for the perplexity of the text."""
    rows: list[Row] = []
    for scenario, one, other in zip(scenarios, expected, found, strict=True):
        if not scenario.scored:
            rows += compare(comparison, scenario, one, other, tolerance.outputs)
    both = perplexity(scenarios, expected), perplexity(scenarios, found)
    return rows + compare_perplexity(comparison, *both, tolerance.perplexity)


def _verify_layerwise(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    tolerance: Tolerance,
    options: VerifyOptions,
) -> VerifyReport:
    """One layer of one model is in memory at a time.

    int8 layers are dequantised when they are loaded: in fp32 accuracy, that is many times faster than at every product.
    """
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch, fold_qdq=True)
    own = _twin_tolerance(candidate)
    result = run_layerwise(
        reference,
        candidate,
        scenarios,
        session,
        Label(f"{ORIGINAL}, each layer on its activations", tolerance.outputs),
        Label(f"{NUMPY_TWIN}, layer by layer", own.outputs),
        options.scratch,
        options.on_piece,
    )
    rows = result.rows + compare_all(f"{ORIGINAL}, end to end", scenarios, result.expected, result.found, tolerance)
    return VerifyReport(tuple(rows))


def _twin_tolerance(candidate: onnx_ir.Model) -> Tolerance:
    if has_dynamic_activations(candidate):
        return DYNAMIC_TWIN_TOLERANCE
    return TWIN_TOLERANCES[decoder_of(candidate).cache_dtype]
