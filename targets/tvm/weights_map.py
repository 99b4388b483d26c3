"""weights.safetensors mapped into memory, checked, and handed out as tensors without a copy.

Size and header are checked at every load. All bytes are hashed when a file is loaded for the first time; then a stamp
beside it says which file that was (device, inode, size, times), and the next loads trust it as long as it is that file.
Hashing is all that takes time: some seconds for 8 GB on two slow cores, against a tenth of a second for the rest.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError
from passopt.ir.safetensors_header import read_header
from passopt.targets.tvm import vm
from passopt.targets.tvm.library import WeightsFile

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
    """The file, mapped read-only; tensors keep the map alive."""

    def __init__(self, path: Path, entry: WeightsFile) -> None:
        """Raises ModelError if the file is missing, or its size or header is not that of `entry`."""
        self.path = path
        self._entry = entry
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}. {_AGAIN}") from error
        if size != entry.nbytes:
            raise ModelError(f"{path}: has {size:,} bytes, expected {entry.nbytes:,}. {_AGAIN}")
        header = read_header(path)
        if blake3.blake3(header).hexdigest() != entry.header:
            raise ModelError(f"{path}: its header is not the one that was written (blake3 differs). {_AGAIN}")
        self._start = len(header)
        self._tensors: Mapping[str, Any] = json.loads(header[8:])
        self._bytes: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")

    def verify(self, threads: int) -> None:
        """Hash every tensor; raises ModelError with the name of one that differs. `threads` share the work."""
        # Largest first, so that no thread ends long after the others.
        names = sorted(self._entry.tensors, key=lambda name: -self._place(name)[1])
        with self.path.open("rb") as file, ThreadPoolExecutor(threads) as pool:
            digests = pool.map(functools.partial(self._digest, file.fileno()), names)
            for name, digest in zip(names, digests, strict=True):
                if digest != self._entry.tensors[name]:
                    pool.shutdown(cancel_futures=True)
                    raise ModelError(f"{self.path}: tensor {name!r} is damaged (blake3 differs). {_AGAIN}")

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
            return

    def tensors(self, names: tuple[str, ...]) -> list[Any]:
        """The tensors as TVM takes them. Nothing is copied or read."""
        # numpy refuses to export what cannot be written to, though kernels only read it: hence the detour by address.
        raw: Any = (ctypes.c_uint8 * self._bytes.nbytes).from_address(self._bytes.ctypes.data)
        raw.map = self._bytes
        storage = np.frombuffer(raw, np.uint8)
        return [self._tensor(storage, name) for name in names]

    def _tensor(self, storage: npt.NDArray[np.uint8], name: str) -> Any:
        entry = self._tensors[name]
        start, nbytes = self._place(name)
        if start % vm.ALIGNMENT:
            raise ModelError(f"{self.path}: tensor {name!r} starts at byte {start}, no multiple of {vm.ALIGNMENT}")
        return vm.view(storage[start : start + nbytes], entry["shape"], _DTYPES[entry["dtype"]])

    def _place(self, name: str) -> tuple[int, int]:
        """First byte in the file, and bytes."""
        start, stop = self._tensors[name]["data_offsets"]
        return self._start + start, stop - start

    def _digest(self, file: int, name: str) -> str:
        """Read in pieces that stay in the cache of a core: over the map, page faults take longer than hashing."""
        hasher = blake3.blake3()
        offset, left = self._place(name)
        buffer = memoryview(bytearray(min(left, _PIECE)))
        while left and (count := os.preadv(file, [buffer[:left]], offset)):
            hasher.update(buffer[:count])
            offset, left = offset + count, left - count
        return str(hasher.hexdigest())

    @property
    def _stamp_path(self) -> Path:
        return self.path.with_name(self.path.name + STAMP_SUFFIX)

    def _stamp(self) -> dict[str, object]:
        found = self.path.stat()
        times = {"mtime": found.st_mtime_ns, "ctime": found.st_ctime_ns}
        return {"root": self._entry.root, "device": found.st_dev, "inode": found.st_ino, "size": found.st_size} | times
