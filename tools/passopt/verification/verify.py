"""Check a transformed model against the original in onnxruntime, on seeded inputs and with stated tolerances.

An int8 candidate is checked twice: against a twin that numpy dequantised from the candidate's own codes, and against
the original. A bf16 model runs as its fp32 twin, a sharded model with all its ranks joined in one graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.decoder import decoder_of, degree_of, find_decoder, positions_of
from passopt.passes.framework.accuracy import QualityBar
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.verification.comparisons import NUMPY_TWIN, ORIGINAL, compare_all, suspects, weigh_own_roundings
from passopt.verification.layerwise import Label, run_layerwise
from passopt.verification.logit_store import LogitStore
from passopt.verification.original_on_codes import against_original_on_codes
from passopt.verification.own_codes import against_one_step, against_own_codes, twin_tolerance
from passopt.verification.quantised_weights import channel_errors
from passopt.verification.report import PERPLEXITY, PREDICTIONS, Row, VerifyReport
from passopt.verification.sampling.shaken import nudged_model
from passopt.verification.scenarios import (
    Scenario,
    make_scenarios,
    near_the_end,
    observe,
    spread_over,
    text_windows,
    vocabulary_of,
)
from passopt.verification.tolerances import (
    TOLERANCES,
    Tolerance,
    bar_note,
    chosen_tolerance,
    deep,
    fp32_twin_of,
    is_bf16_twin,
    judgement_of,
    precision_of,
)
from passopt.verification.value_rows import weight_rows
from passopt.verification.verify_any import verify_any

#: Models whose graphs hold no table that limits their positions are tried up to this many positions.
_UNLIMITED = 1 << 20
#: The bytes that the random cache of the scenario near the end may take: that of all layers, and that of one layer if
#: they run one by one.
_LARGEST_CACHE, _LARGEST_LAYER = 128 << 20, 256 << 20
#: The positions of that scenario where nothing limits them.
_LONG = 4096
#: How many times the original runs with other roundings where a model that should agree is off by little.
_TURNS = 2


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
        inputs: Inputs by name to run both models on, in place of sampled ones.
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
    inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]] | None = None
    on_piece: Callable[[int, int], None] | None = None


def verify(reference: onnx_ir.Model, candidate: onnx_ir.Model, *, options: VerifyOptions | None = None) -> VerifyReport:
    """Run both models on the same inputs and compare their outputs.

    Decoders run prefills, padded batches and decoding with their own cache. Any other graph runs on inputs that are
    sampled by type and name.

    Raises:
        ModelError: If the two differ in layers, heads, head size or vocabulary, or in the names of inputs or outputs.
        UsageError: If an option is for decoders and the graph is none, or given inputs do not fit.
    """
    options = options or VerifyOptions()
    notes: list[str] = []
    reference = runnable(reference, "reference", notes)
    decoder = find_decoder(reference)
    candidate = runnable(candidate, "candidate", notes, None if decoder is None else decoder.kv_heads)
    if decoder is None or find_decoder(candidate) is None or options.inputs is not None:
        return _verify_any(reference, candidate, options, notes)
    _check_interfaces(reference, candidate)
    judgement = judgement_of(precision_of(reference), precision_of(candidate))
    kind, bar = judgement.kind, judgement.bar(options.tolerance)
    tolerance = chosen_tolerance(deep(TOLERANCES[kind], reference), options.tolerance)
    limits = positions_of(reference), positions_of(candidate)
    scenarios = scenarios_within(limits, vocabulary_of(reference), options, notes)
    long = _long_scenarios(reference, limits, options, notes)
    scenarios += long.whole
    if bar is None:
        notes.append(f"{kind}: outputs within {tolerance.outputs:.0e}, perplexity within {tolerance.perplexity:.0e}")
    else:
        notes.append(bar_note(kind, bar, has_text=bool(options.tokens)))
    run = _verify_layerwise if options.layerwise else functools.partial(_verify_whole, far=long.layers, notes=notes)
    report = run(reference, candidate, scenarios, tolerance, bar, options)
    if options.tolerance is None and suspects(report.rows):
        # The rows of layers stand for all scenarios together.
        doubtful = suspects(report.rows)
        some = [scenario for scenario in scenarios if options.layerwise or scenario.name in doubtful]
        nudged = (nudged_model(reference, turn) for turn in range(_TURNS))
        moved = [row for model in nudged for row in run(reference, model, some, tolerance, None, options).rows]
        report = dataclasses.replace(report, rows=tuple(weigh_own_roundings(report.rows, moved)))
    if bar is not None:
        report = dataclasses.replace(report, lossy=kind)
        if not report.ok:
            report = dataclasses.replace(report, costliest=_costliest(reference, candidate, scenarios, options))
    if options.tokens and not any(row.output == PERPLEXITY for row in report.rows):
        notes.append("text: no perplexity, since a model gives logits of the last position only")
    return dataclasses.replace(report, notes=tuple(dict.fromkeys(notes)))


def _verify_any(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, options: VerifyOptions, notes: Sequence[str]
) -> VerifyReport:
    """Compare graphs that are no decoders, or on given inputs."""
    known = {"`layerwise`": options.layerwise, "`text`": options.tokens, "`max_positions`": options.max_positions}
    option = next((name for name, value in known.items() if value), "")
    if option:
        raise UsageError(f"{option}: is for decoders with a cache and sampled inputs; drop it, or give `inputs`")
    return verify_any(
        reference,
        candidate,
        seed=options.seed,
        tolerance=options.tolerance,
        given=options.inputs,
        threads=options.threads,
        scratch=options.scratch,
        notes=notes,
    )


def runnable(model: onnx_ir.Model, role: str, notes: list[str], heads: int | None = None) -> onnx_ir.Model:
    """Return the model in a form that onnxruntime can run on a CPU, and add to `notes` what was changed for that.

    Ranks are joined in one graph, and bf16 becomes fp32. `role` names the model in notes and errors. `heads` is the
    true number of key/value heads, for ranks to which padding has added some.

    Raises:
        ModelError: If the model has collectives but the weights of only one rank.
    """
    if degree_of(model) > 1:
        notes.append(f"{role}: {degree_of(model)} ranks, joined in one graph")
        model = join_ranks(rank_models(model), heads=heads)
    collective = next((node for node in model.graph if is_collective(node)), None)
    if collective is not None:
        raise ModelError(f"{role}: has {collective.op_type} {collective.name!r}, but only one rank's weights")
    if "bf16" not in precision_of(model).narrow:
        return model
    notes.append(f"{role}: bf16, run through its fp32 twin")
    return fp32_twin_of(model)


@dataclasses.dataclass(frozen=True)
class _Long:
    """The scenarios at the end of the positions: those that run on whole models, and those that run layer by layer."""

    whole: tuple[Scenario, ...] = ()
    layers: tuple[Scenario, ...] = ()


def _long_scenarios(
    model: onnx_ir.Model, limits: Iterable[int | None], options: VerifyOptions, notes: list[str]
) -> _Long:
    """Return the scenarios near the end of the model's positions, if others end before.

    Where the cache of all layers would be too large, they run one by one, and one more reads all positions of tables.
    """
    decoder = decoder_of(model)
    layer = 2 * decoder.kv_heads * decoder.head_dim * 4
    known = [limit for limit in (options.max_positions, *limits) if limit is not None]
    end, vocab = min(known, default=_LONG), vocabulary_of(model)
    fits = min(end, _LARGEST_CACHE // (layer * decoder.layers))
    far = min(end, _LARGEST_LAYER // layer)
    others = max(*options.lengths, 40)
    short = (near_the_end(vocab, fits, options.seed, end),) if fits > others else ()
    if fits == end:
        return _Long(short)
    spread = spread_over(vocab, end, options.seed)
    late = (near_the_end(vocab, far, options.seed, end),) if far > others else ()
    if late and not options.layerwise:
        size = f"{end * layer * decoder.layers >> 20} MiB"
        notes.append(f"positions from {fits} to {far}: run layer by layer, since a cache of all layers takes {size}")
    last = max(fits, far) if late else fits
    if last < end:
        notes.append(
            f"positions from {last} to {end}: run without a cache, which takes {end * layer >> 20} MiB a layer"
        )
    return _Long((*late, spread)) if options.layerwise else _Long((*short, spread), late)


def _costliest(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, scenarios: Sequence[Scenario], options: VerifyOptions
) -> str:
    """Return the place at which a lossy candidate loses most: a channel of a weight, or else a layer by itself."""
    errors = channel_errors(reference, candidate)
    worst = max(errors, key=lambda item: item.steps / item.allowed, default=None)
    if worst is not None and worst.steps > worst.allowed:
        return f"{worst.weight}, output channel {worst.channel}: off by {worst.steps:.1f} steps of its codes"
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch, fold_qdq=True)
    label = Label(ORIGINAL, 1.0)
    plain = [scenario for scenario in scenarios if not scenario.scored and not scenario.past]
    try:
        result = run_layerwise(reference, candidate, plain[-1:], session, label, label, options.scratch)
    except ModelError:
        return ""
    row = max((row for row in result.rows if row.output not in {PREDICTIONS}), key=lambda row: row.error)
    return f"{row.scenario}, {row.output}: error {row.error:.1e} on the original's activations"


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
    bar: QualityBar | None,
    options: VerifyOptions,
    *,
    far: Sequence[Scenario],
    notes: list[str],
) -> VerifyReport:
    """Compare the models with only one of them in memory at a time; `far` scenarios run layer by layer."""
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch)
    judgement = judgement_of(precision_of(reference), precision_of(candidate))
    with LogitStore(options.scratch) as store:
        keep = store.keep if bar is not None else None
        found = observe(candidate, scenarios, session, keep)
        own = options.tolerance is None
        rows = against_own_codes(reference, candidate, scenarios, found, session, options.scratch, by_layers=own)
        if bar is not None and judgement.is_quantised:
            rows += against_original_on_codes(reference, candidate, scenarios, session, options.scratch, far)
        if bar is not None and precision_of(candidate).cache:
            rows += against_one_step(scenarios, found, lambda others: observe(candidate, others, session))
        expected = observe(reference, scenarios, session, keep)
        in_codes = precision_of(candidate).cache
        rows += compare_all(ORIGINAL, scenarios, expected, found, tolerance, bar, in_codes=in_codes)
    rows += _far_rows(reference, candidate, far, tolerance, bar, options, notes)
    return VerifyReport((*rows, *_weight_rows(reference, candidate, bar)))


def _far_rows(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    far: Sequence[Scenario],
    tolerance: Tolerance,
    bar: QualityBar | None,
    options: VerifyOptions,
    notes: list[str],
) -> list[Row]:
    """Return the rows of each layer on the original's activations, at positions whose whole cache is too large."""
    if not far:
        return []
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch, fold_qdq=True)
    where = f"{far[0].name}, layer by layer"
    labels = (
        Label(f"{ORIGINAL}, {where}", tolerance.outputs),
        Label(f"{NUMPY_TWIN}, {where}", twin_tolerance(candidate).outputs),
    )
    try:
        found = run_layerwise(reference, candidate, far, session, *labels, options.scratch)
    except ModelError as error:
        notes.append(f"not run at all: {where}, since {error}".removesuffix(" Verify without `layerwise`."))
        return []
    return _judged_by_bar(found.rows, bar)


def _judged_by_bar(rows: Sequence[Row], bar: QualityBar | None) -> list[Row]:
    """Return the rows of pieces; of a lossy model, only those against its own codes decide."""
    if bar is None:
        return list(rows)
    return [row if NUMPY_TWIN in row.comparison else dataclasses.replace(row, judged=False) for row in rows]


def _weight_rows(reference: onnx_ir.Model, candidate: onnx_ir.Model, bar: QualityBar | None) -> list[Row]:
    if bar is None:
        return []
    return weight_rows(reference, candidate, bf16=is_bf16_twin(reference) or is_bf16_twin(candidate))


def _verify_layerwise(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    tolerance: Tolerance,
    bar: QualityBar | None,
    options: VerifyOptions,
) -> VerifyReport:
    """Compare the models with only one layer of one model in memory at a time.

    int8 layers are dequantised when they are loaded: in fp32 that is many times faster than dequantising at every
    product.
    """
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch, fold_qdq=True)
    own = twin_tolerance(candidate)
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
    judgement = judgement_of(precision_of(reference), precision_of(candidate))
    # Of a text, no layer reads its cache back; here each does, on activations that no other layer has changed.
    pieces = result.rows if judgement.kind == "int8 cache" else _judged_by_bar(result.rows, bar)
    in_codes = precision_of(candidate).cache
    name = f"{ORIGINAL}, end to end"
    ends = compare_all(name, scenarios, result.expected, result.found, tolerance, bar, in_codes=in_codes)
    return VerifyReport((*pieces, *ends, *_weight_rows(reference, candidate, bar)))
