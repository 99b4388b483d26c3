"""weights.safetensors mapped into memory, or copied if asked, checked, and handed out as tensors.

Size and header are checked at every load. All bytes are hashed when a file is loaded for the first time; then a stamp
beside it says which file that was (device, inode, size, times), and the next loads trust it as long as it is that file.
Hashing is all that takes time: some seconds for 8 GB on two slow cores, against a tenth of a second for the rest.
A copy costs as much at every load, but usually lies on the NUMA node of the threads that make it; the page cache may
lie on another, of a virtual machine's host too. How much slower that is to read depends on the day: from 0 to 40 %.
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
from passopt.ir.weights.safetensors_header import read_header_of
from passopt.targets.tvm.compiled_folder import WeightsFile
from passopt.targets.tvm.engine import virtual_machine

#: Bytes per read.
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
    """The file, mapped read-only, or its copy; tensors keep either alive. Open it as a context while it is read.

    It is opened once: what is checked, read and stamped is one file, even if another takes its name meanwhile.
    """

    def __init__(self, path: Path, entry: WeightsFile) -> None:
        """Raises ModelError if the file is missing, its size or header is not as written, or a tensor not aligned."""
        self.path = path
        self._entry = entry
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("rb"))
                self._open()
            except OSError as error:
                raise ModelError(f"{path}: cannot be read: {error.strerror}. {_AGAIN}") from error
            self._closing = stack.pop_all()

    def _open(self) -> None:
        # What is written in place from now on differs in its times, and so from the stamp.
        self._found = os.fstat(self._file.fileno())
        size = self._found.st_size
        if size != self._entry.nbytes:
            raise ModelError(f"{self.path}: has {size:,} bytes, expected {self._entry.nbytes:,}. {_AGAIN}")
        header = read_header_of(self._file, self.path)
        if blake3.blake3(header).hexdigest() != self._entry.header:
            raise ModelError(f"{self.path}: its header is not the one that was written (blake3 differs). {_AGAIN}")
        self._start = len(header)
        self._tensors: Mapping[str, Any] = json.loads(header[8:])
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
        """Close the file; its map or copy stays with the tensors."""
        self._closing.close()

    def read(
        self, threads: int, *, verify: bool, copy: bool = False, progress: Callable[[int], None] | None = None
    ) -> None:
        """Read every tensor once: to hash it (`verify`), to `copy` it into memory of this process, or both.

        `threads` share the work; `progress` gets the bytes read since its last call. Raises ModelError with the name of
        a tensor that differs, UsageError if there is no memory for a copy.
        """
        room = _room(self.path, self._bytes.nbytes) if copy else None
        # Largest first, so that no thread ends long after the others.
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
        """True if exactly this file was verified before."""
        try:
            return bool(json.loads(self._stamp_path.read_text(encoding="utf-8")) == self._stamp())
        except (OSError, ValueError):
            return False

    def stamp(self) -> None:
        """Remember that this file was verified. A folder that cannot be written to is verified at every load."""
        draft = self._stamp_path.with_name(f"{self._stamp_path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(self._stamp()) + "\n", encoding="utf-8")
            draft.replace(self._stamp_path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def tensors(self, names: tuple[str, ...]) -> list[Any]:
        """The tensors as TVM takes them, of the map or of the copy that `read` made. Nothing is copied or read here."""
        # numpy refuses to export what cannot be written to, though kernels only read it: hence the detour by address.
        raw: Any = (ctypes.c_uint8 * self._bytes.nbytes).from_address(self._bytes.ctypes.data)
        raw.map = self._bytes
        storage = np.frombuffer(raw, np.uint8)
        return [self._tensor(storage, name) for name in names]

    def _tensor(self, storage: npt.NDArray[np.uint8], name: str) -> Any:
        entry = self._tensors[name]
        start, nbytes = self._place(name)
        return virtual_machine.view(storage[start : start + nbytes], entry["shape"], _DTYPES[entry["dtype"]])

    def _place(self, name: str) -> tuple[int, int]:
        """First byte in the file, and bytes."""
        start, stop = self._tensors[name]["data_offsets"]
        return self._start + start, stop - start

    def _read(self, room: mmap.mmap | None, verify: bool, name: str) -> str | None:
        """Read a tensor, to its place in `room` if there is one; its digest, if it shall be verified.

        In pieces that stay in the cache of a core: hashing the map instead would wait for page faults.
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
    """Memory of this process, aligned to pages as the file is. Raises UsageError."""
    try:
        room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{path}: no memory for a copy of {nbytes:,} bytes; leave out --copy-weights") from error
    with contextlib.suppress(OSError):  # fewer pages to look up; not every kernel has them
        room.madvise(mmap.MADV_HUGEPAGE)
    return room
