"""Compare two graphs of any kind, such as encoders and CNNs, on sampled or given inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.operators import random_operators
from passopt.ir.weights.expressions import DataType
from passopt.passes.framework.accuracy import QualityBar
from passopt.targets.onnxruntime.session import Session
from passopt.verification.dequantised_twin import (
    dequantised_twin,
    dequantised_weights,
    dynamic_linears,
    without_quantised_rows,
)
from passopt.verification.divergence import divergence, judged_rows
from passopt.verification.quantised_weights import ON_CODES, on_codes
from passopt.verification.report import Row, VerifyReport
from passopt.verification.sampling.lengths import free_inputs
from passopt.verification.sampling.samples import ORDINARY, hidden_rows
from passopt.verification.sampling.trace import legal_samples
from passopt.verification.value_rows import (
    COMPARISON,
    NOTHING,
    Judge,
    Opener,
    Ties,
    is_float,
    random_outputs,
    weight_rows,
)

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: How far a lossy candidate may move numbers, for finding integers that it may pick otherwise.
_STEPS: Mapping[str, float] = {"fp16": 1e-3, "bf16 and wider": 8e-3, "int8": 1 / 127, "int8 activations": 1 / 64}
#: Predictions judge the logits of a lossy candidate. Where these are nearly equal for all tokens, they would hide even
#: a wrong sign, so the numbers may differ by some times the tolerance of other outputs at most.
_GROSS = 3
#: The name of the only scenario if the inputs were given.
GIVEN = "given inputs"


def read_inputs(path: Path) -> dict[str, Array]:
    """Read the arrays of an .npz file by name.

    Raises:
        UsageError: If the file cannot be read, or holds something else than arrays of numbers.
    """
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError(f"{path}: holds one array, expected an .npz file of arrays by the names of inputs")
            with file:
                return {name: file[name] for name in file.files}
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{path}: is no .npz file of arrays: {error}. Write one with numpy.savez") from error
    except Exception as error:  # zipfile and zlib have errors of their own for damaged files
        raise UsageError(f"{path}: is damaged: {error}") from error


def check_inputs(model: onnx_ir.Model, given: Mapping[str, Array]) -> dict[str, Array]:
    """Return the given inputs in the dtypes of the model's inputs.

    Raises:
        UsageError: If a name is no input, an input has no array, or an array does not fit.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    unknown = sorted(given.keys() - inputs.keys())
    missing = sorted({value.name or "" for value in free_inputs(model)} - given.keys())
    if unknown or missing:
        parts = [f"the model has no input {', '.join(unknown)}"] if unknown else []
        parts += [f"the file has no array for {', '.join(missing)}"] if missing else []
        raise UsageError(
            f"{'; '.join(parts)}. The inputs are: {', '.join(_stated(value) for value in inputs.values())}"
        )
    _check_symbols(inputs, given)
    return {name: _fitting(inputs[name], array) for name, array in given.items()}


def _check_symbols(inputs: Mapping[str, onnx_ir.Value], given: Mapping[str, Array]) -> None:
    """Raise UsageError if a symbol has different lengths in two arrays; arrays of other ranks are refused later."""
    known: dict[str, tuple[int, str]] = {}
    for name, array in given.items():
        shape = inputs[name].shape
        for axis, dim in enumerate(() if shape is None or len(shape) != array.ndim else shape.dims):
            symbol = None if isinstance(dim, int) else dim.value
            if symbol is None:
                continue
            length, other = known.setdefault(symbol, (array.shape[axis], name))
            if length != array.shape[axis]:
                raise UsageError(
                    f"{symbol} is {length} in the array for {other} and {array.shape[axis]} in that for {name}; "
                    f"the model gives both the same length"
                )


def _stated(value: onnx_ir.Value) -> str:
    dims = "" if value.shape is None else f"[{', '.join(str(dim) for dim in value.shape.dims)}]"
    return f"{value.name} {value.dtype.name if value.dtype is not None else '?'}{dims}"


def _fitting(value: onnx_ir.Value, array: Array) -> Array:
    dims = None if value.shape is None else list(value.shape.dims)
    fits = dims is None or (
        len(dims) == array.ndim
        and all(not isinstance(dim, int) or dim == length for dim, length in zip(dims, array.shape, strict=True))
    )
    if not fits:
        raise UsageError(f"the array for {value.name} has the shape {list(array.shape)}, expected {_stated(value)}")
    if value.dtype is None or value.dtype == DataType.STRING or value.dtype.numpy() == array.dtype:
        return array
    kinds = {array.dtype.kind, value.dtype.numpy().kind}
    if not (kinds <= set("iu") or (value.dtype in FLOATS and array.dtype.kind == "f")):
        raise UsageError(f"the array for {value.name} is {array.dtype}, expected {_stated(value)}")
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = np.asarray(array.astype(value.dtype.numpy()))
    if not _holds(fitted, array):
        raise UsageError(f"the array for {value.name} is {array.dtype} with numbers beyond {_stated(value)}")
    return fitted


def _holds(fitted: Array, array: Array) -> bool:
    """Return whether an array kept its numbers in another dtype, but for the rounding of floats."""
    if array.dtype.kind in "iu":
        return bool(np.array_equal(fitted.astype(object), array.astype(object)))
    return bool(np.array_equal(np.isfinite(fitted.astype(np.float64)), np.isfinite(array.astype(np.float64))))


def verify_any(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    tolerances: Mapping[str, float],
    bars: Mapping[str, QualityBar | None],
    *,
    seed: int = 0,
    tolerance: float | None = None,
    given: Mapping[str, Array] | None = None,
    threads: int = 2,
    scratch: Path | None = None,
    notes: Sequence[str] = (),
    bf16: tuple[bool, bool] = (False, False),
) -> VerifyReport:
    """Run two graphs on the same inputs and compare all outputs.

    Args:
        reference: The original, without collectives.
        candidate: The result.
        tolerances: The relative error of outputs by the kind of comparison.
        bars: What lossy candidates with logits are judged by, by the kind of comparison.
        seed: The seed of sampled inputs.
        tolerance: A relative error that replaces the default one.
        given: Inputs by name, in place of sampled ones.
        threads: The number of threads that a graph runs with.
        scratch: The folder for temporary files.
        notes: Notes that the report begins with.
        bf16: Which of the two stand for a graph in bf16, as fp32.

    Raises:
        ModelError: If the interfaces differ, the original runs on no sampled inputs, or all outputs are random.
        UsageError: If the given inputs do not fit.
    """
    _check_interfaces(reference, candidate)
    session = functools.partial(Session, threads=threads, scratch=scratch, optimize=False)
    first = session(reference)
    kind, lossy = kind_of(reference, candidate, bf16)
    samples = _sampled(reference, first, seed, lossy) if given is None else _given(reference, given)
    second = session(candidate)
    allowed = tolerance if tolerance is not None else tolerances[kind]
    bar = bars.get(kind) if tolerance is None and lossy else None

    def opened(model: onnx_ir.Model) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        return session(model).run

    random, told = _random(reference, candidate, opened, samples)
    judge = Judge(allowed, lossy, Ties(reference, opened, _STEPS.get(kind) if lossy else None))
    rows: list[Row] = []
    pairs: list[tuple[Array, Array]] = []
    for name, feeds in samples:
        expected = _named("original", feeds, first.run)
        found = _named("candidate", feeds, functools.partial(_run, second, candidate))
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
    said = [*notes, *told, within, f"inputs: {', '.join(_stated(v) for v in free_inputs(reference))}"]
    if bar is not None and pairs:
        source = "the given inputs" if given is not None else "random inputs"
        rows = [*judged_rows(COMPARISON, bar, divergence(pairs), source), *rows]
    if lossy and tolerance is None:
        rows += weight_rows(reference, candidate, bf16=any(bf16))
    if lossy and tolerance is None and "int8" in kind:
        plain = Judge(
            tolerances["fp16" if DataType.FLOAT16 in _floats(reference) else "fp32"], False, judge.ties, ON_CODES
        )
        rows += _on_own_codes(reference, candidate, opened, samples, plain, scratch)
    return VerifyReport(tuple(rows), tuple(said), lossy=kind if lossy and tolerance is None else "")


def _named(
    role: str, feeds: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return what a model computes; an error names the model and the inputs."""
    try:
        return run(feeds)
    except ModelError as error:
        fed = ", ".join(
            f"{name} {value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else name
            for name, value in feeds.items()
        )
        raise ModelError(f"the {role} does not run on {fed}: {error}. Check lengths and ids, or give others") from error


def _on_own_codes(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    opened: Opener,
    samples: Sequence[tuple[str, dict[str, Any]]],
    judge: Judge,
    scratch: Path | None,
) -> list[Row]:
    """Return the rows of the candidate, with plain activations, against the original with the numbers of its codes.

    There nothing but sums in another order may differ, so that a wrong norm or embedding shows.
    """
    with tempfile.TemporaryDirectory(prefix="passopt-codes-", dir=scratch) as folder:
        original = on_codes(reference, candidate, Path(folder))
        if original is None:
            return []
        first, second = opened(original), opened(dequantised_twin(without_quantised_rows(candidate), Path(folder)))
        return [
            judge.row(name, output, value, found[output], feeds)
            for name, feeds in samples
            for expected, found in [(first(feeds), second(feeds))]
            for output, value in expected.items()
        ]


def _random(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, opened: Opener, samples: Sequence[tuple[str, dict[str, Any]]]
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


def _check_interfaces(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    for what in ("inputs", "outputs"):
        one, other = ({value.name or "": value for value in getattr(m.graph, what)} for m in (reference, candidate))
        if one.keys() != other.keys():
            missing, extra = (", ".join(sorted(names)) or "none" for names in (one.keys() - other, other.keys() - one))
            raise ModelError(f"the candidate has other {what}: missing {missing}, added {extra}: not the same model")
        for name, value in one.items() if what == "inputs" else ():
            if not _takes_the_same(value, other[name]):
                raise ModelError(
                    f"the candidate has the input {_stated(other[name])}, expected {_stated(value)} as in the "
                    f"original: not the same model"
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
            f"one array for each of {', '.join(_stated(value) for value in free_inputs(model))}"
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
    """Run the candidate on the inputs of the reference, in the candidate's own dtypes."""
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


def kind_of(reference: onnx_ir.Model, candidate: onnx_ir.Model, bf16: tuple[bool, bool]) -> tuple[str, bool]:
    """Return the key of the tolerance, and whether the candidate is lossy by what its weights and dtypes say.

    `bf16` says which of the two stand for a graph in bf16, as fp32. Two graphs in the same dtypes should agree.
    """
    if dynamic_linears(candidate) or dynamic_linears(reference):
        return "int8 activations", bool(dynamic_linears(candidate)) and not dynamic_linears(reference)
    if dequantised_weights(candidate) and not dequantised_weights(reference):
        return "int8", True
    if any(bf16):
        return ("bf16", False) if all(bf16) else ("bf16 and wider", True)
    one, other = _floats(reference), _floats(candidate)
    return ("fp16", one != other) if DataType.FLOAT16 in one | other else ("fp32", False)


def _floats(model: onnx_ir.Model) -> set[DataType | None]:
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return {value.dtype for value in values} & FLOATS


def _logit_rows(reference: Array, found: Array) -> tuple[Array, Array]:
    """Return the rows of logits but those that the original leaves undefined, as where a mask hides everything."""
    one, other = (array.reshape(-1, array.shape[-1]) for array in (reference, found))
    defined = ~np.isnan(one.astype(np.float64)).any(axis=-1)
    return one[defined], other[defined]


def _is_logits(name: str, value: Any) -> bool:
    floats = is_float(value) and value.ndim > 1 and value.size > 0
    return floats and name.lower().endswith("logits") and value.shape[-1] > 1
