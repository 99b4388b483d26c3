"""Run all models of an evaluation one after the other, the reference first, and collect their figures."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import blake3

from passopt.evaluation import question_scores, text_scores
from passopt.evaluation.candidates import Candidate, gives_last_only
from passopt.evaluation.question_scores import Answers, QuestionFigures, QuestionTask, answer_questions
from passopt.evaluation.reference_store import ReferenceStore, StoredDtype, open_store
from passopt.evaluation.scored_rows import Scorer
from passopt.evaluation.text_scores import TextFigures, TextScores, TextTask, keep_reference, score_text
from passopt.generation.loop import CHUNK
from passopt.ir.errors import ModelError
from passopt.ir.regular_files import check_regular
from passopt.reporting.reporter import Reporter, progress_bar
from passopt.targets.onnxruntime.session import runtime_version


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an evaluation runs.

    Attributes:
        cache: The folder in which the reference's predictions are kept; None for a temporary one.
        dtype: The dtype in which they are kept.
        reporter: Is told about progress.
    """

    cache: Path | None
    dtype: StoredDtype
    reporter: Reporter


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """The figures of one model: of each text, and of each set of questions, in their order."""

    texts: tuple[TextFigures, ...]
    questions: tuple[QuestionFigures, ...]


def evaluate(
    models: Sequence[Candidate], texts: Sequence[TextTask], questions: Sequence[QuestionTask], settings: Settings
) -> list[ModelFigures]:
    """Return the figures of all models, in their order; the first one is the reference.

    One model is in memory at a time. The reference's predictions of texts are on disk while the others run.

    Raises:
        UsageError: If the disk has too little room for them, or a token is outside of a vocabulary.
        ModelError: If a model cannot be run, or its logits are not finite.
    """
    first, *others = models
    with contextlib.ExitStack() as stack:
        stores = _stores(stack, first, texts, settings) if others or settings.cache is not None else None
        with _Opened(first, texts, questions) as opened:
            known = _reference_scores(opened, texts, stores, settings)
            answers = _answers(opened, questions, settings)
        results = [_figures(texts, known, None, questions, answers, None)]
        for model in others:
            with _Opened(model, texts, questions) as opened:
                found = [
                    _score(opened, task, (store, scores), settings)
                    for task, store, scores in zip(texts, stores or (), known, strict=True)
                ]
                own = _answers(opened, questions, settings)
            results.append(_figures(texts, found, known, questions, own, answers))
    return results


class _Opened:
    """A model whose weights are loaded when something has to run, and no earlier."""

    def __init__(self, model: Candidate, texts: Sequence[TextTask], questions: Sequence[QuestionTask]) -> None:
        self.model = model
        self._room = max([*(task.window for task in texts), *(task.room for task in questions)])
        self._stack = contextlib.ExitStack()
        self._scorer: Scorer | None = None

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer = None
        self._stack.close()

    def scorer(self) -> Scorer:
        """Return the model, loaded."""
        if self._scorer is None:
            engine = self._stack.enter_context(self.model.engine())
            last_only = gives_last_only(engine)
            self._scorer = Scorer(engine, self.model.name, last_only=last_only, room=self._room)
        return self._scorer


def _stores(
    stack: contextlib.ExitStack, model: Candidate, texts: Sequence[TextTask], settings: Settings
) -> list[ReferenceStore]:
    """Open the store of each text, and check that the disk has room for all of them."""
    if not texts:
        return []
    folder, identity = settings.cache, ""
    if folder is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="passopt-eval-")))
    else:
        identity = identity_of(model, settings.reporter)
    runtime = runtime_version() if model.runs_in == "onnxruntime" else model.runs_in
    shared = {"model": identity, "runs_in": runtime, "chunk": CHUNK}
    stores: dict[str, ReferenceStore] = {}
    found = []
    for task in texts:
        key = {**shared, **task.key()}
        if str(key) not in stores:  # the same text may be given twice
            stores[str(key)] = stack.enter_context(open_store(folder, key, task.lengths, model.vocab, settings.dtype))
        found.append(stores[str(key)])
    found[0].check_space(sum(store.missing_bytes for store in stores.values()))
    return found


def identity_of(model: Candidate, reporter: Reporter) -> str:
    """Return a digest over all bytes that decide what a model computes: its files, and those of its weights.

    Raises:
        ModelError: If a file cannot be read, or the model is in memory only.
    """
    files = model.files()
    digest = blake3.blake3()
    try:
        sizes = [path.stat().st_size for path in files]
        with progress_bar(reporter, f"hashing {model.name}", sum(sizes)) as tell:
            for path, size in zip(files, sizes, strict=True):
                check_regular(path)
                whole = blake3.blake3(max_threads=blake3.blake3.AUTO)
                whole.update_mmap(path)
                digest.update(whole.digest())
                tell(size)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return str(digest.hexdigest())


def _reference_scores(
    opened: _Opened, texts: Sequence[TextTask], stores: Sequence[ReferenceStore] | None, settings: Settings
) -> list[TextScores]:
    if stores is None:
        return [_score(opened, task, None, settings) for task in texts]
    found = []
    for task, store in zip(texts, stores, strict=True):
        with _told(opened, task.scored - sum(task.lengths[: store.finished]), "tokens", settings) as tell:
            try:
                found.append(keep_reference(task, store, opened.scorer, tell))
            except KeyboardInterrupt:
                kept = f"{store.finished} of {len(task.windows)} windows of the reference are kept in {store.folder}"
                raise KeyboardInterrupt(f"interrupted; {kept}" if settings.cache else "interrupted") from None
    return found


def _score(
    opened: _Opened, task: TextTask, reference: tuple[ReferenceStore, TextScores] | None, settings: Settings
) -> TextScores:
    with _told(opened, task.scored, "tokens", settings) as tell:
        return score_text(task, opened.scorer(), reference, tell)


def _answers(opened: _Opened, questions: Sequence[QuestionTask], settings: Settings) -> list[Answers]:
    found = []
    for task in questions:
        with _told(opened, len(task.of.questions), "questions", settings) as tell:
            found.append(answer_questions(task, opened.scorer(), tell))
    return found


@contextlib.contextmanager
def _told(opened: _Opened, count: int, unit: str, settings: Settings) -> Iterator[Callable[[int], None]]:
    with progress_bar(settings.reporter, f"{opened.model.name}, {unit}", count, in_items=True) as tell:
        yield tell


def _figures(
    texts: Sequence[TextTask],
    scores: Sequence[TextScores],
    known: Sequence[TextScores] | None,
    questions: Sequence[QuestionTask],
    answers: Sequence[Answers],
    reference: Sequence[Answers] | None,
) -> ModelFigures:
    none: list[Any] = [None] * max(len(texts), len(questions))
    of_texts = [
        text_scores.figures_of(task, own, first)
        for task, own, first in zip(texts, scores, known if known is not None else none, strict=False)
    ]
    of_questions = [
        question_scores.figures_of(task.of, own, first)
        for task, own, first in zip(questions, answers, reference if reference is not None else none, strict=False)
    ]
    return ModelFigures(tuple(of_texts), tuple(of_questions))
