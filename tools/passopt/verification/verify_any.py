"""Compare two graphs of any kind, such as encoders and CNNs, on sampled or given inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.relative_error import operator_error
from passopt.ir.weights.expressions import DataType
from passopt.passes.framework.accuracy import QualityBar
from passopt.targets.onnxruntime.session import Session
from passopt.verification.dequantised_twin import dequantised_weights, dynamic_linears
from passopt.verification.divergence import divergence, judged_rows
from passopt.verification.report import Row, VerifyReport
from passopt.verification.sampling.lengths import free_inputs
from passopt.verification.sampling.trace import legal_samples

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

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
    return {name: _fitting(inputs[name], array) for name, array in given.items()}


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
    return array.astype(value.dtype.numpy())


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

    Raises:
        ModelError: If inputs or outputs differ in their names, or the original runs on none of the sampled inputs.
        UsageError: If the given inputs do not fit.
    """
    _check_names(reference, candidate)
    session = functools.partial(Session, threads=threads, scratch=scratch, optimize=False)
    first = session(reference)
    samples = _sampled(reference, first, seed) if given is None else _given(reference, given)
    second = session(candidate)
    kind = _kind(reference, candidate)
    allowed = tolerance if tolerance is not None else tolerances[kind]
    rows: list[Row] = []
    pairs: list[tuple[Array, Array]] = []
    bar = bars.get(kind) if tolerance is None and kind != "fp32" else None
    for name, feeds in samples:
        expected, found = first.run(feeds), _run(second, candidate, feeds)
        for output, reference_value in expected.items():
            rows.append(_row(name, output, reference_value, found[output], allowed))
            if _is_logits(output, reference_value):
                pairs.append(tuple(value.reshape(-1, value.shape[-1]) for value in (reference_value, found[output])))  # type: ignore[arg-type]
    judged = [pair for pair in pairs if pair[0].shape == pair[1].shape]
    said = [f"{kind}: outputs within {allowed:.0e}", f"inputs: {', '.join(_stated(v) for v in free_inputs(reference))}"]
    if bar is None or not judged:
        return VerifyReport(tuple(rows), (*notes, *said))
    shown = [row if not np.isfinite(row.error) else Row(**{**row.__dict__, "judged": False}) for row in rows]
    source = "the given inputs" if given is not None else "random inputs"
    rows = [*judged_rows("against the original", bar, divergence(judged), source), *shown]
    return VerifyReport(tuple(rows), (*notes, *said[1:]), lossy=kind)


def _check_names(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    for what in ("inputs", "outputs"):
        one, other = ({value.name or "" for value in getattr(model.graph, what)} for model in (reference, candidate))
        if one != other:
            missing, extra = ", ".join(sorted(one - other)) or "none", ", ".join(sorted(other - one)) or "none"
            raise ModelError(f"the candidate has other {what}: missing {missing}, added {extra}: not the same model")


def _sampled(model: onnx_ir.Model, session: Session, seed: int) -> list[tuple[str, dict[str, Any]]]:
    samples, problem = legal_samples(model, session, seed)
    if not samples:
        raise ModelError(
            f"no inputs were found on which the original runs: {problem}. Give some with `inputs=FILE.npz`, "
            f"one array for each of {', '.join(_stated(value) for value in free_inputs(model))}"
        )
    names = [str(sample.lengths) for sample in samples]
    return [
        (f"{name}, {index + 1}" if names.count(name) > 1 else name, dict(sample.feeds))
        for index, (name, sample) in enumerate(zip(names, samples, strict=True))
    ]


def _given(model: onnx_ir.Model, given: Mapping[str, Array]) -> list[tuple[str, dict[str, Any]]]:
    return [(GIVEN, dict(check_inputs(model, given)))]


def _run(session: Session, model: onnx_ir.Model, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Run the candidate on the inputs of the reference, in the candidate's own dtypes."""
    dtypes = {value.name or "": value.dtype for value in model.graph.inputs}
    own = {
        name: value.astype(dtype.numpy())
        if isinstance(value, np.ndarray) and (dtype := dtypes.get(name)) in FLOATS and dtype is not None
        else value
        for name, value in feeds.items()
    }
    return session.run(own)


def _kind(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> str:
    if dynamic_linears(candidate):
        return "int8 activations"
    if dequantised_weights(candidate) and not dequantised_weights(reference):
        return "int8"
    kinds = [_floats(model) for model in (reference, candidate)]
    return "fp16" if any(DataType.FLOAT16 in kind for kind in kinds) else "fp32"


def _floats(model: onnx_ir.Model) -> set[DataType | None]:
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return {value.dtype for value in values}


def _is_logits(name: str, value: Any) -> bool:
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 1 and value.size > 0
    return floats and name.lower().endswith("logits") and value.shape[-1] > 1


def _row(scenario: str, output: str, reference: Any, found: Any, tolerance: float) -> Row:
    comparison = "against the original"
    if isinstance(reference, list) or isinstance(found, list) or reference.dtype.kind not in "fiub":
        same = str(np.asarray(reference, object)) == str(np.asarray(found, object))
        return Row(comparison, scenario, output, 0.0 if same else float("inf"), tolerance)
    if reference.shape != found.shape:
        note = f"shape {list(found.shape)}, expected {list(reference.shape)}"
        return Row(comparison, scenario, output, float("inf"), tolerance, note)
    return Row(comparison, scenario, output, operator_error(reference, found), tolerance)
