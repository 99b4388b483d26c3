"""Multiple-choice questions: files as they are published, and answers by likelihood."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import passopt
from passopt.evaluation.question_scores import Answers, figures_of
from passopt.evaluation.questions import Question, QuestionSet, category_of, read_ceval_questions, read_choices
from passopt.frontends.calibration.ceval_subjects import SUBJECTS
from passopt.ir.errors import ModelError, UsageError

LINES: Sequence[Mapping[str, Any]] = (
    {"question": "what reads", "choices": ["the model", "a cat"], "answer": 0},
    {"query": "it says how ", "choices": ["likely", "cat", "dog"], "gold": [2]},
    {"ctx": "then", "endings": ["it says", "zzz"], "label": "1", "ind": 4},
    {"question": "which", "choices": {"text": ["a", "text", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    {"context": "letters", "options": ["yes", "no"], "answer": "no"},
    {"question": "which", "choices": ["a", "b", "c"], "answer": "C", "subject": "letters"},
)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]] = LINES) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_ceval(path: Path, answers: Mapping[str, str], *, dev: int = 5) -> Path:
    """Write an archive with a question for each letter of a subject's answers, and `dev` examples."""
    with zipfile.ZipFile(path, "w") as archive:
        for subject, letters in answers.items():
            for split, known in (("dev", "ABCDA"[:dev]), ("val", letters)):
                text = io.StringIO()
                table = csv.writer(text)
                table.writerow(["id", "question", "A", "B", "C", "D", "answer"])
                table.writerows(
                    [n, f"{split} {n},\nwhat?", "a", "b", "c", "d", letter] for n, letter in enumerate(known)
                )
                archive.writestr(f"{split}/{subject}_{split}.csv", text.getvalue())
    return path


def test_lines_of_many_harnesses_are_read(tmp_path: Path):
    found = read_choices(write_lines(tmp_path / "q.jsonl"), limit=None).questions
    assert [question.answer for question in found] == [0, 2, 1, 2, 1, 2]
    assert found[0].text == "Question: what reads\nAnswer:"
    assert (found[1].text, found[1].choices) == ("it says how", (" likely", " cat", " dog"))
    assert found[5].subject == "letters"
    assert len(read_choices(tmp_path / "q.jsonl", limit=2).questions) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"choices": ["a", "b"], "answer": 0},
            "lacks the text of a question; expected one of the keys query, .* found",
        ),
        ({"question": "a", "answer": 0}, "lacks the choices"),
        ({"question": "a", "choices": ["a", "b"]}, "lacks the right choice"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, 'question is " ", expected the text'),
        ({"question": "a", "choices": ["a"], "answer": 0}, "expected a list of two or more texts"),
        ({"question": "a", "choices": ["a", 3], "answer": 0}, "expected a list of two or more texts"),
        ({"question": "a", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": 0}, "expected 2 of them"),
        ({"question": "a", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected a number from 0 to 1"),
        ({"question": "a", "choices": ["a", "b"], "answer": True}, "answer is true, expected a number from 0 to 1"),
        ({"question": "a", "choices": ["a", "b"], "label": "F"}, 'label is "F", expected .* labels A, B'),
    ],
)
def test_declines_lines_that_are_no_questions(tmp_path: Path, line, message: str):
    path = write_lines(tmp_path / "q.jsonl", [LINES[0], line])
    with pytest.raises(ModelError, match=f"q.jsonl, line 2: .*{message}"):
        read_choices(path, limit=None)


def test_declines_files_without_questions(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no such file"):
        read_choices(tmp_path / "none.jsonl", limit=None)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no question"):
        read_choices(tmp_path / "empty.jsonl", limit=None)
    (tmp_path / "text.jsonl").write_text("no json")
    with pytest.raises(ModelError, match=r"text.jsonl, line 1: is not JSON"):
        read_choices(tmp_path / "text.jsonl", limit=None)


def test_ceval_is_asked_in_its_published_form(tmp_path: Path):
    path = write_ceval(tmp_path / "ceval.zip", {"law": "B", "computer_network": "AD"})
    found = read_ceval_questions(path, split="val", shots=2, limit=None)
    assert [(item.subject, item.answer) for item in found.questions] == [
        ("computer_network", 0),
        ("computer_network", 3),
        ("law", 1),
    ]
    assert found.questions[2].context(2) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        "dev 0,\nwhat?\nA. a\nB. b\nC. c\nD. d\n答案：A\n\n"
        "dev 1,\nwhat?\nA. a\nB. b\nC. c\nD. d\n答案：B\n\n"
        "val 0,\nwhat?\nA. a\nB. b\nC. c\nD. d\n答案："
    )
    assert found.questions[2].choices == ("A", "B", "C", "D")
    assert len(read_ceval_questions(path, split="val", shots=0, limit=1).questions) == 2


def test_declines_archives_that_are_not_ceval(tmp_path: Path):
    def read(path: Path, split: str = "val", shots: int = 5) -> None:
        read_ceval_questions(path, split=split, shots=shots, limit=None)

    path = write_ceval(tmp_path / "ceval.zip", {"law": "BE"}, dev=3)
    with pytest.raises(ModelError, match="law_dev.csv has 3 questions, 5 are wanted"):
        read(path)
    with pytest.raises(ModelError, match=r"val/law_val.csv, question 2: its answer is 'E', expected A, B, C or D"):
        read(path, shots=3)
    with pytest.raises(UsageError, match="holds no file such as test/logic_test.csv"):
        read(path, split="test", shots=0)
    with pytest.raises(UsageError, match="there is no such file"):
        read(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(UsageError, match="is no zip archive"):
        read(tmp_path / "text.zip")


def test_each_subject_has_its_category():
    counts: dict[str, int] = {}
    for subject in SUBJECTS:
        counts[category_of(subject)] = counts.get(category_of(subject), 0) + 1
    assert counts == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}
    assert category_of("law") == "Humanities"
    assert category_of("physician") == category_of("a new one") == "Other"


def test_answers_are_the_likeliest_choices(lab, tmp_path: Path):
    lines = [
        {"query": "the text", "choices": ["says", "a", "reads the letters", "it"], "gold": gold}
        for gold in (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)
    ]
    lines += [{"query": "it", "choices": ["a", "b", "z"], "gold": 0}]
    report = passopt.evaluate([lab.one, lab.int8], choices=write_lines(tmp_path / "q.jsonl", lines))
    expected = []
    for line in lines:
        logs = []
        for choice in line["choices"]:
            ids = lab.encode(f"{line['query']} {choice}")
            rows = lab.log_probabilities(lab.one, ids)
            first = len(lab.encode(line["query"]))
            logs.append(sum(rows[place - 1, ids[place]] for place in range(first, len(ids))))
        lengths = [len(choice) for choice in line["choices"]]
        expected.append(
            (int(np.argmax(logs)) == line["gold"], int(np.argmax(np.divide(logs, lengths))) == line["gold"])
        )
    found = report.models[0].questions[0]
    assert found.accuracy.value == np.mean([plain for plain, _ in expected])
    assert found.normalised.value == np.mean([normalised for _, normalised in expected])
    assert found.accuracy.value != found.normalised.value
    assert report.models[1].questions[0].same is not None
    assert any("NOISE" in note and "11 questions only" in note for note in report.notes)


def test_long_questions_lose_examples_and_then_their_beginning(lab, tmp_path: Path):
    path = write_ceval(tmp_path / "ceval.zip", {"law": "AB", "logic": "CCC"})
    report = passopt.evaluate(lab.one, ceval=path)
    assert any("5 of 5 questions have fewer examples" in note for note in report.notes)
    assert any("5 of 5 questions lack the beginning" in note for note in report.notes)
    found = report.models[0].questions[0]
    assert list(found.by_subject) == ["logic", "law"]
    assert list(found.by_category) == ["Humanities"]
    assert "mean of subjects" in str(report)


def test_figures_of_answers():
    questions = [
        Question("", ("A", "B"), index % 2, subject) for index, subject in enumerate(["law"] * 4 + ["logic"] * 2)
    ]
    asked = QuestionSet("q", tuple(questions), is_ceval=True)
    one = Answers(np.array([0, 1, 0, 0, 0, 0]), np.zeros(6))
    other = Answers(np.array([0, 1, 0, 1, 1, 0]), np.zeros(6))
    found = figures_of(asked, other, one)
    assert found.accuracy.value == pytest.approx(4 / 6)
    assert found.by_subject["law"].value == 1
    assert found.by_subject["logic"].value == 0
    assert found.mean_of_subjects is not None
    assert found.mean_of_subjects.value == 0.5
    assert found.same is not None
    assert found.same.value == pytest.approx(4 / 6)
    assert found.more is not None
    # Right at 1 1 1 1 0 0 against 1 1 1 0 1 0: the differences are 0 0 0 1 −1 0.
    assert found.more.value == 0
    assert found.more.error == pytest.approx(np.std([0, 0, 0, 1, -1, 0], ddof=1) / math.sqrt(6))


def test_damaged_files_are_refused_or_read(tmp_path: Path):
    good = {
        "q.jsonl": write_lines(tmp_path / "q.jsonl").read_bytes(),
        "ceval.zip": write_ceval(tmp_path / "ceval.zip", {"law": "AB", "logic": "C"}).read_bytes(),
    }
    chance = np.random.default_rng(3)
    refused: list[tuple[str, str]] = []
    for turn in range(200):
        name = list(good)[turn % 2]
        data = bytearray(good[name])
        for place in chance.integers(0, len(data), 4):
            data[place] = int(chance.integers(256))
        if turn % 3 == 0:
            del data[int(chance.integers(len(data))) :]
        (tmp_path / name).write_bytes(data)
        try:
            if name == "q.jsonl":
                read_choices(tmp_path / name, limit=None)
            else:
                read_ceval_questions(tmp_path / name, split="val", shots=5, limit=None)
        except (ModelError, UsageError) as error:
            refused.append((name, str(error)))
    assert len(refused) > 100
    assert all(name in message for name, message in refused)
