"""Calibration sets: the published formats are read, damage is named, and windows are the same everywhere."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from passopt.frontends.calibration import documents, windows
from passopt.frontends.calibration.ceval_subjects import SUBJECTS
from passopt.frontends.calibration.documents import Source, parse_source
from passopt.frontends.calibration.formats import ceval_question, ceval_rows, ceval_title
from passopt.frontends.calibration.text_files import Document
from passopt.frontends.calibration.windows import choose_windows, share_out
from passopt.ir.errors import ModelError, PassoptError, UsageError

HARD = '据"题"，\n下列哪项，正确？'


def c4(folder: Path, texts: Sequence[str], name: str = "c4-train.00000-of-01024.json.gz") -> Path:
    path = folder / name
    lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) for text in texts]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


def ceval(
    folder: Path, columns: Sequence[str] = ("id", "question", "A", "B", "C", "D", "answer", "explanation")
) -> Path:
    path = folder / "ceval-exam.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("dev", "val", "test"):
            for subject in ("logic", "law"):
                text = io.StringIO()
                kept = [name for name in columns if split == "dev" or name not in {"answer", "explanation"}]
                if split == "val" and "answer" in columns:
                    kept.append("answer")
                table = csv.writer(text)
                table.writerow(kept)
                row = {
                    "id": 0,
                    "question": HARD,
                    "A": "甲",
                    "B": "乙, 丙",
                    "C": "",
                    "D": "丁",
                    "answer": "B",
                    "explanation": "1\n2",
                }
                table.writerows([[row[name] for name in kept]] * 5)
                archive.writestr(f"{split}/{subject}_{split}.csv", text.getvalue())
    return path


def alpaca(folder: Path, entries: Sequence[object]) -> Path:
    path = folder / "alpaca_data_cleaned.json"
    path.write_text(json.dumps(list(entries), indent=4, ensure_ascii=False), encoding="utf-8")
    return path


def texts_of(path: Path) -> list[str]:
    return [document.text for document in parse_source(str(path)).documents()]


def encode(document: Document) -> list[int]:
    """A tokenizer of one token per character."""
    return [ord(letter) for letter in document.text or "".join(content for _, content in document.messages)]


def test_c4_lines_are_texts_compressed_or_not(tmp_path: Path) -> None:
    path = c4(tmp_path, ["one\ntwo", "三", ""])
    assert texts_of(path) == ["one\ntwo", "三", ""]
    plain = tmp_path / "part.json"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert parse_source(str(plain)).format == "c4"
    assert texts_of(plain) == texts_of(path)


def test_ceval_questions_are_those_of_its_prompt(tmp_path: Path) -> None:
    found = texts_of(ceval(tmp_path))
    assert len(found) == 30
    assert found[0] == (
        f"以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n{HARD}\nA. 甲\nB. 乙, 丙\nC. \nD. 丁\n答案：B"
    )
    assert found[-1].endswith("D. 丁\n答案：")
    assert [subject for subject, _ in ceval_rows(tmp_path / "ceval-exam.zip", "val")] == ["logic"] * 5 + ["law"] * 5
    assert len(SUBJECTS) == len(set(SUBJECTS.values())) == 52
    assert ceval_title("a new one") == "以下是中国关于a new one考试的单项选择题，请选出其中的正确答案。"
    row = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C"}
    assert ceval_question(row, with_answer=False) == "q\nA. 1\nB. 2\nC. 3\nD. 4\n答案："


def test_alpaca_is_read_entry_by_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"instruction": f"做 {number}", "input": "" if number % 2 else "x]", "output": "y\n"} for number in range(9)
    ]
    path = alpaca(tmp_path, entries)
    monkeypatch.setattr("passopt.frontends.calibration.formats._CHUNK", 7)
    found = texts_of(path)
    assert found[:2] == ["做 0\nx]\ny\n", "做 1\ny\n"]
    assert len(found) == 9


def test_messages_and_plain_text(tmp_path: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    entry = {"id": 1, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "text"}]}
    talk.write_text(json.dumps(entry) + "\n\n" + json.dumps(entry))
    (first, second) = parse_source(str(talk)).documents()
    assert first == second == Document(messages=(("user", "hi"), ("assistant", "text")))
    plain = tmp_path / "book.txt"
    body = "".join(f"line {number}\r\n" for number in range(9000)) + "z" * 70_000
    plain.write_text(body, newline="")
    pieces = texts_of(plain)
    assert "".join(pieces) == body
    assert all(len(piece) <= 2 * (32 << 10) for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], "cannot be read"),
        ("a.json", b'{"text": 3}\n', "line 1: text is 3, expected a text"),
        ("a.json", b'{"text": "x"}\n{"url": "x"}\n', "line 2: has no text"),
        ("a.json", b'{"text": "x"}\n[1]\n', "line 2: is no JSON object"),
        ("a.json", b'{"text": "x"\n', "line 1: is not JSON"),
        ("a.json", b'{"text": "\xff"}\n', "is not UTF-8"),
        ("a.json", b'[{"instruction": "x"}, {"instruction": ', "cut off or damaged"),
        ("a.json", b'[{"instruction": "x"}, 3]', "entry 1: expected an object with instruction"),
        ("a.json", b'{"messages": [{"role": "user"}]}\n', "a message has no content"),
        ("a.json", b'{"messages": []}\n', "messages is no list of objects"),
        ("a.json", b'{"other": 1}\n', "neither text nor messages"),
        ("a.txt", b"\xfftext", "is not UTF-8"),
        ("a.zip", b"PK\x05\x06" + bytes(18), "holds no file such as dev/logic_dev.csv"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PassoptError, match=message) as caught:
        list(parse_source(str(path)).documents())
    assert str(path) in str(caught.value)


def test_a_ceval_table_without_its_columns_is_named(tmp_path: Path) -> None:
    path = ceval(tmp_path, ("id", "question", "A", "B", "C", "answer"))
    with pytest.raises(ModelError, match=r"dev/logic_dev.csv: lacks the columns D"):
        list(parse_source(str(path)).documents())


def test_sources_are_named_by_format_file_and_weight(tmp_path: Path) -> None:
    path = c4(tmp_path, ["x"])
    assert parse_source(f"text:{path}*0.5") == Source("text", path, 0.5)
    assert parse_source(f"{path}*2") == Source("c4", path, 2.0)
    strange = tmp_path / "odd:name*x.txt"
    strange.write_text("x")
    assert parse_source(str(strange)) == Source("text", strange)
    for text, message in [
        (f"c5:{path}", "unknown calibration format 'c5'; known are alpaca, c4, ceval, messages, text"),
        (f"c4:{path}.no", "there is no such file"),
        (f"{path}*0", "no positive number"),
        (f"{path}*1.2.3", "no positive number"),
        ("", "names no calibration set"),
    ]:
        with pytest.raises(UsageError, match=message):
            parse_source(text)


def test_installed_packages_add_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_text("abc")

    class Point:
        name, value = "own", "package:reader"

        def load(self) -> Callable[[Path], list[Document]]:
            return lambda path: [Document(path.read_text() * 2)]

    class Broken(Point):
        name = "broken"

        def load(self) -> Callable[[Path], list[Document]]:
            raise ImportError("no module")

    monkeypatch.setattr(documents.importlib.metadata, "entry_points", lambda group: [Point(), Broken()])
    assert [document.text for document in parse_source(f"own:{path}").documents()] == ["abcabc"]
    with pytest.raises(UsageError, match="'broken' cannot be loaded .*no module"):
        parse_source(f"broken:{path}")


def test_windows_are_the_same_everywhere(tmp_path: Path) -> None:
    """Digests are frozen, so a change of the choice shows, on any machine and wherever the files are."""
    long = [f"{number} " * 60 for number in range(40)]
    sets = [Source("c4", c4(tmp_path, long), 2), Source("ceval", ceval(tmp_path)), Source("text", tmp_path / "t.txt")]
    (tmp_path / "t.txt").write_text("a line of text\n" * 2000)
    found = choose_windows(sets, encode, count=8, length=50, seed=3, begin=[1])
    assert found.ids.shape == (8, 50)
    assert found.counts == (4, 2, 2)
    assert (found.ids[:, 0] == 1).all()
    assert found.digest == "099a2816f2d9b398534ba6da75556ef2717935ee0b7601b2b522d06abc0bfc25"
    assert len({row.tobytes() for row in found.ids}) == 8
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    again = [dataset if dataset.format != "c4" else Source("c4", c4(moved, long), 2) for dataset in sets]
    assert choose_windows(again, encode, count=8, length=50, seed=3, begin=[1]).digest == found.digest
    assert choose_windows(sets, encode, count=8, length=50, seed=4, begin=[1]).digest != found.digest


def test_short_documents_are_joined_and_long_ones_cut_anywhere(tmp_path: Path) -> None:
    source = Source("c4", c4(tmp_path, ["abc", "", "defg", "h" * 99 + "i" * 99]))
    ids = choose_windows([source], encode, count=2, length=6, seed=0, begin=[7]).ids
    joined = next(row for row in ids if 7 in row[1:])
    assert "".join(chr(number) for number in joined) in {"\x07abc\x07d", "\x07defg\x07"}
    starts = {
        choose_windows([Source("c4", source.path)], encode, count=1, length=150, seed=seed).ids.tobytes()
        for seed in range(9)
    }
    assert len(starts) > 3


def test_few_long_documents_give_several_windows(tmp_path: Path) -> None:
    """They are disjoint, and no document gives a second one before each has given its first."""
    letters = "".join(chr(number) for number in range(1000, 1330))
    source = Source("c4", c4(tmp_path, [letters, letters.swapcase() + letters[:20]]))
    ids = choose_windows([source], encode, count=6, length=100, seed=1).ids
    assert ids.shape == (6, 100)
    with pytest.raises(ModelError, match="holds text for 6 windows"):
        choose_windows([source], encode, count=7, length=100, seed=1)


def test_memory_is_bounded_by_the_windows_and_not_by_the_set(tmp_path: Path) -> None:
    documents = [Document("x" * 100)] * 5000
    kept, is_all = windows._smallest(documents, 2000, 400, "s")
    assert len(kept) == 20
    assert not is_all
    numbers = [number for number, _ in kept]
    assert numbers == sorted(numbers)
    every, is_all = windows._smallest(documents, 10**9, 400, "s")
    assert is_all
    assert [number for number, _ in every][:20] == numbers


def test_text_that_needs_fewer_characters_than_expected_is_still_found(tmp_path: Path) -> None:
    """A token of this tokenizer stands for 40 characters."""
    source = Source("c4", c4(tmp_path, ["y" * 400] * 200))
    found = choose_windows([source], lambda document: [0] * (len(document.text) // 40), count=6, length=30, seed=0)
    assert found.ids.shape == (6, 30)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    source = Source("c4", c4(tmp_path, ["abcdef"] * 3))
    with pytest.raises(ModelError, match="holds text for 2 windows of 9 tokens, 5 are wanted"):
        choose_windows([source], encode, count=5, length=9, seed=0)
    with pytest.raises(ModelError, match="holds text for 0 windows"):
        choose_windows([Source("c4", c4(tmp_path, [""], "b.gz"))], encode, count=1, length=2, seed=0)
    with pytest.raises(UsageError, match="gets none of 1 windows"):
        choose_windows([source, source], encode, count=1, length=2, seed=0)
    with pytest.raises(UsageError, match="too short"):
        choose_windows([source], encode, count=1, length=1, seed=0, begin=[1])
    with pytest.raises(UsageError, match="there is no calibration set"):
        choose_windows([], encode, count=1, length=1, seed=0)


@pytest.mark.parametrize(
    ("count", "weights", "shares"),
    [(128, (1, 1, 1), [43, 43, 42]), (10, (0.5, 0.25, 0.25), [5, 3, 2]), (3, (1.0,), [3]), (2, (1, 100), [0, 2])],
)
def test_windows_are_shared_out_by_weight(count: int, weights: Sequence[float], shares: list[int]) -> None:
    assert share_out(count, weights) == shares
    assert sum(shares) == count


def test_ids_are_whole_numbers(tmp_path: Path) -> None:
    found = choose_windows([Source("c4", c4(tmp_path, ["abc" * 9]))], encode, count=1, length=4, seed=0)
    assert found.ids.dtype == np.int64
