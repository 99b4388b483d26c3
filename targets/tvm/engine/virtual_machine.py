"""Load TVM's runtime and run compiled libraries in its Relax virtual machine, using only tvm_ffi.

`import tvm` takes over a second and loads the compiler (260 MB), whereas libtvm_runtime (3 MB) is enough to run a
library. TVM keeps a pool of threads for each calling thread, and the pool has one thread unless it is configured before
its first use. So each virtual machine has a thread of its own that makes all its calls.
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
#: The mode of TVM's pool in which threads may run on any of the given cores; every other mode pins them.
_SHARE_ALL_CORES = -3
#: The exceptions that tvm_ffi raises for errors of TVM, depending on their kind.
_FAILURES = (
    *(AssertionError, AttributeError, IndexError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
)


class VirtualMachine:
    """One loaded library, which is called like a function.

    All calls run on a thread of its own, which works with a pool of `threads` threads, itself included.
    """

    def __init__(self, path: Path, function: str, threads: int) -> None:
        """Load the library at `path` to call `function` with `threads` threads.

        Raises ModelError if `path` is not a Relax library or has no such function, and UsageError if TVM cannot start
        that many threads.
        """
        self._path = path
        self._caller = ThreadPoolExecutor(1, "passopt-engine")
        self._call: Callable[..., Any] = self._caller.submit(_load, path, function, threads).result()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return its result.

        Raises ModelError if the library fails, as it does on shapes that it was not compiled for.
        """
        try:
            return self._caller.submit(self._call, *arguments).result()
        except _FAILURES as error:
            raise ModelError(f"{self._path}: failed: {_first_line(error)}") from error

    def release_buffers(self) -> None:
        """Free the memory that TVM keeps for intermediate results; it is of no use to calls with other lengths."""
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
    """Return the module tvm_ffi with TVM's runtime library loaded; raise UsageError if it cannot be loaded."""
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
    """Keep tvm_ffi from importing torch inside this context.

    It does so wherever torch is installed, because of a conflict of symbols on Windows. That takes two seconds, and
    nothing here needs it.
    """
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def tensor(array: Array) -> Any:
    """Return a TVM tensor with a copy of `array`, aligned to 64 bytes."""
    aligned = allocate(array.shape, array.dtype)
    np.copyto(aligned, array)
    return runtime().from_dlpack(aligned)


def zeros(shape: Sequence[int], dtype: str) -> Any:
    """Return a TVM tensor of zeros in `dtype` (TVM's name), aligned to pages.

    Pages that are never written to take no memory.
    """
    nbytes = int(np.prod(shape, dtype=np.int64)) * runtime().dtype(dtype).itemsize
    room = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return view(np.frombuffer(room, np.uint8), shape, dtype)


def view(storage: Array, shape: Sequence[int], dtype: str) -> Any:
    """Return the bytes `storage` as a TVM tensor of `shape` and `dtype`, which keeps them alive.

    `dtype` is TVM's name and may be one that numpy does not know.
    """
    # `storage` must hold only the bytes of this tensor: kernels accept no tensor with an offset into another one.
    return reinterpret(runtime().from_dlpack(storage), shape, dtype)


def reinterpret(tensor: Any, shape: Sequence[int], dtype: str) -> Any:
    """Return the bytes of `tensor` with another shape and dtype, without copying.

    The dtype must have the same size as that of `tensor`, unless `tensor` is one of bytes.
    """
    ffi = runtime()
    return _create_view()(tensor, ffi.Shape(tuple(shape)), ffi.dtype(dtype), 0)


@functools.cache
def _create_view() -> Any:
    return runtime().get_global_func("runtime.TVMTensorCreateView")


def allocate(shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """Return a new array that starts at a multiple of 64 bytes, as every tensor given to a kernel must."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
