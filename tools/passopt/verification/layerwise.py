"""Compare two decoders piece by piece, so that only one layer's weights of one model are in memory at a time.

Each piece of the candidate runs twice. On the reference's activations it shows where an error is made; on the
candidate's own activations it shows how errors add up to the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import LOGITS, ROTATION
from passopt.ir.relative_error import relative_error
from passopt.targets.onnxruntime.session import Session
from passopt.verification.decoder_cut import Cut, Piece, cut_decoder
from passopt.verification.dequantised_twin import dequantised_twin, is_quantized
from passopt.verification.report import Row
from passopt.verification.sampling.cache_inputs import cache_inputs, next_cache, present_numbers
from passopt.verification.scenarios import Observation, Scenario, Step, first_cache, vocabulary_of
from passopt.verification.sliced_head import Logits, Part, UnexpectedWidthError, slice_head, whole

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: The activations that enter a piece, per scenario and step; empty before the first piece.
Hidden: TypeAlias = "list[list[Array]]"
OpenSession: TypeAlias = Callable[[onnx_ir.Model], Session]

HIDDEN = "hidden"


@dataclasses.dataclass(frozen=True)
class Label:
    """The name of a comparison, and the relative error that it tolerates."""

    comparison: str
    tolerance: float


@dataclasses.dataclass
class LayerwiseResult:
    """The rows of each piece, and the outputs of both whole models, each computed on its own activations."""

    rows: list[Row]
    expected: list[Observation]
    found: list[Observation]


@dataclasses.dataclass
class _Trace:
    """The outputs of one piece: the activations it hands on per scenario and step, and observations per scenario."""

    hidden: list[list[Array]]
    seen: list[Observation]


#: A function that returns a changed model of a piece; it may write files that the model needs to the folder.
Prepare: TypeAlias = Callable[[onnx_ir.Model, Path], onnx_ir.Model]


def run_layerwise(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    open_session: OpenSession,
    original: Label,
    twin: Label,
    scratch: Path | None = None,
    on_piece: Callable[[int, int], None] | None = None,
) -> LayerwiseResult:
    """Run both models piece by piece and compare the outputs of each piece.

    Args:
        reference: The original model.
        candidate: The model to check.
        scenarios: The inputs of both models.
        open_session: A function that loads a model to run it.
        original: The label of the comparison with the reference's pieces.
        twin: The label of the comparison of an int8 candidate's pieces with their numpy-dequantised twins.
        scratch: The folder for temporary files, by default that of the system.
        on_piece: A function that is called after each piece with its number, counted from 1, and the number of all.

    Raises:
        ModelError: If a graph cannot be cut into layers, if the models have different numbers of layers, or if their
            streams are not rotated alike.
    """
    _check_same_rotation(reference, candidate)
    ours = _Side("reference", reference, scenarios, open_session, scratch)
    theirs = _Side("candidate", candidate, scenarios, open_session, scratch)
    if len(ours.cut.boundaries) != len(theirs.cut.boundaries):
        raise ModelError("reference and candidate have different numbers of layers")
    both = zip(ours.cut.boundaries, theirs.cut.boundaries, strict=True)
    kept = [index for index, names in enumerate(both) if all(names)]
    rows: list[Row] = []
    pieces = list(zip(ours.cut.pieces(kept), theirs.cut.pieces(kept), strict=True))
    for number, (one, other) in enumerate(pieces, 1):
        given = theirs.cast(ours.hidden)
        (expected,) = ours.run(one, [ours.hidden])
        same, found = theirs.run(other, [given, theirs.hidden])
        if is_quantized(theirs.graph(other)):
            (dequantised,) = theirs.run(other, [given], dequantised_twin)
            rows += _compare(twin, one, scenarios, dequantised, same)
        drift = _worst(scenarios, expected, found)
        rows += _compare(original, one, scenarios, expected, same, f"accumulated {drift:.1e}")
        ours.accept(one, expected)
        theirs.accept(other, found)
        if on_piece is not None:
            on_piece(number, len(pieces))
    return LayerwiseResult(rows, ours.observations, theirs.observations)


def _check_same_rotation(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    """Raise ModelError if what layers hand on is rotated in one model only, or by other seeds."""
    one, other = (model.metadata_props.get(ROTATION) for model in (reference, candidate))
    if one != other:
        seeds = [("is not rotated" if seed is None else f"is rotated by seed {seed}") for seed in (one, other)]
        raise ModelError(
            f"what layers hand on {seeds[0]} in the reference and {seeds[1]} in the candidate, so layers cannot be "
            f"compared. Verify without `layerwise`, or against the model as it is after the pipeline rotate."
        )


class _Side:
    """One model, run piece by piece; `hidden` holds what the last piece handed on, per scenario and step."""

    def __init__(
        self,
        role: str,
        model: onnx_ir.Model,
        scenarios: Sequence[Scenario],
        open_session: OpenSession,
        scratch: Path | None,
    ) -> None:
        try:
            self.cut: Cut = cut_decoder(model)
        except ModelError as error:
            raise ModelError(f"{role}: {error}") from error
        self.hidden: Hidden = []
        self.observations = [Observation() for _ in scenarios]
        self._model = model
        self._scenarios = scenarios
        self._open_session = open_session
        self._scratch = scratch
        self._caches = cache_inputs(model)
        self._vocab = vocabulary_of(model)
        self._shared = self._run_prelude()

    def _run_prelude(self) -> list[list[dict[str, Array]]]:
        prelude = self.cut.prelude()
        if prelude is None:
            return [[{} for _ in scenario.steps] for scenario in self._scenarios]
        session = self._open_session(prelude)
        return [
            [session.run({**step.feeds(), **self._blank_cache(step)}) for step in scenario.steps]
            for scenario in self._scenarios
        ]

    def _blank_cache(self, step: Step) -> dict[str, Array]:
        """Return caches of the right shape; the prelude reads nothing but their shape."""
        batch, length = step.input_ids.shape
        past = step.attention_mask.shape[1] - length
        found: dict[str, Array] = {}
        for cache in self._caches:
            found |= cache.feeds(np.zeros((batch, cache.heads, past, cache.width), np.float32))
        return found

    def graph(self, piece: Piece) -> onnx_ir.Model:
        """Return the piece as a model whose inputs have the dtypes of the activations at hand."""
        given = dict(self._shared[0][0])
        if piece.carried:
            given[piece.carried] = self.hidden[0][0]
        return self.cut.graph(piece, given)

    def accept(self, piece: Piece, trace: _Trace) -> None:
        """Take the outputs of a piece as the inputs of the next one, and add them to the observations.

        The cache of a scenario that begins late is left out; it was compared with the piece.
        """
        self.hidden = trace.hidden if piece.result else []
        for scenario, all_of_it, part in zip(self._scenarios, self.observations, trace.seen, strict=True):
            all_of_it.logits += part.logits
            if not scenario.past:  # the long caches of all layers are what does not fit into memory
                all_of_it.present.update(part.present)
            all_of_it.surprise = part.surprise if part.surprise is not None else all_of_it.surprise

    def cast(self, hidden: Hidden) -> Hidden:
        """Return the other model's activations in the dtype of this model."""
        if not self.hidden:
            return hidden
        dtype = self.hidden[0][0].dtype
        return [[array.astype(dtype) for array in steps] for steps in hidden]

    def run(self, piece: Piece, inputs: Sequence[Hidden], prepare: Prepare | None = None) -> list[_Trace]:
        """Run the piece on each of `inputs` with shared sessions; an empty input repeats the trace of the first.

        A large head runs in slices if its graph allows that.
        """
        graph = self.graph(piece)
        if piece.targets == (LOGITS,):
            with contextlib.suppress(UnexpectedWidthError, ModelError):
                return self._run_parts(piece, slice_head(graph, self._vocab), inputs, prepare)
        return self._run_parts(piece, [whole(graph, self._vocab)], inputs, prepare)

    def _run_parts(
        self, piece: Piece, parts: Sequence[Part], inputs: Sequence[Hidden], prepare: Prepare | None
    ) -> list[_Trace]:
        distinct = [hidden for index, hidden in enumerate(inputs) if hidden or not index]
        logits = [[self._no_logits(scenario) for scenario in self._scenarios] for _ in distinct]
        traces: list[_Trace] = []
        for part in parts:
            with tempfile.TemporaryDirectory(prefix="passopt-piece-", dir=self._scratch) as folder:
                session = self._open_session(prepare(part.graph, Path(folder)) if prepare else part.graph)
            traces = [self._run_part(session, piece, part, *both) for both in zip(distinct, logits, strict=True)]
            del session
        for trace, all_logits in zip(traces, logits, strict=True):
            for seen, scenario, found in zip(trace.seen, self._scenarios, all_logits, strict=True):
                seen.logits = [logit.array for logit in found if logit.array is not None]
                seen.surprise = found[0].surprise if scenario.scored else None
        return [*traces, *traces[: len(inputs) - len(traces)]]

    def _no_logits(self, scenario: Scenario) -> list[Logits]:
        return [Logits(step, self._vocab, scenario.scored) for step in scenario.steps]

    def _run_part(
        self, session: Session, piece: Piece, part: Part, hidden: Hidden, logits: list[list[Logits]]
    ) -> _Trace:
        """Run all steps of all scenarios, each step on the cache of this piece that the step before it made."""
        trace = _Trace([], [])
        for index, scenario in enumerate(self._scenarios):
            handed: list[Array] = []
            seen = Observation()
            cache: dict[str, Array] = {}
            for position, step in enumerate(scenario.steps):
                own = [item for item in self._caches if item.name in session.inputs]
                cache = cache or first_cache(scenario, own)
                feeds = {**step.feeds(), **self._shared[index][position], **cache}
                if piece.carried:
                    feeds[piece.carried] = hidden[index][position]
                outputs = session.run(feeds)
                if LOGITS in outputs:
                    logits[index][position].add(part, outputs.pop(LOGITS))
                if piece.result:
                    handed.append(outputs.pop(piece.result))
                cache = next_cache(outputs)
                seen.present = {} if scenario.scored else present_numbers(self._caches, outputs)
            trace.hidden.append(handed)
            trace.seen.append(seen)
        return trace


def _compare(
    label: Label, piece: Piece, scenarios: Sequence[Scenario], expected: _Trace, found: _Trace, note: str = ""
) -> list[Row]:
    """Return one row per output of the piece, with its worst error over all scenarios."""
    errors: dict[str, float] = {}
    for name, error in _errors(scenarios, expected, found):
        errors[name] = max(errors.get(name, 0.0), error)
    return [Row(label.comparison, piece.name, name, error, label.tolerance, note) for name, error in errors.items()]


def _worst(scenarios: Sequence[Scenario], expected: _Trace, found: _Trace) -> float:
    return max(error for _, error in _errors(scenarios, expected, found))


def _errors(scenarios: Sequence[Scenario], expected: _Trace, found: _Trace) -> list[tuple[str, float]]:
    errors = []
    for index, scenario in enumerate(scenarios):
        one, other = expected.seen[index], found.seen[index]
        for step, x, y in zip(scenario.steps, expected.hidden[index], found.hidden[index], strict=False):
            errors.append((HIDDEN, _masked(x, y, step.valid)))
        for step, x, y in zip(scenario.steps, one.logits, other.logits, strict=False):
            x = x[:, -y.shape[1] :]
            errors.append((LOGITS, _masked(x, y, step.valid[:, -y.shape[1] :])))
        mask = scenario.steps[-1].attention_mask > 0
        for name, x in one.present.items():
            y = other.present[name]
            errors.append((name, _masked(np.moveaxis(x, 2, 1), np.moveaxis(y, 2, 1), mask)))
    return errors


def _masked(one: Array, other: Array, where: Array) -> float:
    """Return the relative error over the positions that hold tokens.

    If the leading axes are not those of `where`, it is the error over all elements.
    """
    fits = one.shape[: where.ndim] == where.shape
    return relative_error(one, other, where if fits else None)
