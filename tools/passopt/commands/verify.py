"""`passopt verify`: two models side by side in onnxruntime, or a model and what was compiled of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from passopt.commands.progress import Progress
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import CheckError, UsageError
from passopt.targets.onnxruntime.joined_ranks import load_any
from passopt.targets.tvm.compiled_folder import LIBRARY_NAME
from passopt.verification.report import VerifyReport
from passopt.verification.verify import VerifyOptions
from passopt.verification.verify import verify as compare


def verify(options: argparse.Namespace) -> int:
    """Exit 1 if anything is beyond its tolerance."""
    tokens = _tokens(options) if options.text else ()
    layers = _Layers()
    settings = VerifyOptions(
        seed=options.seed,
        tolerance=options.tolerance,
        max_positions=options.max_positions,
        tokens=tokens,
        layerwise=options.layerwise,
        on_piece=layers,
    )
    try:
        report = _report(options, settings)
    finally:
        layers.close()
    print(json.dumps(report.to_json(), indent=2) if options.json else report.to_text())
    if not report.ok:
        raise CheckError(f"{options.candidate} is not equivalent to {options.reference} within the tolerances above")
    return 0


class _Layers:
    """A bar of the layers that are done; how many there are, the first of them tells."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, number: int, count: int) -> None:
        self._bar = self._bar or Progress("comparing layers", count, in_items=True)
        self._bar(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _report(options: argparse.Namespace, settings: VerifyOptions) -> VerifyReport:
    reference, candidate = load_any(options.reference), Path(options.candidate)
    if not (candidate / LIBRARY_NAME).is_file():
        return compare(reference, load_any(options.candidate), options=settings)
    if settings.layerwise:
        raise UsageError("--layerwise: a compiled library runs as a whole; compare it without")
    from passopt.verification.verify_compiled import verify_compiled

    return verify_compiled(reference, candidate, settings)


def _tokens(options: argparse.Namespace) -> tuple[int, ...]:
    """The text as token ids, by the tokenizer beside the reference."""
    beside = Path(options.reference)
    folder = beside if beside.is_dir() else beside.parent
    try:
        text = Path(options.text).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{options.text}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{options.text}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    tokenizer = load_tokenizer(Path(options.tokenizer) if options.tokenizer else folder)
    return tuple(tokenizer.encode_text(text)[: options.max_tokens])
