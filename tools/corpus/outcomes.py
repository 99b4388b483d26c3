"""Run passes over one written model, and say what became of each: ok, refused, wrong, invalid, a crash.

| outcome | means |
| --- | --- |
| unchanged | the pass left the model as it was |
| ok | the numbers, dtypes and shapes are equal within the declared accuracy |
| not comparable | no engine runs both; the checker accepts the result, and onnxruntime where it accepts the original |
| sensitive | more than declared, and no more than one rounding of the model's inputs moves its outputs |
| beyond | a lossy pass lost up to ten times what it declares, or what rounding all numbers loses |
| refused | an error with a text for the user |
| unstable | a second run changes the result again, or `modified` is not what happened |
| wrong | other numbers, dtypes or shapes, or a failure while the result runs |
| invalid | the checker or onnxruntime refuse the result, and accept the original |
| crash | any other exception, or an error that is a defect of passopt by its class or text |
| hang | the time limit passed, or the process died |
| alarm | with `--numeric`: `--verify-each=numeric` accuses a pass whose result is right |
| not read | passopt refuses to load the model |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir

import passopt.ir
from cases import Case
from comparison import Comparison, Outcome, Result, is_accepted
from passopt.ir.errors import ModelError, PassoptError, VerifyError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.serialization.model_files import MODEL_NAME, file_weights, model_bytes, save_materialized
from passopt.ir.serialization.text import WITHOUT_NUMBERS, parse_model, print_model
from passopt.passes.framework.accuracy import EXACT, Accuracy
from passopt.passes.framework.base import Pass
from passopt.passes.pipeline.expectations import parse_expectation
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.verification.rewrites.check import NumericCheck, Violation
from variants import Written

OUTCOMES = (
    "unchanged",
    "ok",
    "not comparable",
    "sensitive",
    "beyond",
    "refused",
    "unstable",
    "wrong",
    "invalid",
    "crash",
    "hang",
    "alarm",
    "not read",
)
#: Outcomes that are defects of passopt.
FAULTS = ("unstable", "wrong", "invalid", "crash", "hang", "alarm")

#: Steps of the corpus that are no passes: writing a model as it was read, and its text.
SAVE, TEXT = "(save)", "(text)"
#: What a worker does before the first step: running the model as it is, which is no outcome.
ORIGINAL = "(original)"
#: The pipelines that run besides every pass by itself.
PIPELINES = (
    "legalize{opset=18}",
    "cast{dtype=bf16}",
    "fold-constants,canonicalize,fold-constants,cse,dead-code",
    "simplify,fold-constants,canonicalize",
    "fuse",
    "baichuan2",
    "tp",
    "int8",
    "int8{activations=dynamic}",
)
_SEVERITY = {"exact": 0, "reassociated": 1, "lossy": 2}
#: Words that mean something to people who know the source only.
_INTERNAL = re.compile(r"Traceback|NoneType|has no attribute|<class|object at 0x|KeyError|IndexError|AssertionError")


#: The bytes of a model, with the digests of the weights that its file does not hold.
_Bytes: TypeAlias = tuple[bytes, tuple[str, ...]]
#: Outcomes by step of the variants of one case that take the inputs of the case, by what was read.
Memory: TypeAlias = dict[_Bytes, dict[str, Outcome]]


class Subject:
    """One model as a variant writes it, with what engines make of it; made in an empty folder."""

    def __init__(
        self, case: Case, written: Written, folder: Path, memory: Memory | None = None, *, numeric: bool = False
    ) -> None:
        self._numeric = numeric
        self._memory = memory if memory is not None else {}
        self.case, self.written, self.folder = case, written, folder
        self.path = folder / "original.onnx"
        model = onnx.ModelProto()
        model.CopyFrom(written.model)
        if written.is_external:
            onnx.save_model(model, self.path, save_as_external_data=True, location="original.data", size_threshold=0)
        else:
            onnx.save_model(model, self.path)
        self.comparison = Comparison(case, written, self.path)
        self._memo: dict[tuple[bytes, tuple[str, ...], str], Outcome] = {}
        self._before: _Bytes | None = None
        self._text_before = ""
        self._number = 0

    def run_original(self) -> None:
        """Run the model as it is in onnxruntime."""
        self.comparison.run_original()

    def steps(self, names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        """Yield every step with the call that takes it; only saving, where that goes wrong already."""
        try:
            model = passopt.ir.load_model(self.path)
            error = None
        except Exception as caught:
            error = caught
        if error is not None:
            outcome = _of_error(error)
            kind = "not read" if outcome.kind == "refused" else outcome.kind
            if kind == "not read" and not is_accepted(self.path):
                return
            yield SAVE, lambda: Outcome(kind, outcome.detail)
            return
        taken = self._outcomes_of_equal(model)
        saved = self._step(SAVE, model)
        if saved.kind in FAULTS or SAVE in names:
            yield SAVE, lambda: saved
        for name in names if saved.kind not in FAULTS else ():
            if name != SAVE:
                yield name, lambda name=name: self._remembered(name, model, taken)

    def _outcomes_of_equal(self, model: onnx_ir.Model) -> dict[str, Outcome]:
        """Return where to keep outcomes: shared with a variant that was read as the same model and has the same inputs.

        Steps see nothing else of a variant; that the original computes the same is compared in the step that saves.
        """
        self._before = _bytes(model)
        if any(feeds is not self.case.feeds for feeds in self.written.feeds):
            return {}
        return self._memory.setdefault(self._before, {})

    def _remembered(self, name: str, model: onnx_ir.Model, taken: dict[str, Outcome]) -> Outcome:
        if name not in taken:
            taken[name] = self._step(name, model)
        return taken[name]

    def _step(self, name: str, model: onnx_ir.Model) -> Outcome:
        try:
            if name == TEXT:
                return self._text(model)
            return self._passes(() if name == SAVE else _resolved(name).passes, name, model)
        except Exception as error:
            return _of_error(error)

    def _text(self, model: onnx_ir.Model) -> Outcome:
        text = print_model(model, fold=False)
        if re.search(r'= \["digest": ', text) or WITHOUT_NUMBERS.search(text):
            return Outcome("refused", "the text holds a digest or dots in place of a tensor, not its numbers")
        try:
            again = parse_model(text)
        except ModelError as error:
            return Outcome("invalid", f"the printed text is not read: {error}")
        if print_model(again, fold=False) != text:
            return Outcome("unstable", "the text of the model that was read from it is another one")
        return self._compare(again, EXACT, changes_interface=False)

    def _passes(self, passes: Sequence[Pass], name: str, model: onnx_ir.Model) -> Outcome:
        changed = model.clone()
        pipeline = None if name == SAVE else _resolved(name)
        wanted = [] if pipeline is None else pipeline.expectations
        known = [item.name for item in passes]
        records = run_passes(changed, passes, expectations=[parse_expectation(text, known) for text in wanted])
        accuracy = max((item.accuracy for item in passes), key=_severity, default=EXACT)
        if not passes:
            return self._compare(changed, accuracy, changes_interface=False)
        differs = _bytes(changed) != self._before
        modified = any(record.result.modified for record in records)
        if differs and not modified:
            self._text_before = self._text_before or print_model(model, fold=False)
            if print_model(changed, fold=False) != self._text_before:
                return Outcome("unstable", "the text changed, and `modified` is false")
        if not differs:
            return Outcome("unchanged")
        outcome = self._compare(changed, accuracy, changes_interface=any(item.changes_interface for item in passes))
        if self._numeric and outcome.kind in {"ok", "wrong"}:
            outcome = _with_numeric(model, passes, outcome)
        if len(passes) == 1 and outcome.kind not in FAULTS:
            again = passes[0].run(changed)
            if again.modified:
                return Outcome("unstable", "a second run changes the model again")
        return outcome

    def _compare(self, model: onnx_ir.Model, accuracy: Accuracy, *, changes_interface: bool) -> Outcome:
        if degree_of(model) > 1:
            model = join_ranks(rank_models(model))
        key = (*_bytes(model), str(accuracy))
        if key not in self._memo:
            self._number += 1
            folder = self.folder / f"result{self._number}"
            folder.mkdir()
            save_materialized(model, folder)
            result = Result(folder / MODEL_NAME, accuracy, changes_interface)
            self._memo[key] = self.comparison.outcome(result)
        return self._memo[key]


def _with_numeric(model: onnx_ir.Model, passes: Sequence[Pass], outcome: Outcome) -> Outcome:
    """Return the outcome with what numeric verification says: an alarm on a right result, or a wrong one seen."""
    try:
        run_passes(model.clone(), passes, instruments=[NumericCheck()])
    except Violation as violation:
        if outcome.kind == "wrong":
            return Outcome("wrong", f"{outcome.detail}; numeric verification finds it")
        # Samples are more than the inputs of the case; a lossy pass may lose more on some of them.
        is_lossy = any(item.accuracy.kind == "lossy" for item in passes)
        return Outcome("beyond" if is_lossy else "alarm", str(violation))
    unseen = "; numeric verification does not find it"
    return Outcome("wrong", outcome.detail + unseen) if outcome.kind == "wrong" else outcome


_PIPELINES: dict[str, Any] = {}


def _resolved(name: str) -> Any:
    if name not in _PIPELINES:
        _PIPELINES[name] = resolve(name)
    return _PIPELINES[name]


def _severity(accuracy: Accuracy) -> tuple[int, float]:
    return _SEVERITY[accuracy.kind], accuracy.budget or 0.0


def _bytes(model: onnx_ir.Model) -> _Bytes:
    weights = file_weights(model)
    return model_bytes(model, weights), tuple(weight.digest() for weight in weights.values())


def _of_error(error: Exception) -> Outcome:
    """Say whether an error is a refusal or a defect."""
    text = f"{type(error).__name__}: {error}"
    is_defect = isinstance(error, VerifyError) or not isinstance(error, PassoptError)
    is_defect = is_defect or ": failed with " in text or bool(_INTERNAL.search(text))
    return Outcome("crash" if is_defect else "refused", text.strip())
