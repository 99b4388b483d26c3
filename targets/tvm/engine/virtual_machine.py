"""TVM's runtime and its Relax virtual machine, by tvm_ffi alone.

`import tvm` takes over a second and loads the compiler (260 MB); a library runs on libtvm_runtime (3 MB). TVM keeps a
pool of threads per calling thread, of one thread unless told otherwise before its first use: so each virtual machine
has a thread of its own that makes all its calls.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError, UsageError

ALIGNMENT = 64
Array = npt.NDArray[Any]

_CPU = 1
_POOLED = 2
#: Threads of the pool may run on any of the given cores; every other mode pins them.
_SHARE_ALL_CORES = -3
#: What tvm_ffi raises for errors of TVM, by their kinds.
_FAILURES = (
    *(AssertionError, AttributeError, IndexError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
)


class VirtualMachine:
    """One loaded library. Calls run on a thread of its own, with a pool of `threads` (itself included)."""

    def __init__(self, path: Path, function: str, threads: int) -> None:
        """Raises ModelError if `path` is no Relax library or has no such function, UsageError on too many threads."""
        self._path = path
        self._caller = ThreadPoolExecutor(1, "passopt-engine")
        self._call: Callable[..., Any] = self._caller.submit(_load, path, function, threads).result()

    def __call__(self, *arguments: Any) -> Any:
        """Raises ModelError if the library fails, as it does on shapes that it was not compiled for."""
        try:
            return self._caller.submit(self._call, *arguments).result()
        except _FAILURES as error:
            raise ModelError(f"{self._path}: failed: {_first_line(error)}") from error

    def release_buffers(self) -> None:
        """Give back the memory that the machine keeps for intermediate results: other lengths take other sizes."""
        self._caller.submit(runtime().get_global_func("vm.builtin.memory_manager.clear")).result()


def _load(path: Path, function: str, threads: int) -> Callable[..., Any]:
    ffi = runtime()
    _start_pool(ffi, threads)
    try:
        machine = ffi.load_module(str(path))["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        return machine[function]  # type: ignore[no-any-return]
    except _FAILURES as error:
        raise ModelError(f"{path}: cannot be loaded: {_first_line(error)}. Compile the model again.") from error


def _start_pool(ffi: Any, threads: int) -> None:
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, threads, cores, threads)
    started = ffi.get_global_func("runtime.NumThreads")()
    if started != threads:
        raise UsageError(f"{threads} threads were asked for, TVM starts {started} on {len(cores)} processors")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@functools.cache
def runtime() -> Any:
    """The module tvm_ffi with TVM's runtime library loaded. Raises UsageError if the library is not there."""
    with _torch_withheld():
        import tvm_ffi
        import tvm_ffi.libinfo
    try:
        tvm_ffi.libinfo.load_lib_ctypes("apache-tvm", "tvm_runtime", "RTLD_GLOBAL")
    except (RuntimeError, OSError) as error:
        raise UsageError(f"TVM's runtime cannot be loaded: {error}; pip install 'passopt[run]' brings it") from error
    return tvm_ffi


@contextlib.contextmanager
def _torch_withheld() -> Iterator[None]:
    """tvm_ffi imports torch if it can, for a conflict of symbols on Windows: two seconds that nothing here needs."""
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def tensor(array: Array) -> Any:
    """A tensor with a copy of `array`, aligned."""
    aligned = allocate(array.shape, array.dtype)
    np.copyto(aligned, array)
    return runtime().from_dlpack(aligned)


def zeros(shape: Sequence[int], dtype: str) -> Any:
    """A tensor of zeros in `dtype` (TVM's name), aligned. Pages that are never written take no memory."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * runtime().dtype(dtype).itemsize
    room = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return view(np.frombuffer(room, np.uint8), shape, dtype)


def view(storage: Array, shape: Sequence[int], dtype: str) -> Any:
    """The bytes `storage` as a tensor in `dtype`, also one that numpy does not know; it keeps them alive."""
    # Of the bytes of this tensor alone: kernels take no tensor that starts anywhere in another one.
    return reinterpret(runtime().from_dlpack(storage), shape, dtype)


def reinterpret(tensor: Any, shape: Sequence[int], dtype: str) -> Any:
    """The same bytes in another dtype of the same size, or of bytes; no copy."""
    ffi = runtime()
    return _create_view()(tensor, ffi.Shape(tuple(shape)), ffi.dtype(dtype), 0)


@functools.cache
def _create_view() -> Any:
    return runtime().get_global_func("runtime.TVMTensorCreateView")


def allocate(shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """An array that starts at a multiple of 64 bytes, as every tensor of a kernel must."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
