"""Map weights.safetensors into memory (or copy it), check it, and hand out its tensors.

Size and header are checked at every load. All bytes are hashed when a file is loaded for the first time; then a stamp
file beside it records which file was verified (device, inode, size, times), and later loads trust it as long as it is
still that file. Only hashing takes long: some seconds for 8 GB on two slow cores, against a tenth of a second for the
rest. A copy takes as long as hashing at every load, but it usually lies on the NUMA node of the threads that make it,
whereas the page cache may lie on another node, also on the host of a virtual machine. Reading weights from there was
between 0 and 40 % slower, varying from day to day.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.json_text import parse_json, read_json
from passopt.ir.regular_files import open_regular
from passopt.ir.safetensors_header import read_header_of
from passopt.targets.tvm.compiled_folder import WeightsFile
from passopt.targets.tvm.engine import virtual_machine

#: The number of bytes per read.
_PIECE = 256 << 10
STAMP_SUFFIX = ".verified"
_AGAIN = "Restore the file, or compile the model again."
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class WeightsMap:
    """A weights file, mapped read-only or copied into memory, used as a context manager while it is read.

    The tensors keep the map or the copy alive after the file is closed. The file is opened only once, so what is
    checked, read and stamped is the same file, even if another one takes its name meanwhile.
    """

    def __init__(self, path: Path, entry: WeightsFile) -> None:
        """Open and map the file at `path` and check it against its `entry` in library.json.

        Raises ModelError if the file is missing, if its size or header is not as it was written, or if a tensor does
        not start at a multiple of 64 bytes.
        """
        self.path = path
        self._entry = entry
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(open_regular(path))
                self._open()
            except OSError as error:
                raise ModelError(f"{path}: cannot be read: {error.strerror}. {_AGAIN}") from error
            self._closing = stack.pop_all()

    def _open(self) -> None:
        # Taken before anything is read: a later write changes the times, so that the stamp does not match any more.
        self._found = os.fstat(self._file.fileno())
        size = self._found.st_size
        if size != self._entry.nbytes:
            raise ModelError(f"{self.path}: has {size:,} bytes, expected {self._entry.nbytes:,}. {_AGAIN}")
        header = read_header_of(self._file, self.path)
        if blake3.blake3(header).hexdigest() != self._entry.header:
            raise ModelError(f"{self.path}: its header is not the one that was written (blake3 differs). {_AGAIN}")
        self._start = len(header)
        self._tensors: Mapping[str, Any] = parse_json(header[8:])
        for name in self._entry.tensors:
            start, _ = self._place(name)
            if start % virtual_machine.ALIGNMENT:
                raise ModelError(
                    f"{self.path}: tensor {name!r} starts at byte {start}, "
                    f"no multiple of {virtual_machine.ALIGNMENT}. {_AGAIN}"
                )
        self._bytes: npt.NDArray[np.uint8] = np.memmap(self._file, np.uint8, mode="r")

    def __enter__(self) -> WeightsMap:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; its map or copy lives on as long as tensors use it."""
        self._closing.close()

    def read(
        self, threads: int, *, verify: bool, copy: bool = False, progress: Callable[[int], None] | None = None
    ) -> None:
        """Read every tensor once, to compare its hash, to copy it into memory of this process, or both.

        Args:
            threads: The number of threads that share the work.
            verify: If true, hash every tensor and compare its digest.
            copy: If true, copy every tensor, so that `tensors` returns the copies.
            progress: Called with the bytes read since its last call.

        Raises:
            ModelError: If a tensor is damaged; the message names it.
            UsageError: If there is no memory for a copy.
        """
        room = _room(self.path, self._bytes.nbytes) if copy else None
        # The largest tensors come first, so that no thread ends long after the others.
        names = sorted(self._entry.tensors, key=lambda name: -self._place(name)[1])
        with ThreadPoolExecutor(threads) as pool:
            digests = pool.map(functools.partial(self._read, room, verify), names)
            for name, digest in zip(names, digests, strict=True):
                if digest not in (None, self._entry.tensors[name]):
                    pool.shutdown(cancel_futures=True)
                    raise ModelError(f"{self.path}: tensor {name!r} is damaged (blake3 differs). {_AGAIN}")
                if progress:
                    progress(self._place(name)[1])
        if room is not None:
            self._bytes = np.frombuffer(room, np.uint8)

    def is_stamped(self) -> bool:
        """Return whether exactly this file was verified before."""
        try:
            return bool(read_json(self._stamp_path) == self._stamp())
        except (OSError, ValueError):
            return False

    def stamp(self) -> None:
        """Write the stamp that says that this file was verified.

        If the folder is not writable, there is no stamp, and the file is verified at every load.
        """
        draft = self._stamp_path.with_name(f"{self._stamp_path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(self._stamp()) + "\n", encoding="utf-8")
            draft.replace(self._stamp_path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def tensors(self, names: tuple[str, ...]) -> list[Any]:
        """Return the named tensors for TVM, as views of the map or of the copy that `read` made.

        Nothing is read or copied here.
        """
        # numpy does not export read-only arrays through DLPack, although kernels only read them. The detour by the
        # address makes an array that numpy takes for writable.
        raw: Any = (ctypes.c_uint8 * self._bytes.nbytes).from_address(self._bytes.ctypes.data)
        raw.map = self._bytes
        storage = np.frombuffer(raw, np.uint8)
        return [self._tensor(storage, name) for name in names]

    def _tensor(self, storage: npt.NDArray[np.uint8], name: str) -> Any:
        entry = self._tensors[name]
        start, nbytes = self._place(name)
        return virtual_machine.view(storage[start : start + nbytes], entry["shape"], _DTYPES[entry["dtype"]])

    def _place(self, name: str) -> tuple[int, int]:
        """Return where a tensor lies in the file: the offset of its first byte, and its size in bytes."""
        start, stop = self._tensors[name]["data_offsets"]
        return self._start + start, stop - start

    def _read(self, room: mmap.mmap | None, verify: bool, name: str) -> str | None:
        """Read a tensor, copying it to its place in `room` if there is one, and return its digest if `verify`.

        It is read in pieces that stay in the cache of a core. Hashing the map instead would wait for page faults.
        """
        hasher = blake3.blake3() if verify else None
        offset, left = self._place(name)
        buffer = memoryview(room)[offset:] if room is not None else memoryview(bytearray(min(left, _PIECE)))
        while left:
            piece = buffer[: min(left, _PIECE)]
            count = os.preadv(self._file.fileno(), [piece], offset)
            if not count:
                raise ModelError(f"{self.path}: ends at byte {offset}, inside tensor {name!r}. {_AGAIN}")
            if hasher:
                hasher.update(piece[:count])
            if room is not None:
                buffer = buffer[count:]
            offset, left = offset + count, left - count
        return str(hasher.hexdigest()) if hasher else None

    @property
    def _stamp_path(self) -> Path:
        return self.path.with_name(self.path.name + STAMP_SUFFIX)

    def _stamp(self) -> dict[str, object]:
        found = self._found
        times = {"mtime": found.st_mtime_ns, "ctime": found.st_ctime_ns}
        return {"root": self._entry.root, "device": found.st_dev, "inode": found.st_ino, "size": found.st_size} | times


def _room(path: Path, nbytes: int) -> mmap.mmap:
    """Return `nbytes` of memory of this process, aligned to pages like a map; raise UsageError if there is none."""
    try:
        room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{path}: no memory for a copy of {nbytes:,} bytes; leave out `copy_weights`") from error
    with contextlib.suppress(OSError):  # Huge pages mean fewer pages to look up, but not every kernel has them.
        room.madvise(mmap.MADV_HUGEPAGE)
    return room
