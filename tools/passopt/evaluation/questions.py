"""Read multiple-choice questions: C-Eval as it is published, and JSON lines as evaluation harnesses have them."""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from passopt.frontends.calibration.ceval_subjects import SUBJECTS
from passopt.frontends.calibration.formats import ceval_question, ceval_rows, ceval_title, json_lines
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.json_text import shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: The keys under which files have the text of a question, its choices and the right one; the first found counts.
QUESTION_KEYS = ("query", "context", "ctx", "question", "goal", "premise", "sentence", "prompt")
CHOICE_KEYS = ("choices", "endings", "options")
ANSWER_KEYS = ("answer", "label", "gold", "answerKey", "answer_idx", "target")
#: C-Eval's subjects come in the order of its categories; these are the first of each.
_FIRST_SUBJECTS = {
    "computer_network": "STEM",
    "college_economics": "Social Science",
    "modern_chinese_history": "Humanities",
    "civil_servant": "Other",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        text: What the model reads before a choice.
        choices: The choices, as they follow the text.
        answer: The number of the right choice.
        subject: The subject; "" if there are none.
        head: What stands above all examples; "" for nothing.
        shots: Questions with answers that stand before the question.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    head: str = ""
    shots: tuple[str, ...] = ()

    def context(self, shots: int) -> str:
        """Return what the model reads, with so many of the examples."""
        return "\n\n".join([*([self.head] if self.head else []), *self.shots[:shots], self.text])


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions of one file.

    Attributes:
        name: What reports call it.
        questions: The questions.
        is_ceval: Whether they are C-Eval's, whose subjects have categories.
    """

    name: str
    questions: tuple[Question, ...]
    is_ceval: bool = False


def category_of(subject: str) -> str:
    """Return the category of one of C-Eval's subjects, "Other" for one that is not among them."""
    found = "Other"
    if subject in SUBJECTS:
        for name in itertools.takewhile(lambda name: name != subject, SUBJECTS):
            found = _FIRST_SUBJECTS.get(name, found)
        found = _FIRST_SUBJECTS.get(subject, found)
    return found


def read_ceval_questions(path: Path, *, split: str, shots: int, limit: int | None) -> QuestionSet:
    """Return C-Eval's questions in its published prompt form, with answers of the split dev as examples.

    Args:
        path: `ceval-exam.zip`.
        split: val, or dev or test of an archive that has answers there.
        shots: The number of examples.
        limit: The largest number of questions of a subject; None for all.

    Raises:
        UsageError: If the file is no zip archive, or has no questions of the split.
        ModelError: If it is damaged, or a question has no answer from A to D.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; C-Eval is published as ceval-exam.zip")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: is no zip archive, as ceval-exam.zip is")
    examples: dict[str, list[str]] = {}
    for subject, row in ceval_rows(path, "dev") if shots else ():
        if len(examples.setdefault(subject, [])) < shots:
            examples[subject].append(ceval_question(row, with_answer=True))
    counts: dict[str, int] = {}
    found: list[Question] = []
    for subject, row in ceval_rows(path, split):
        counts[subject] = counts.get(subject, 0) + 1
        if limit is not None and counts[subject] > limit:
            continue
        answer = (row.get("answer") or "").strip()
        if answer not in {"A", "B", "C", "D"}:
            raise ModelError(
                f"{path}, {split}/{subject}_{split}.csv, question {counts[subject]}: its answer is {answer!r}, "
                f"expected A, B, C or D (the published split test has no answers)"
            )
        if len(examples.get(subject, [])) < shots:
            raise ModelError(
                f"{path}: dev/{subject}_dev.csv has {len(examples.get(subject, []))} questions, {shots} are wanted as "
                f"examples; ask for fewer with `shots`"
            )
        text = ceval_question(row, with_answer=False)
        more = tuple(examples.get(subject, ()))
        found.append(Question(text, tuple("ABCD"), "ABCD".index(answer), subject, ceval_title(subject), more))
    if not found:
        raise UsageError(f"{path}: holds no file such as {split}/logic_{split}.csv with questions")
    order = {subject: number for number, subject in enumerate(SUBJECTS)}
    found.sort(key=lambda question: (order.get(question.subject, len(order)), question.subject))
    return QuestionSet(f"{path}, {split}", tuple(found), is_ceval=True)


def read_choices(path: Path, *, limit: int | None) -> QuestionSet:
    """Return the questions of JSON lines.

    A line is an object with a text (`query`, `context`, `question` …), a list of choices, and the right one: its number
    from 0, its letter, its label or its text. A text under `question` is asked as "Question: …" and "Answer:".

    Args:
        path: The file, which may be compressed by gzip.
        limit: The largest number of questions; None for all.

    Raises:
        UsageError: If there is no such file, or no question in it.
        ModelError: If a line is something else.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give questions as JSON lines")
    read: Iterator[tuple[str, Mapping[str, Any]]] = json_lines(path)
    found = [_question(entry, where) for where, entry in itertools.islice(read, limit)]
    if not found:
        raise UsageError(f"{path}: holds no question; one JSON object a line is expected")
    return QuestionSet(str(path), tuple(found))


def _question(entry: Mapping[str, Any], where: str) -> Question:
    key, text = _first(entry, QUESTION_KEYS, where, "the text of a question")
    if not isinstance(text, str) or not text.strip():
        raise ModelError(f"{where}: {key} is {shown(text)}, expected the text of a question")
    choices, labels = _choices(entry, where)
    number = _answer(entry, choices, labels, where)
    asked = f"Question: {text}\nAnswer:" if key == "question" else text.rstrip()
    subject = entry.get("subject")
    return Question(
        asked, tuple(f" {choice.strip()}" for choice in choices), number, subject if isinstance(subject, str) else ""
    )


def _first(entry: Mapping[str, Any], keys: Sequence[str], where: str, what: str) -> tuple[str, Any]:
    key = next((key for key in keys if entry.get(key) is not None), None)
    if key is None:
        have = ", ".join(entry) or "nothing"
        raise ModelError(f"{where}: lacks {what}; expected one of the keys {', '.join(keys)}, found {have}")
    return key, entry[key]


def _choices(entry: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """Return the choices and their labels; ARC has both in an object, and others have a list of texts."""
    key, value = _first(entry, CHOICE_KEYS, where, "the choices")
    listed: Any = value
    labels: Any = None
    if isinstance(value, dict):
        listed, labels = value.get("text"), value.get("label")
    texts = isinstance(listed, list) and all(isinstance(item, str) and item.strip() for item in listed)
    if not texts or len(listed) < 2:
        raise ModelError(f"{where}: {key} is {shown(entry[key])}, expected a list of two or more texts")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(listed)):
        raise ModelError(f"{where}: the labels of its choices are {shown(labels)}, expected {len(listed)} of them")
    return listed, [str(label) for label in labels] if labels is not None else list(LETTERS[: len(listed)])


def _answer(entry: Mapping[str, Any], choices: Sequence[str], labels: Sequence[str], where: str) -> int:
    """Return the number of the right choice, which files give as number, label or text."""
    key, value = _first(entry, ANSWER_KEYS, where, "the right choice")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        text = value.strip()
        for known in (labels, [choice.strip() for choice in choices]):
            if text in known:
                return list(known).index(text)
        value = int(text) if text.isdecimal() else value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ModelError(
        f"{where}: {key} is {shown(entry[key])}, expected a number from 0 to {len(choices) - 1}, one of the labels "
        f"{', '.join(labels)}, or the text of a choice"
    )
