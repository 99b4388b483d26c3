"""Compare two graphs of any kind, such as encoders and CNNs, on sampled or given inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.graph.operators import random_operators
from passopt.predictions.divergence import divergence
from passopt.targets.onnxruntime.session import Session
from passopt.verification.dequantised_twin import is_quantized
from passopt.verification.divergence import judged_rows
from passopt.verification.original_on_codes import outputs_on_codes
from passopt.verification.own_codes import outputs_against_own_codes
from passopt.verification.report import Row, VerifyReport
from passopt.verification.sampling.body_runs import BodyRuns, has_bodies
from passopt.verification.sampling.given_inputs import check_inputs, stated_input
from passopt.verification.sampling.lengths import free_inputs, takes_empty
from passopt.verification.sampling.samples import ORDINARY, hidden_rows
from passopt.verification.sampling.trace import legal_samples
from passopt.verification.tolerances import TOLERANCES, is_bf16_twin, judgement_of, precision_of
from passopt.verification.value_rows import (
    COMPARISON,
    NOTHING,
    Judge,
    Opener,
    Runner,
    Samples,
    Ties,
    is_float,
    random_outputs,
    weight_rows,
)

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: How far a lossy candidate may move numbers, for finding integers that it may pick otherwise.
_STEPS: Mapping[str, float] = {
    "fp16": 1e-3,
    "bf16 and wider": 8e-3,
    "int8": 1 / 127,
    "int8 activations": 1 / 64,
    "int4": 1 / 7,
}
#: Predictions judge the logits of a lossy candidate. Where these are nearly equal for all tokens, they would hide even
#: a wrong sign, so the numbers may differ by some times the tolerance of other outputs at most.
_GROSS = 3
#: The name of the only scenario if the inputs were given.
GIVEN = "given inputs"


def verify_any(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    given: Mapping[str, Array] | None = None,
    threads: int = 2,
    scratch: Path | None = None,
    notes: Sequence[str] = (),
) -> VerifyReport:
    """Run two graphs on the same inputs and compare all outputs.

    Args:
        reference: The original, without collectives.
        candidate: The result.
        seed: The seed of sampled inputs.
        tolerance: A relative error that replaces the default one.
        given: Inputs by name, in place of sampled ones.
        threads: The number of threads that a graph runs with.
        scratch: The folder for temporary files.
        notes: Notes that the report begins with.

    Raises:
        ModelError: If the interfaces differ, the original runs on no sampled inputs, or all outputs are random.
        UsageError: If the given inputs do not fit.
    """
    _check_interfaces(reference, candidate)
    session = functools.partial(Session, threads=threads, scratch=scratch, optimize=False)
    first = session(reference)
    judgement = judgement_of(precision_of(reference), precision_of(candidate))
    kind, lossy = judgement.kind, judgement.lossy
    samples = _sampled(reference, first, seed, lossy) if given is None else _given(reference, given)
    second = session(candidate)
    allowed = tolerance if tolerance is not None else TOLERANCES[kind].outputs
    bar = judgement.bar(tolerance)

    def opened(model: onnx_ir.Model) -> Runner:
        return functools.partial(_run, session(model), model)

    empties = given is not None or takes_empty(candidate)
    random, told = _random(reference, candidate, opened, samples)
    safe = [item for item in samples if empties or not _has_empty(item[1])]
    told += _unrun(candidate, opened, safe)
    judge = Judge(allowed, judgement.differ, Ties(reference, opened, _STEPS.get(kind) if lossy else None))
    rows: list[Row] = []
    pairs: list[tuple[Array, Array]] = []
    for name, feeds in samples:
        expected = _named("original", feeds, first.run)
        if _has_empty(feeds) and not empties:
            told.append(f"not compared on empty inputs, {name}: kernels of the candidate may not survive them")
            continue
        try:
            found = _named("candidate", feeds, functools.partial(_run, second, candidate))
        except ModelError as error:
            if not _has_empty(feeds):
                raise
            told.append(f"not compared on empty inputs, {name}: {error}")
            continue
        for output, value in expected.items():
            if output in random:
                continue
            row = judge.row(name, output, value, found[output], feeds)
            if bar is not None and math.isfinite(row.error) and _is_logits(output, value):
                pairs.append(_logit_rows(value, found[output]))
                row = dataclasses.replace(row, tolerance=_GROSS * allowed)
            rows.append(row)
    if not any(row.note not in NOTHING for row in rows):
        raise ModelError("nothing was compared: all outputs are empty or hold no number; give other `inputs=FILE.npz`")
    within = f"{kind}: outputs within {allowed:.0e}" + (", logits by their predictions" if pairs else "")
    said = [*notes, *told, within, f"inputs: {', '.join(stated_input(v) for v in free_inputs(reference))}"]
    if bar is not None and pairs:
        source = "the given inputs" if given is not None else "random inputs"
        rows = [*judged_rows(COMPARISON, bar, divergence(pairs), source), *rows]
    if lossy and tolerance is None:
        rows += weight_rows(reference, candidate, bf16=is_bf16_twin(reference) or is_bf16_twin(candidate))
    if is_quantized(candidate) and tolerance is None:
        try:
            rows += outputs_against_own_codes(candidate, opened, safe, judge.ties, scratch)
        except ModelError as error:
            said.append(f"not compared with its own codes: {error}")
        if kind.startswith("int"):
            rows += outputs_on_codes(reference, candidate, opened, safe, judge.ties, scratch)
    return VerifyReport(tuple(rows), tuple(said), lossy=kind if lossy and tolerance is None else "")


def _named(role: str, feeds: Mapping[str, Any], run: Runner) -> Mapping[str, Any]:
    """Return what a model computes; an error names the model and the inputs."""
    try:
        return run(feeds)
    except ModelError as error:
        fed = ", ".join(
            f"{name} {value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else name
            for name, value in feeds.items()
        )
        raise ModelError(f"the {role} does not run on {fed}: {error}. Check lengths and ids, or give others") from error


def _random(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, opened: Opener, samples: Samples
) -> tuple[set[str], list[str]]:
    """Return the outputs that differ from run to run, and a note that says so.

    Raises:
        ModelError: If all outputs do, so that nothing can be compared.
    """
    operators = sorted({*random_operators(reference), *random_operators(candidate)})
    if not operators:
        return set(), []
    found = random_outputs(opened, reference, samples[0][1])
    names, drawn = ", ".join(sorted(found)), ", ".join(operators)
    if len(found) == len(reference.graph.outputs):
        raise ModelError(
            f"nothing can be compared: the graph draws random numbers ({drawn}), and each of its outputs ({names}) "
            f"differs from run to run; compare the graphs without these operators"
        )
    return found, [f"not compared: {names}, since the graph draws random numbers ({drawn})"] if found else []


def _has_empty(feeds: Mapping[str, Any]) -> bool:
    """Return whether an input is empty: kernels differ in whether they take that, and nobody asks a model about it."""
    return any(isinstance(value, np.ndarray) and not value.size for value in feeds.values())


def _unrun(model: onnx_ir.Model, opened: Opener, samples: Samples) -> list[str]:
    """Return a note for each branch and body of the candidate that no inputs let run."""
    if not has_bodies(model):
        return []
    marked = model.clone()
    runs = BodyRuns(marked)
    run = opened(marked)
    for _, feeds in samples:
        with contextlib.suppress(ModelError):
            runs.take(dict(run(feeds)))
    return [f"not compared: the {place}, since none of the inputs let it run" for place in runs.unrun()]


def _check_interfaces(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    for what in ("inputs", "outputs"):
        one, other = ({value.name or "": value for value in getattr(m.graph, what)} for m in (reference, candidate))
        if one.keys() != other.keys():
            missing, extra = (", ".join(sorted(names)) or "none" for names in (one.keys() - other, other.keys() - one))
            raise ModelError(f"the candidate has other {what}: missing {missing}, added {extra}: not the same model")
        for name, value in one.items() if what == "inputs" else ():
            if not _takes_the_same(value, other[name]):
                raise ModelError(
                    f"the candidate has the input {stated_input(other[name])}, expected {stated_input(value)} as in "
                    f"the original: not the same model"
                )


def _takes_the_same(one: onnx_ir.Value, other: onnx_ir.Value) -> bool:
    """Return whether two inputs take the same values; floats are fed in the dtype that each of them states."""
    if one.type is None or other.type is None or one.type == other.type:
        return True
    return type(one.type) is type(other.type) and one.dtype in FLOATS and other.dtype in FLOATS


def _sampled(model: onnx_ir.Model, session: Session, seed: int, lossy: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return inputs on which the original runs; of lossy candidates only ordinary ones.

    What fp16 or int8 make of numbers of absurd size says nothing about the model.
    """
    samples, problem = legal_samples(model, session, seed)
    if lossy and any(value.dtype in FLOATS for value in free_inputs(model)):
        samples = [sample for sample in samples if sample.style.floats in ORDINARY] or samples
    if not samples:
        raise ModelError(
            f"no inputs were found on which the original runs: {problem}. Give some with `inputs=FILE.npz`, "
            f"one array for each of {', '.join(stated_input(value) for value in free_inputs(model))}"
        )
    names = [str(sample.lengths) for sample in samples]
    fed = _with_open_rows if lossy else dict
    return [
        (f"{name}, {index + 1}" if names.count(name) > 1 else name, fed(sample.feeds))
        for index, (name, sample) in enumerate(zip(names, samples, strict=True))
    ]


def _with_open_rows(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with masks to add that hide no whole row, of which each dtype makes something else."""
    result = dict(feeds)
    for name, array in feeds.items():
        hidden = hidden_rows(name, array)
        if hidden is not None:
            result[name] = np.where(hidden, np.zeros((), array.dtype), array)
    return result


def _given(model: onnx_ir.Model, given: Mapping[str, Array]) -> list[tuple[str, dict[str, Any]]]:
    return [(GIVEN, dict(check_inputs(model, given)))]


def _run(session: Session, model: onnx_ir.Model, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Run a model on the inputs of the reference, in the model's own dtypes."""
    dtypes = {value.name or "": value.dtype for value in model.graph.inputs}
    own = {
        name: _narrowed(value, dtype)
        if is_float(value) and (dtype := dtypes.get(name)) in FLOATS and dtype is not None
        else value
        for name, value in feeds.items()
    }
    return session.run(own)


def _narrowed(array: Array, dtype: onnx_ir.DataType) -> Array:
    """Return the numbers in a dtype; what it does not hold becomes its largest number, as of masks."""
    if array.dtype == dtype.numpy():
        return array
    limits: Any = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    wide = array.astype(np.float64)
    held = np.where(np.isfinite(wide), np.clip(wide, float(limits.min), float(limits.max)), wide)
    return np.asarray(held, dtype.numpy())


def _logit_rows(reference: Array, found: Array) -> tuple[Array, Array]:
    """Return the rows of logits but those that the original leaves undefined, as where a mask hides everything."""
    one, other = (array.reshape(-1, array.shape[-1]) for array in (reference, found))
    defined = ~np.isnan(one.astype(np.float64)).any(axis=-1)
    return one[defined], other[defined]


def _is_logits(name: str, value: Any) -> bool:
    floats = is_float(value) and value.ndim > 1 and value.size > 0
    return floats and name.lower().endswith("logits") and value.shape[-1] > 1
