"""Read the calibration sets that people use, each in the format in which it is published, document by document."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from passopt.frontends.calibration.ceval_subjects import SUBJECTS
from passopt.frontends.calibration.text_files import Document, open_text, reading
from passopt.ir.errors import ModelError
from passopt.ir.json_text import parse_json, stated

#: A plain text is cut at the ends of lines into pieces of about so many characters.
_PIECE = 32 << 10
#: The characters of a JSON array that are read at a time, and the most that one entry of it may have.
_CHUNK, _LARGEST_ENTRY = 64 << 10, 16 << 20
_CHOICES = ("A", "B", "C", "D")
_COLUMNS = ("question", *_CHOICES, "answer")
_MEMBER = re.compile(r"(?:.*/)?(?P<split>dev|val|test)/(?P<subject>\w+?)_(?:dev|val|test)\.csv")


def read_c4(path: Path) -> Iterator[Document]:
    """Yield the texts of JSON lines with a key "text", as C4 is published (`c4-train.00000-of-01024.json.gz`)."""
    for where, entry in json_lines(path):
        text = stated(entry, "text", "a text", where)
        if text is None:
            raise ModelError(f"{where}: has no text; a line of C4 is an object with the key text")
        yield Document(text)


def read_messages(path: Path) -> Iterator[Document]:
    """Yield the conversations of JSON lines with a key "messages", a list of objects with role and content."""
    for where, entry in json_lines(path):
        listed = entry.get("messages")
        if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
            raise ModelError(f"{where}: messages is no list of objects with role and content")
        yield Document(messages=tuple((_part(item, "role", where), _part(item, "content", where)) for item in listed))


def read_alpaca(path: Path) -> Iterator[Document]:
    """Yield instruction, input and output of a JSON array of objects, as in `alpaca_data_cleaned.json`."""
    with open_text(path) as file:
        for number, entry in enumerate(_array_entries(file, path)):
            where = f"{path}: entry {number}"
            if not isinstance(entry, dict) or "instruction" not in entry:
                raise ModelError(f"{where}: expected an object with instruction, input and output")
            parts = [stated(entry, key, "a text", where) or "" for key in ("instruction", "input", "output")]
            yield Document("\n".join(part for part in parts if part))


def read_text(path: Path) -> Iterator[Document]:
    """Yield pieces of a plain UTF-8 text, cut at the ends of lines."""
    with open_text(path) as file:
        lines: list[str] = []
        length = 0
        for line in _short_lines(file):
            lines.append(line)
            length += len(line)
            if length >= _PIECE:
                yield Document("".join(lines))
                lines, length = [], 0
    if text := "".join(lines):
        yield Document(text)


def read_ceval(path: Path) -> Iterator[Document]:
    """Yield the questions of `ceval-exam.zip` with their answers, in the form in which C-Eval asks them.

    Questions of the split test have no answer there, and end with the word that asks for it.
    """
    with _open_archive(path) as archive:
        found = [(info, match) for info in archive.infolist() if (match := _MEMBER.fullmatch(info.filename))]
        if not found:
            raise ModelError(f"{path}: holds no file such as dev/logic_dev.csv, as ceval-exam.zip does")
        for info, match in found:
            where = f"{path}: {info.filename}"
            for row in _rows(archive, info, where):
                title = ceval_title(match["subject"])
                yield Document(f"{title}\n\n{ceval_question(row, with_answer=True)}")


def ceval_rows(path: Path, split: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the subject and the columns of every question of a split, in the order of the archive.

    Args:
        path: `ceval-exam.zip`.
        split: dev, val or test.
    """
    with _open_archive(path) as archive:
        for info in archive.infolist():
            match = _MEMBER.fullmatch(info.filename)
            if match is not None and match["split"] == split:
                for row in _rows(archive, info, f"{path}: {info.filename}"):
                    yield match["subject"], row


def ceval_title(subject: str) -> str:
    """Return the line that stands above the questions of a subject."""
    return f"以下是中国关于{SUBJECTS.get(subject, subject)}考试的单项选择题，请选出其中的正确答案。"


def ceval_question(row: Mapping[str, str], *, with_answer: bool) -> str:
    """Return a question as C-Eval prints it, with the choices A to D and the word that asks for the answer."""
    answer = row.get("answer") or "" if with_answer else ""
    choices = [f"{choice}. {row[choice]}" for choice in _CHOICES]
    return "\n".join([row["question"], *choices, f"答案：{answer}"])


def _open_archive(path: Path) -> zipfile.ZipFile:
    with reading(path):
        try:
            return zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ModelError(f"{path}: is no zip archive, as ceval-exam.zip is, or damaged: {error}") from error


def _rows(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Iterator[dict[str, str]]:
    try:
        with archive.open(info) as member, io.TextIOWrapper(member, encoding="utf-8-sig", newline="") as text:
            table = csv.DictReader(text)
            needed = set(_COLUMNS) - ({"answer"} if "/test/" in f"/{info.filename}" else set())
            if missing := needed - set(table.fieldnames or ()):
                raise ModelError(f"{where}: lacks the columns {', '.join(sorted(missing))}")
            for row in table:
                if any(row.get(name) is None for name in needed):
                    raise ModelError(f"{where}, line {table.line_num}: has fewer columns than the first line")
                yield row
    except (zipfile.BadZipFile, ValueError, csv.Error, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ModelError(f"{where}: cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise ModelError(f"{where}: is not JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ModelError(f"{where}: is no JSON object")
            yield where, entry


def _part(item: Mapping[str, Any], key: str, where: str) -> str:
    value = stated(item, key, "a text", where)
    if value is None:
        raise ModelError(f"{where}: a message has no {key}")
    return str(value)


def _array_entries(file: TextIO, path: Path) -> Iterator[Any]:
    """Yield the entries of one JSON array without holding it whole."""
    decoder = json.JSONDecoder()
    text = file.read(_CHUNK).lstrip()
    if not text.startswith("["):
        raise ModelError(f"{path}: is no JSON array, as alpaca_data_cleaned.json is")
    text = text[1:]
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            entry, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            more = file.read(_CHUNK)
            if not more or len(text) > _LARGEST_ENTRY:
                raise ModelError(f"{path}: is a JSON array that is cut off or damaged: {error}") from error
            text += more
            continue
        yield entry
        text = text[end:]


def _short_lines(file: TextIO) -> Iterator[str]:
    """Yield lines, and parts of lines that are longer than a piece."""
    while line := file.readline(_PIECE):
        yield line
