"""Compare the file that a pass wrote with the original: what the checker accepts, and what engines compute."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

import passopt.ir
from cases import Case
from dtypes import as_declared, as_held, cast, like, short_dtype
from engines import Evaluator, Outputs, Refused, RoundingEvaluator, Runtime, difference, largest_error, movement
from passopt.ir.dtypes import FLOATS
from passopt.ir.serialization.inference import complete_all_types
from passopt.ir.serialization.model_files import MODEL_NAME, save_materialized
from passopt.passes.framework.accuracy import EXACT, REASSOCIATED, Accuracy
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from variants import Written

#: Operators whose fp16 kernels in onnxruntime 1.32 read memory that is not theirs where an input is empty.
_FATAL = frozenset({"InstanceNormalization"})
#: How many times its budget a lossy pass may lose on a model of one operator before its result counts as wrong.
_FAR = 10.0
#: Operators whose outputs jump where a number passes a border, so that a small error of a number may become any error.
_JUMPS = frozenset(
    (
        *("ArgMax", "ArgMin", "Bernoulli", "Cast", "CastLike", "Ceil", "Compress", "DynamicQuantizeLinear", "Equal"),
        *("Floor", "Greater", "GreaterOrEqual", "Hardmax", "IsInf", "IsNaN", "Less", "LessOrEqual", "MaxRoiPool"),
        *("Mod", "NonMaxSuppression", "NonZero", "QuantizeLinear", "Round", "Shrink", "Sign", "ThresholdedRelu"),
        *("TopK", "Trunc", "Unique"),
    )
)
#: Seconds after which no more lengths are computed: the reference takes them for each pool over large images.
_ENOUGH = 1.0
#: How often a doubtful model runs again: what lies in memory that was not written may be the same a few times.
_REPEATED = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model in a step, with the reason or difference."""

    kind: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """A changed model on disk: its files, how exact it must be, and whether its interface may have other dtypes."""

    path: Path
    accuracy: Accuracy
    changes_interface: bool


class Comparison:
    """An original model on disk, with what engines compute of it; compares the results of passes with that."""

    def __init__(self, case: Case, written: Written, path: Path) -> None:
        self.case, self.written, self.path = case, written, path
        self._expected: dict[str, list[tuple[Mapping[str, Any], Outputs]]] = {}
        self._sessions: dict[tuple[str, Path], Any] = {}

    def run_original(self) -> None:
        """Run the model as it is in onnxruntime."""
        self.computed(Runtime)

    def outcome(self, result: Result) -> Outcome:
        """Return what became of a model that a pass changed."""
        if not _checker_message(self.path) and (message := _checker_message(result.path)):
            return Outcome("invalid", f"checker: {message}")
        doubtful = Outcome("not comparable")
        for engine in (Runtime, Evaluator):
            expected = self.computed(engine)
            try:
                session = self._session(engine, result.path)
            except Refused as refused:
                if engine is Runtime and not refused.lacks_kernel and _loads(self._try(engine, self.path)):
                    return Outcome("invalid", f"onnxruntime: {refused}")
                continue
            outcome = self._numbers(session, expected, result) if expected else None
            if outcome is not None and outcome.kind == "wrong" and engine is Runtime and self._engines_differ():
                doubtful = outcome  # such as the numbers that Attention gives for scores that a mask hides
                continue
            if outcome is not None:
                return outcome
        return doubtful

    def _engines_differ(self) -> bool:
        """Return whether onnxruntime and the reference compute other numbers of the original, on the case's inputs."""
        both = [self.computed(engine) for engine in (Runtime, Evaluator)]
        if not all(both):
            return False
        one, other = (outputs for ((_, outputs), *_) in both)
        return bool(difference(one, other, REASSOCIATED, is_random=self.case.is_random))

    def _numbers(
        self, session: Any, expected: Sequence[tuple[Mapping[str, Any], Outputs]], result: Result
    ) -> Outcome | None:
        """Compare what a result computes with what is expected; None if the engine lacks a kernel for it."""
        proto = onnx.load(result.path, load_external_data=False)
        compared = 0
        for number, (feeds, outputs) in enumerate(expected):
            given = as_declared(feeds, proto) if result.changes_interface else feeds
            if result.changes_interface:
                feeds = {name: like(value, feeds[name]) for name, value in given.items()}
                rounded = self._of_rounded(type(session), feeds)
                if rounded is None:
                    continue
                outputs = rounded
            if _ends_process(proto, given):
                continue
            try:
                found = session.run(given)
            except Refused as refused:
                if refused.lacks_kernel:
                    return None
                if number and self._is_fault_of_kernel(given, outputs, result):
                    continue
                return Outcome("wrong", f"the result fails on inputs {number}: {refused}")
            runs = [(self.path, feeds, outputs), (result.path, given, found)]
            if result.changes_interface:
                outputs = [as_held(one, other) for one, other in zip(outputs, found, strict=False)]
                found = [like(one, other) for one, other in zip(found, outputs, strict=False)]
            text = difference(outputs, found, result.accuracy, is_random=self.case.is_random)
            if text and number and self._is_undefined(type(session), runs):
                continue
            if text:
                kind = self._judged(type(session), feeds, found, outputs, result) if ": error" in text else "wrong"
                return Outcome(kind, f"inputs {number}: {text} ({session.name})")
            compared += 1
        return Outcome("ok") if compared else None

    def _is_fault_of_kernel(self, given: Mapping[str, Any], outputs: Outputs, result: Result) -> bool:
        """Return whether the reference computes what is expected of a result that onnxruntime fails on.

        The lengths are not those of the case, and kernels of some opsets refuse empty ones. Neither engine has an
        Attention of an empty query; there, onnxruntime runs the result with the operator written out.
        """
        for engine, path in ((Evaluator, result.path), (Runtime, _without_attention(result.path))):
            try:
                found = self._session(engine, path).run(given)
            except Refused:
                continue
            return not difference(outputs, found, REASSOCIATED, is_random=self.case.is_random)
        return False

    def _is_undefined(self, engine: type, runs: Sequence[tuple[Path, Mapping[str, Any], Outputs]]) -> bool:
        """Return whether the original or the result has no sure outputs for lengths that are not those of the case.

        onnxruntime returns memory that it has not written for some of them, such as a Scan over nothing. So that is
        what another run shows, or the reference, if it runs the case and computes others at these lengths. `runs` has
        the files with the inputs and outputs of their last runs, first the original's.
        """
        _, feeds, outputs = runs[0]
        if any(_is_other(engine, *run) for run in [*runs] * _REPEATED):
            return True
        if engine is Evaluator or not self.computed(Evaluator):
            return False
        try:
            others = self._session(Evaluator, self.path).run(feeds)
        except Refused:
            return False
        return bool(difference(outputs, others, REASSOCIATED, is_random=False))

    def _judged(self, engine: type, feeds: Mapping[str, Any], found: Outputs, outputs: Outputs, result: Result) -> str:
        """Say what explains an error: "sensitive" if one rounding of inputs does more, "beyond" for a lossy pass."""
        accuracy = result.accuracy
        if accuracy.kind == "lossy":
            far = dataclasses.replace(accuracy, budget=(accuracy.budget or 0.0) * _FAR)
            if not difference(outputs, found, far, is_random=False) or self._jumps():
                return "beyond"
            return "beyond" if self._is_rounding(feeds, found, outputs, result) else "wrong"
        try:
            moved = movement(self._session(engine, self.path), feeds, outputs)
        except Refused:
            return "wrong"
        return "wrong" if difference(outputs, found, accuracy, is_random=False, moved=moved) else "sensitive"

    def _jumps(self) -> bool:
        """Return whether an operator of the original, in bodies and functions too, rounds or compares floats.

        Operators on lengths and other integers, and a Cast from a float to another, do not.
        """
        model = onnx_ir.serde.deserialize_model(self.written.model)
        complete_all_types(model)
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        nodes = (node for graph in graphs for node in onnx_ir.traversal.RecursiveGraphIterator(graph))
        return any(node.op_type in _JUMPS and _reads_floats(node) for node in nodes)

    def _of_rounded(self, engine: type, rounded: Mapping[str, Any]) -> Outputs | None:
        """Return what the original makes of inputs that a dtype of the result has rounded; None if it refuses them.

        A model that compares its inputs is not to blame for their rounding.
        """
        try:
            return self._session(engine, self.path).run(rounded)  # type: ignore[no-any-return]
        except Refused:
            return None

    def _is_rounding(self, feeds: Mapping[str, Any], found: Outputs, outputs: Outputs, result: Result) -> bool:
        """Return whether rounding every number of the original to the result's dtype explains what was found.

        That is what a cast means, and some models lose everything by it, such as a difference of large numbers. It
        explains an output that is as near to it as a cast declares, or an error of no more than twice its own.
        """
        dtype = short_dtype(result.path)
        if dtype is None:
            return False
        try:
            rounded = RoundingEvaluator(self.path, onnx_ir.DataType(dtype).numpy()).run(feeds)
        except Refused:
            return False
        expected = [as_held(one, cast(one, dtype)) for one in rounded]
        lost = 2 * largest_error(outputs, expected)
        return not difference(expected, found, result.accuracy, is_random=False) or (
            np.isfinite(lost) and not difference(outputs, found, result.accuracy, is_random=False, moved=lost)
        )

    def computed(self, engine: type) -> list[tuple[Mapping[str, Any], Outputs]]:
        """Return the inputs that the original takes in an engine, with its outputs; the first of them must run."""
        if engine.__name__ not in self._expected:
            found: list[tuple[Mapping[str, Any], Outputs]] = []
            session = self._try(engine, self.path)
            start = time.process_time()
            for feeds in self.written.feeds if _loads(session) else ():
                if time.process_time() - start > _ENOUGH:
                    break
                try:
                    found.append((feeds, session.run(feeds)))
                except Refused:
                    if not found:
                        break
            self._expected[engine.__name__] = found
        return self._expected[engine.__name__]

    def _try(self, engine: type, path: Path) -> Any:
        try:
            return self._session(engine, path)
        except Refused as refused:
            return refused

    def _session(self, engine: type, path: Path) -> Any:
        key = (engine.__name__, path)
        if key not in self._sessions:
            try:
                self._sessions[key] = engine(path)
            except Refused as refused:
                self._sessions[key] = refused
        found = self._sessions[key]
        if isinstance(found, Refused):
            raise found
        return found


def is_accepted(path: Path) -> bool:
    """Return whether onnxruntime or the checker take a model."""
    try:
        Runtime(path)
    except Refused:
        return not _checker_message(path)
    return True


def _checker_message(path: Path) -> str:
    """Return what ONNX's checker has against a model, or an empty text."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def _without_attention(path: Path) -> Path:
    """Return a file with the model in `path` in which Attention is written out in elementary operators."""
    written = path.with_name(f"elementary-{path.name}")
    if not written.exists():
        model = passopt.ir.load_model(path)
        run_passes(model, resolve("decompose-attention").passes)
        folder = path.parent / "elementary"
        folder.mkdir()
        save_materialized(model, folder)
        (folder / MODEL_NAME).rename(written)
    return written


def _loads(session: object) -> bool:
    return not isinstance(session, Refused)


def _reads_floats(node: onnx_ir.Node) -> bool:
    """Return whether an operator reads floats, or values of unknown dtype, and is no Cast of them to floats."""
    if node.op_type == "Cast" and onnx_ir.DataType(node.attributes["to"].as_int()) in FLOATS:
        return False
    return any(value is not None and (value.dtype is None or value.dtype in FLOATS) for value in node.inputs)


def _ends_process(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> bool:
    """Return whether onnxruntime ends the whole process on these inputs: some kernels do on empty ones in fp16."""
    arrays = [value for value in feeds.values() if isinstance(value, np.ndarray)]
    is_empty = any(not array.size and array.dtype == np.float16 for array in arrays)
    return is_empty and any(node.op_type in _FATAL for node in proto.graph.node)


def _is_other(engine: type, path: Path, feeds: Mapping[str, Any], outputs: Outputs) -> bool:
    """Return whether a new run computes other outputs, or fails."""
    try:
        return bool(difference(outputs, engine(path).run(feeds), EXACT, is_random=False))
    except Refused:
        return True
