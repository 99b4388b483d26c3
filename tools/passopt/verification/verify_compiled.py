"""Check a compiled folder against a graph: the folder runs in its own engine, the graph in onnxruntime.

Both run the same scenarios.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.generation.open_engine import open_engine
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of, positions_of
from passopt.targets.onnxruntime.session import Session
from passopt.targets.tvm.compiled_folder import Library, RankFolders, read_library
from passopt.verification.comparisons import ORIGINAL, compare_all
from passopt.verification.logit_store import LogitStore
from passopt.verification.own_codes import against_one_step
from passopt.verification.report import PERPLEXITY, VerifyReport
from passopt.verification.scenarios import Observation, Scenario, observe, surprise, vocabulary_of
from passopt.verification.tolerances import (
    TOLERANCES,
    Precision,
    Tolerance,
    bar_note,
    chosen_tolerance,
    judgement_of,
    precision_of,
)
from passopt.verification.verify import VerifyOptions, runnable, scenarios_within

#: The tolerances of a library that should agree with the graph. In fp32, also if both have the same int8 weights, it
#: sums in another order than onnxruntime and fuses operators that onnxruntime does not; a library in bf16 rounds what
#: the fp32 twin of a graph in bf16 does not.
COMPILED: Mapping[str, Tolerance] = {
    "fp32": Tolerance(outputs=1e-4, perplexity=1e-4),
    "bf16": TOLERANCES["bf16 and wider"],
}

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def verify_compiled(reference: onnx_ir.Model, folder: Path, options: VerifyOptions) -> VerifyReport:
    """Run the graph and the compiled folder, and compare logits and perplexity.

    Caches are not compared, because the layout of a library's cache is internal to it.

    Raises:
        ModelError: If the graph is not a decoder, the folder cannot be loaded, or the two differ in size.
    """
    notes: list[str] = []
    reference = runnable(reference, "reference", notes)
    decoder_of(reference)
    library = _first(folder)
    _check_sizes(reference, library)
    judgement = judgement_of(precision_of(reference), _precision(library))
    kind, bar = judgement.kind, judgement.bar(options.tolerance)
    tolerance = chosen_tolerance(COMPILED.get(kind, TOLERANCES[kind]), options.tolerance)
    limits = positions_of(reference), library.max_positions
    scenarios = scenarios_within(limits, library.logits.vocab, options, notes)
    machine = f"compiled for {library.mcpu} ({library.isa})"
    if bar is None:
        notes.append(f"{machine}, {kind}: outputs within {tolerance.outputs:.0e}")
    else:
        notes += [machine, bar_note(kind, bar, has_text=bool(options.tokens))]
    session = functools.partial(Session, threads=options.threads, scratch=options.scratch)
    with LogitStore(options.scratch) as store:
        keep = store.keep if bar is not None else None
        found = observe_compiled(folder, scenarios, options.threads, keep)
        expected = _without_cache(observe(reference, scenarios, session, keep))
        rows = compare_all(ORIGINAL, scenarios, expected, found, tolerance, bar)
        if bar is not None and library.cache.dtype == "int8":
            rows += against_one_step(scenarios, found, lambda others: observe_compiled(folder, others, options.threads))
    if options.tokens and not any(row.output == PERPLEXITY for row in rows):
        notes.append("text: no perplexity, since a model gives logits of the last position only")
    return VerifyReport(tuple(rows), tuple(notes), lossy=kind if bar is not None else "")


def observe_compiled(
    folder: Path, scenarios: Sequence[Scenario], threads: int, keep: Callable[[Array], Array] | None = None
) -> list[Observation]:
    """Run a library through all scenarios, each with an empty cache that has just the room the scenario needs.

    The logits of a text are kept as `keep` returns them, or not at all.
    """
    found = []
    engine = open_engine(folder, threads=threads)
    for scenario in scenarios:
        batch, room = scenario.steps[0].input_ids.shape[0], scenario.steps[-1].attention_mask.shape[1]
        engine.allocate(batch, room)
        observation = Observation()
        for step in scenario.steps:
            logits = engine.forward(step.input_ids, step.attention_mask)
            if scenario.scored:
                observation.surprise = surprise(logits, step, scenario.scored)
                observation.logits += [keep(logits)] if keep is not None else []
            else:
                observation.logits.append(logits)
        found.append(observation)
    return found


def _first(folder: Path) -> Library:
    """Return the library in the folder, or the first rank's library if the folder holds ranks."""
    found = read_library(folder)
    if isinstance(found, RankFolders):
        found = read_library(folder / found.ranks[0])
    if isinstance(found, RankFolders):
        raise ModelError(f"{folder}: its first rank folder holds ranks itself, expected one compiled library per rank")
    return found


def _check_sizes(reference: onnx_ir.Model, library: Library) -> None:
    decoder = decoder_of(reference)
    pairs = [
        ("layers", decoder.layers, library.cache.layers),
        ("head_dim", decoder.head_dim, library.cache.head_dim),
        ("logits", vocabulary_of(reference), library.logits.vocab),
    ]
    for what, expected, found in pairs:
        if expected != found:
            raise ModelError(f"the library has {what} {found}, the reference {expected}: not the same model")


def _precision(library: Library) -> Precision:
    in_codes = library.cache.dtype == "int8"
    narrow = frozenset({library.cache.codes_of if in_codes else library.cache.dtype} - {"fp32"})
    dynamic = library.quantized == "dynamic"
    has_groups = library.quantized == "groups"
    is_quantized = has_groups or library.quantized == "weights"
    return Precision(is_quantized, dynamic, dynamic, in_codes, narrow, groups=has_groups)


def _without_cache(observations: Sequence[Observation]) -> list[Observation]:
    return [Observation(item.logits, {}, item.surprise) for item in observations]
