"""Compare two models, or a model and its compiled folder: `passopt.verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from passopt.api import checked
from passopt.api.model import Model, ModelLike
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import UsageError
from passopt.reporting.reporter import SILENT, Bar, Reporter
from passopt.targets.onnxruntime.joined_ranks import load_any
from passopt.targets.tvm.compiled_folder import LIBRARY_NAME
from passopt.verification.report import VerifyReport
from passopt.verification.sampling.given_inputs import read_inputs
from passopt.verification.verify import VerifyOptions
from passopt.verification.verify import verify as compare


def verify(
    reference: ModelLike,
    candidate: ModelLike,
    *,
    text: Path | str | None = None,
    tokenizer: Path | str | None = None,
    max_tokens: int = 2048,
    tolerance: float | None = None,
    seed: int = 0,
    max_positions: int | None = None,
    layerwise: bool = False,
    inputs: Path | str | Mapping[str, Any] | None = None,
    reporter: Reporter = SILENT,
) -> VerifyReport:
    """Run two models side by side, and compare their outputs and, with a text, their predictions.

    Decoders run a prefill, left padding, decoding with a cache, a chunked prefill, and the last positions. Other graphs
    run on inputs that are sampled by type and name, or on inputs that are given. A lossy candidate, such as int8, is
    judged by its predictions: KL divergence and top-1 agreement with the original.

    Args:
        reference: The original: a model, a file or a folder.
        candidate: The result: a model, a file, a folder, a folder of ranks, or a compiled folder.
        text: A UTF-8 file whose perplexity is compared too.
        tokenizer: A folder, tokenizer.json or tokenizer.model; None for the one beside the reference.
        max_tokens: The number of tokens of the text to use, from its beginning.
        tolerance: The largest relative error of outputs; None for a default by number type.
        seed: The seed of the random inputs.
        max_positions: The longest sequence to run; None for what the tables of positions hold.
        layerwise: Run one decoder layer at a time, in little memory.
        inputs: Arrays by the names of inputs, or an .npz file of them, to run both models on in place of sampled ones.
        reporter: Is told about the layers that are done.

    Returns:
        A report with a row per scenario and output. `report.ok` is False if anything is beyond its tolerance.

    Raises:
        ModelError: A model or the tokenizer cannot be read, or the two differ in size, inputs or outputs.
        UsageError: The text or the inputs cannot be read or do not fit, or an option does not go with these models.
    """
    checked.whole("max_tokens", max_tokens, 1)
    checked.whole("max_positions", max_positions, 1)
    checked.whole("seed", seed, 0)
    checked.tolerance("tolerance", tolerance)
    tokens = _tokens(Path(text), _tokenizer_path(reference, tokenizer), max_tokens) if text is not None else ()
    layers = _Layers(reporter)
    settings = VerifyOptions(
        seed=seed,
        tolerance=tolerance,
        max_positions=max_positions,
        tokens=tokens,
        layerwise=layerwise,
        inputs=_given(inputs),
        on_piece=layers,
    )
    try:
        return _report(reference, candidate, settings)
    finally:
        layers.close()


def _given(inputs: Path | str | Mapping[str, Any] | None) -> dict[str, np.ndarray[Any, np.dtype[Any]]] | None:
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return {name: np.asarray(array) for name, array in inputs.items()}
    return read_inputs(checked.path("inputs", inputs))


class _Layers:
    """A progress bar of the layers that are done, opened with the first of them, which tells how many there are."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._bar: Bar | None = None

    def __call__(self, number: int, count: int) -> None:
        self._bar = self._bar or self._reporter.bar("comparing layers", count, in_items=True)
        self._bar(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _report(reference: ModelLike, candidate: ModelLike, settings: VerifyOptions) -> VerifyReport:
    original = _graph(reference)
    if (
        isinstance(candidate, (Model, onnx_ir.Model))
        or not (checked.path("the candidate", candidate) / LIBRARY_NAME).is_file()
    ):
        return compare(original, _graph(candidate), options=settings)
    if settings.inputs is not None:
        raise UsageError("`inputs`: a compiled library has a cache of its own; compare it on sampled inputs")
    if settings.layerwise:
        raise UsageError("`layerwise`: a compiled library runs as a whole; compare it without")
    from passopt.verification.verify_compiled import verify_compiled

    return verify_compiled(original, Path(candidate), settings)


def _graph(model: ModelLike) -> onnx_ir.Model:
    """Return the graph of a model; the ranks of a folder of ranks are joined in one graph."""
    if isinstance(model, Model):
        return model.ir
    return model if isinstance(model, onnx_ir.Model) else load_any(checked.path("a model", model))


def _tokenizer_path(reference: ModelLike, named: Path | str | None) -> Path:
    """Return the tokenizer that was named, or the folder of the reference."""
    if named is not None:
        return Path(named)
    beside = reference.path if isinstance(reference, Model) else reference
    if beside is None or isinstance(beside, onnx_ir.Model):
        raise UsageError("a text needs a tokenizer, and a model in memory has none beside it; name one")
    beside = Path(beside)
    return beside if beside.is_dir() else beside.parent


def _tokens(text: Path, tokenizer: Path, most: int) -> tuple[int, ...]:
    """Return the first tokens of a text file, at most `most`."""
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{text}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{text}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return tuple(load_tokenizer(tokenizer).encode_text(content)[:most])
