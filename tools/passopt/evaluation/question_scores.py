"""Answer multiple-choice questions with a model: the likeliest choice counts as its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.evaluation.likelihood import Continuation, encode_continuation, likelihoods
from passopt.evaluation.questions import Question, QuestionSet, category_of
from passopt.evaluation.scored_rows import Scorer
from passopt.evaluation.text_tokens import TextReader
from passopt.predictions.standard_errors import Estimate, mean_of, mean_of_means, share_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Below so many questions, accuracies say little about a model, and reports say so.
ENOUGH = 100


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """Questions as token ids.

    Attributes:
        of: The questions.
        encoded: The choices of each question after its text.
        fewer: How many questions have fewer examples than were asked for, since the model has too few positions.
        cut: How many questions have lost the beginning of their text for the same reason.
    """

    of: QuestionSet
    encoded: tuple[tuple[Continuation, ...], ...]
    fewer: int
    cut: int

    @property
    def room(self) -> int:
        """Return the largest number of tokens that a model reads at once."""
        return max(item.read for choices in self.encoded for item in choices)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model answers.

    Attributes:
        plain: The number of the likeliest choice of each question.
        normalised: The number of the choice that is likeliest for its length in characters.
    """

    plain: Array
    normalised: Array


@dataclasses.dataclass(frozen=True)
class QuestionFigures:
    """The figures of one model on a set of questions, each with its standard error.

    Attributes:
        accuracy: The share of right answers by likelihood.
        normalised: The share of right answers by likelihood for their length.
        by_subject: The accuracy of each subject.
        by_category: The mean over the subjects of each category; of C-Eval only.
        mean_of_subjects: The mean over all subjects, as C-Eval's tables show it; None without subjects.
        same: The share of questions answered as the reference does; None for the reference, like the next one.
        more: The difference of the accuracy from the reference's, question by question.
    """

    accuracy: Estimate
    normalised: Estimate
    by_subject: dict[str, Estimate]
    by_category: dict[str, Estimate]
    mean_of_subjects: Estimate | None = None
    same: Estimate | None = None
    more: Estimate | None = None


def encode_questions(questions: QuestionSet, reader: TextReader, positions: int | None) -> QuestionTask:
    """Return questions as token ids; where these are more than `positions`, examples are left out, the last ones first.

    Args:
        questions: The questions.
        reader: The tokenizer.
        positions: The longest sequence that all models take; None if nothing limits it.
    """
    encoded: list[tuple[Continuation, ...]] = []
    fewer = cut = 0
    for question in questions.questions:
        choices, shots = _fitting(question, reader, positions)
        short = tuple(item.within(positions) for item in choices)
        cut += any(one is not other for one, other in zip(short, choices, strict=True))
        fewer += shots < len(question.shots)
        encoded.append(short)
    return QuestionTask(questions, tuple(encoded), fewer, cut)


def _fitting(question: Question, reader: TextReader, positions: int | None) -> tuple[list[Continuation], int]:
    """Return the choices after as many examples as fit, and how many these are."""
    for shots in range(len(question.shots), -1, -1):
        context = question.context(shots)
        choices = [encode_continuation(reader, context, choice) for choice in question.choices]
        longest = max(item.read for item in choices)
        if positions is None or longest <= positions or not shots:
            break
    return choices, shots


def answer_questions(task: QuestionTask, scorer: Scorer, tell: Callable[[int], None] = lambda count: None) -> Answers:
    """Ask a model all questions.

    Args:
        task: The questions.
        scorer: The model.
        tell: Gets 1 after each question.
    """
    plain, normalised = [], []
    for question, choices in zip(task.of.questions, task.encoded, strict=True):
        logs = np.array([item.log for item in likelihoods(scorer, choices)])
        lengths = np.array([len(choice.strip()) for choice in question.choices])
        plain.append(int(logs.argmax()))
        normalised.append(int((logs / lengths).argmax()))
        tell(1)
    return Answers(np.array(plain), np.array(normalised))


def figures_of(questions: QuestionSet, answers: Answers, reference: Answers | None) -> QuestionFigures:
    """Return the figures of a model's answers, and of their distance to the reference's if there is one."""
    right = np.array([question.answer for question in questions.questions])
    hits = answers.plain == right
    subjects = _by_subject(questions.questions, hits)
    figures = QuestionFigures(
        share_of(hits),
        share_of(answers.normalised == right),
        subjects,
        _by_category(subjects) if questions.is_ceval else {},
        mean_of_means(list(subjects.values())) if subjects else None,
    )
    if reference is None:
        return figures
    more = hits.astype(np.float64) - (reference.plain == right)
    alone = np.arange(len(hits))
    return dataclasses.replace(figures, same=share_of(answers.plain == reference.plain), more=mean_of(more, alone))


def _by_subject(questions: Sequence[Question], hits: Array) -> dict[str, Estimate]:
    names = [question.subject for question in questions]
    found = {}
    for name in dict.fromkeys(filter(None, names)):
        found[name] = share_of(hits[[index for index, subject in enumerate(names) if subject == name]])
    return found


def _by_category(subjects: dict[str, Estimate]) -> dict[str, Estimate]:
    parts: dict[str, list[Estimate]] = {}
    for name, estimate in subjects.items():
        parts.setdefault(category_of(name), []).append(estimate)
    return {category: mean_of_means(estimates) for category, estimates in parts.items()}


def few_notes(tasks: Sequence[QuestionTask]) -> list[str]:
    """Return lines about sets that are too small to tell models apart, and about what did not fit."""
    notes = []
    for task in tasks:
        name, count = task.of.name, len(task.of.questions)
        if count < ENOUGH:
            notes.append(f"NOISE: {name} has {count} questions only; below {ENOUGH}, accuracies say little")
        if task.fewer:
            notes.append(f"{name}: {task.fewer} of {count} questions have fewer examples, as positions need it")
        if task.cut:
            notes.append(
                f"{name}: {task.cut} of {count} questions lack the beginning of their text, as positions need it"
            )
    return notes
