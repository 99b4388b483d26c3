"""Check a transformed model against the original in onnxruntime, on seeded inputs and with stated tolerances.

An int8 candidate is checked twice: against a twin that numpy dequantised from the candidate's own codes, and against
the original. A bf16 model runs as its fp32 twin, a sharded model with all its ranks joined in one graph.
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

#: Models whose graphs hold no table that limits their positions are tried up to this many positions.
_UNLIMITED = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The largest relative error allowed for logits and cache, and the largest allowed |perplexity ratio − 1|."""

    outputs: float
    perplexity: float


#: The default tolerances by the kind of comparison.
#:
#: - "fp32" and "fp16": Exact and reassociating passes such as tp share one row, because sums in another order differ by
#:   only some 1e-7 per operation.
#: - "bf16": Both models are bf16 and run in fp32. They may still differ, because a pass may have stored a constant
#:   rounded to bf16 that the original computes while it runs.
#: - "bf16 and wider": One of the models is bf16 and the other is not.
#: - "int8": The candidate is quantised and the reference is not. The perplexity decides here; the tolerance of the
#:   outputs only catches absurd results.
#: - "int8 activations": Either model quantises activations while it runs. Here too the perplexity decides, because
#:   each rank quantises by its own part of a row.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(outputs=1e-5, perplexity=1e-4),
    "fp16": Tolerance(outputs=2e-2, perplexity=5e-3),
    "bf16": Tolerance(outputs=5e-3, perplexity=1e-3),
    "bf16 and wider": Tolerance(outputs=5e-2, perplexity=1e-2),
    "int8": Tolerance(outputs=1e-1, perplexity=5e-3),
    "int8 activations": Tolerance(outputs=1e-1, perplexity=1e-2),
}
#: The tolerances of an int8 graph against its numpy-dequantised twin, by the dtype of the cache.
TWIN_TOLERANCES: Mapping[DataType, Tolerance] = {
    DataType.FLOAT: Tolerance(outputs=1e-5, perplexity=1e-4),
    DataType.FLOAT16: Tolerance(outputs=2e-3, perplexity=1e-3),
}
#: The same for a graph that quantises activations while it runs. Kernels that differ in the last bit may round a value
#: near a half up or down, and a code that is off by one changes the value by 1/254 of the row's largest number.
DYNAMIC_TWIN_TOLERANCE = Tolerance(outputs=3e-2, perplexity=2e-3)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify` and `verify_compiled`.

    Attributes:
        seed: The seed of the random token ids.
        lengths: The lengths of the prefills, in tokens.
        max_positions: The largest number of positions to use; by default what the tables of both models hold.
        tolerance: A relative error for outputs that replaces the default one.
        tokens: The token ids of a text, whose perplexity is compared in overlapping windows; empty for no perplexity.
        window: The length of a window of the text, in tokens.
        stride: The distance from the start of a window to the start of the next one, in tokens.
        layerwise: Run the models layer by layer, with one layer's weights in memory at a time.
        threads: The number of threads that a model runs with.
        scratch: The folder that holds weights while a model runs, by default the system's temporary folder. It needs
            room for a model, or for a layer if `layerwise` is set.
        on_piece: A function that `layerwise` calls after each layer with that layer's number and the number of all.
    """

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
    """Run both models on the same inputs and compare their outputs.

    Raises:
        ModelError: If a graph is not a decoder, or if the two differ in layers, heads, head size or vocabulary.
    """
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
    """Return the model in a form that onnxruntime can run on a CPU, and add to `notes` what was changed for that.

    Ranks are joined in one graph, and bf16 becomes fp32. `role` names the model in notes and errors. `heads` is the
    true number of key/value heads, for ranks to which padding has added some.

    Raises:
        ModelError: If the model is not a decoder, or has collectives but the weights of only one rank.
    """
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
    """Return whether `runnable` made this model from one in bf16."""
    return _WAS_BF16 in model.metadata_props


def _is_bf16(model: onnx_ir.Model) -> bool:
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return any(value.dtype == DataType.BFLOAT16 for value in values)


def _kind(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> str:
    """Return the key into `TOLERANCES` that fits the less precise of the two models."""
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
    """Return the default tolerance, with the user's own tolerance for outputs if there is one."""
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
    """Return the seeded scenarios that fit within all known limits, and the windows of the text if there is one.

    `limits` are numbers of positions, None where a model has no limit. A line about the text is added to `notes`.
    """
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
    """Compare the models with only one of them in memory at a time."""
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
    """Return the rows for all outputs of all scenarios, and one row for the perplexity of the text."""
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
    """Compare the models with only one layer of one model in memory at a time.

    int8 layers are dequantised when they are loaded: in fp32 that is many times faster than dequantising at every
    product.
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
