"""Keep the log-probabilities of a reference on disk, window by window, so that other models are compared with them.

A folder holds `reference.json` (what it is of), `log_probabilities.bin` [positions, vocab], `tokens.bin` (surprise and
most likely token of each position) and `journal.jsonl`, with a line for each finished window. Only what the journal
names is used, and only if its digest is right; an interrupted run goes on after the last of these windows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import blake3
import numpy as np

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.json_text import parse_json, read_json
from passopt.ir.version import __version__

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
StoredDtype: TypeAlias = Literal["fp16", "fp32"]

FORMAT = "passopt-reference"
KEY_NAME, JOURNAL_NAME = "reference.json", "journal.jsonl"
LOGS_NAME, TOKENS_NAME = "log_probabilities.bin", "tokens.bin"
#: The dtypes in which log-probabilities are kept. Half as many bytes move a divergence by 1e-7 nats and 1e-5 of it.
DTYPES: Mapping[StoredDtype, str] = {"fp16": "<f2", "fp32": "<f4"}
#: What is kept of a position besides its distribution: −log p of the token that follows, and the most likely token.
_TOKEN = np.dtype([("surprise", "<f8"), ("top", "<i4")])
#: The space that stays free on the disk.
_SPARE = 64 << 20


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of one window.

    Attributes:
        log_probabilities: [positions, vocab], mapped from the file.
        surprise: −log p of the token that follows each position, in nats.
        top: The most likely token of each position.
    """

    log_probabilities: Array
    surprise: Array
    top: Array


class ReferenceStore:
    """The predictions of one reference on one text.

    Use `open_store` to make one.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], vocab: int, dtype: StoredDtype) -> None:
        """Do not call this: use `open_store`."""
        self.folder = folder
        self.dtype = dtype
        self._lengths = lengths
        self._starts = [0, *np.cumsum(lengths).tolist()]
        self._vocab = vocab
        self._numpy = np.dtype(DTYPES[dtype])
        self._digests = _finished(folder / JOURNAL_NAME, len(lengths), self._numpy.itemsize * vocab, self._starts)
        self._checked: set[int] = set()

    @property
    def finished(self) -> int:
        """Return the number of windows that are kept; they are the first ones."""
        return len(self._digests)

    @property
    def is_complete(self) -> bool:
        """Return whether all windows are kept."""
        return self.finished == len(self._lengths)

    @property
    def missing_bytes(self) -> int:
        """Return the bytes that the windows that are not kept yet will take."""
        rows = self._starts[-1] - self._starts[self.finished]
        return int(rows * (self._vocab * self._numpy.itemsize + _TOKEN.itemsize))

    def check_space(self, missing: int) -> None:
        """Raise UsageError if the disk has too little room for so many bytes that are missing."""
        free = shutil.disk_usage(self.folder).free
        if missing and missing + _SPARE > free:
            raise UsageError(
                f"{self.folder}: the reference's log-probabilities in {self.dtype} take {missing:,} bytes more, the "
                f"disk has {free:,} free; name a folder on another disk with `cache`, or give a smaller `max_tokens`"
            )

    @contextlib.contextmanager
    def window(self) -> Iterator[WindowWriter]:
        """Take the next window in a block; it counts as kept only after the block has ended without an error."""
        number = self.finished
        with contextlib.ExitStack() as files:
            opened = [
                files.enter_context(_opened(self.folder / name, self._starts[number] * size))
                for name, size in ((LOGS_NAME, self._vocab * self._numpy.itemsize), (TOKENS_NAME, _TOKEN.itemsize))
            ]
            writer = WindowWriter(opened[0], opened[1], self._numpy)
            yield writer
            if writer.rows != self._lengths[number]:
                raise AssertionError(f"window {number}: {writer.rows} rows, {self._lengths[number]} expected")
            for file in opened:
                file.flush()
                os.fsync(file.fileno())
        digest = writer.digest()
        with (self.folder / JOURNAL_NAME).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"window": number, "rows": writer.rows, "blake3": digest}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._digests.append(digest)
        self._checked.add(number)

    def read(self, number: int) -> Kept:
        """Return what is kept of a window.

        Raises:
            ModelError: If the files are not what was written.
        """
        start, rows = self._starts[number], self._lengths[number]
        try:
            logs = np.memmap(
                self.folder / LOGS_NAME, self._numpy, "r", start * self._vocab * self._numpy.itemsize,
                (rows, self._vocab),
            )  # fmt: skip
            tokens = np.fromfile(self.folder / TOKENS_NAME, _TOKEN, rows, offset=start * _TOKEN.itemsize)
        except (OSError, ValueError) as error:
            raise self._damaged(number) from error
        if number not in self._checked:
            digest = blake3.blake3(np.ascontiguousarray(logs).view(np.uint8).data)
            digest.update(tokens.tobytes())
            if len(tokens) != rows or digest.hexdigest() != self._digests[number]:
                raise self._damaged(number)
            self._checked.add(number)
        return Kept(logs, tokens["surprise"], tokens["top"])

    def _damaged(self, number: int) -> ModelError:
        return ModelError(
            f"{self.folder}: what is kept of window {number} is not what was written; remove the folder and run again"
        )


class WindowWriter:
    """Take the rows of one window, and hash them on their way."""

    def __init__(self, logs: Any, tokens: Any, dtype: np.dtype[Any]) -> None:
        """Do not call this: `ReferenceStore.window` makes it."""
        self._logs, self._file, self._numpy = logs, tokens, dtype
        self._blake3 = blake3.blake3()
        self._tokens: list[bytes] = []
        self.rows = 0

    def put(self, log_probabilities: Array, surprise: Array, top: Array) -> None:
        """Write the next rows: log-probabilities [rows, vocab], surprise and most likely token of each."""
        with np.errstate(over="ignore"):  # what fp16 does not hold becomes −inf: such a token is never predicted
            data = log_probabilities.astype(self._numpy).tobytes()
        self._logs.write(data)
        self._blake3.update(data)
        entry = np.empty(len(top), _TOKEN)
        entry["surprise"], entry["top"] = surprise, top
        self._file.write(entry.tobytes())
        self._tokens.append(entry.tobytes())
        self.rows += len(top)

    def digest(self) -> str:
        """Return the digest of everything that was put."""
        digest = self._blake3.copy()
        for entry in self._tokens:
            digest.update(entry)
        return str(digest.hexdigest())


@contextlib.contextmanager
def open_store(
    parent: Path, key: Mapping[str, Any], lengths: Sequence[int], vocab: int, dtype: StoredDtype
) -> Iterator[ReferenceStore]:
    """Open the store for a key below a folder, for the time of a block; it is locked against other processes.

    Args:
        parent: The folder of all stores; it is made if it is missing.
        key: What decides the predictions: the model's files, the tokens, the windows.
        lengths: The scored positions of each window.
        vocab: The number of logits.
        dtype: The dtype in which log-probabilities are kept.

    Raises:
        UsageError: If another process uses the store, or the folder cannot be written.
        ModelError: If the folder holds something else.
    """
    whole = {"format": FORMAT, "version": 1, "passopt": __version__, **key, "vocab": vocab, "dtype": dtype}
    text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
    folder = parent / str(blake3.blake3(text.encode()).hexdigest())[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{parent}: cannot be used as `cache`: {error.strerror or error}") from error
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            _lock(descriptor, folder)
        _check_key(folder / KEY_NAME, text)
        yield ReferenceStore(folder, lengths, vocab, dtype)
    except OSError as error:
        raise UsageError(f"{folder}: writing failed: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{folder}: another passopt uses these kept predictions. Wait for it, or stop it.") from error


def _check_key(path: Path, text: str) -> None:
    """Write the key into a new folder, or compare it with the one that is there."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        return
    try:
        known = read_json(path)
    except ValueError:
        known = None
    if known != parse_json(text):
        raise ModelError(f"{path.parent}: is of another reference, or was edited; remove the folder and run again")


def _finished(journal: Path, windows: int, row_bytes: int, starts: Sequence[int]) -> list[str]:
    """Return the digests of the finished windows, as far as the journal and the length of the files agree."""
    if not journal.is_file():
        return []
    logs, tokens = (journal.with_name(name) for name in (LOGS_NAME, TOKENS_NAME))
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (logs, tokens)]
    text = journal.read_text(encoding="utf-8", errors="replace")
    digests: list[str] = []
    for line in text.splitlines():
        number = len(digests)
        try:
            entry = parse_json(line)
            rows, digest = int(entry["rows"]), str(entry["blake3"])
        except (ValueError, KeyError, TypeError):
            break
        stop = starts[number + 1] if number < windows else 0
        if entry.get("window") != number or rows != stop - starts[min(number, windows)]:
            break
        if sizes[0] < stop * row_bytes or sizes[1] < stop * _TOKEN.itemsize:
            break
        digests.append(digest)
    whole = "".join(f"{line}\n" for line in text.splitlines()[: len(digests)])
    if whole != text:  # what cannot be used is forgotten, also half a line, which the next one would follow
        partial = journal.with_suffix(".partial")
        partial.write_text(whole, encoding="utf-8")
        partial.replace(journal)
    return digests


@contextlib.contextmanager
def _opened(path: Path, size: int) -> Iterator[Any]:
    """Open a file for writing behind its first `size` bytes; what an interrupted run left behind these is cut off."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        yield file
