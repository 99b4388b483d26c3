"""Load a compiled folder of one rank and run it with its KV caches.

Everything that can be refused (CPU, digests, lengths) is refused before any code of the library runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import blake3
import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.regular_files import open_regular
from passopt.targets.tvm.compiled_folder import CacheLayout, Library, RankFolders, read_library
from passopt.targets.tvm.engine import virtual_machine
from passopt.targets.tvm.engine.available_memory import check_caches, check_copy, no_room
from passopt.targets.tvm.engine.cores import count_cores
from passopt.targets.tvm.engine.mapped_weights import WeightsMap
from passopt.targets.tvm.machines import missing_features

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

#: A prefill of more columns runs in parts, so that intermediate results stay in the caches of the CPU and their memory
#: is bounded.
PREFILL_COLUMNS = 192

_CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


class Engine:
    """A loaded model whose `batch` sequences advance together.

    A column is one token position of all sequences, padding included. `past` columns are in the caches, which hold at
    most `capacity` columns; `cache_bytes` is what the caches take at that length.
    """

    def __init__(self, library: Library, machine: virtual_machine.VirtualMachine, parameters: Sequence[Any]) -> None:
        """Do not call this: use `Engine.load`."""
        self.library = library
        self._machine = machine
        self._parameters = tuple(parameters)
        self._past: _Past
        #: The number of columns of the calls for which TVM still holds memory for intermediate results.
        self._buffers_of = 1
        self.batch = 0
        self.capacity = 0
        #: The number of columns that were ever written; the part of the caches behind them takes no memory yet.
        self._written = 0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        batch: int = 1,
        capacity: int | None = None,
        threads: int | None = None,
        verify_weights: bool = False,
        copy_weights: bool = False,
        progress: Callable[[int], None] | None = None,
        alone: bool = True,
    ) -> Engine:
        """Load the library in `folder` and make room for `batch` sequences of `capacity` columns.

        Args:
            folder: A folder that `passopt compile` wrote.
            batch: The number of sequences that advance together.
            capacity: The number of columns that the caches hold; by default the model's positions.
            threads: The number of threads; by default the number of cores.
            verify_weights: If true, hash all weights even if this file was verified before. They are always hashed the
                first time that a file is loaded.
            copy_weights: If true, copy the weights into memory of this process instead of mapping the file.
            progress: Called with the bytes of weights read since its last call.
            alone: False for a rank of several. Its collectives must be registered before, and the process that starts
                all ranks must have checked that caches and copies of all of them fit the memory.

        Raises:
            ModelError: If the folder is damaged, incomplete or compiled for another CPU.
            UsageError: If memory or threads are too few, or an argument is out of range.
        """
        threads = count_cores() if threads is None else threads
        if threads < 1:
            raise UsageError(f"{threads} threads: at least one is needed")
        library = read_library(folder)
        if isinstance(library, RankFolders):
            raise ModelError(
                f"{folder}: holds one library per rank; a single engine loads one without tensor parallelism"
            )
        if library.degree > 1 and alone:
            raise ModelError(f"{folder}: is rank {library.rank} of {library.degree}; alone it is no whole model")
        _check_target(folder, library)
        _check_cpu(folder, library)
        _check_code(folder / library.library.file, library)
        capacity = checked_capacity(library, batch, capacity)
        if alone:
            copied = library.weights.nbytes if copy_weights else 0
            check_copy(folder, copied)
            check_caches([library.cache], batch, capacity, copied=copied)
        with WeightsMap(folder / library.weights.file, library.weights) as weights:
            machine = virtual_machine.VirtualMachine(folder / library.library.file, library.function, threads)
            unknown = verify_weights or not weights.is_stamped()
            if unknown or copy_weights:
                weights.read(threads, verify=unknown, copy=copy_weights, progress=progress)
            if unknown:
                weights.stamp()
            engine = cls(library, machine, weights.tensors(library.parameters))
        engine.allocate(batch, capacity)
        return engine

    @property
    def past(self) -> int:
        """Return the number of columns in the caches."""
        return self._past.columns

    @property
    def vocab(self) -> int:
        """Return the size of the vocabulary."""
        return self.library.logits.vocab

    @property
    def max_positions(self) -> int | None:
        """Return the number of positions that the model has; None if it sets no bound."""
        return self.library.max_positions

    @property
    def takes_positions(self) -> bool:
        """Return whether the model reads `positions`; otherwise a column's number is its position."""
        return "position_ids" in self.library.inputs

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all caches when full, as `CacheLayout.nbytes` counts them."""
        return self.library.cache.nbytes(self.batch, self.capacity)

    def allocate(self, batch: int, capacity: int | None = None) -> None:
        """Forget all columns and make room for `batch` sequences of `capacity` columns.

        `capacity` defaults to the model's positions. Raises UsageError if it does not fit the available memory, or if
        it is not given and the model sets no bound.
        """
        capacity = checked_capacity(self.library, batch, capacity)
        layout = self.library.cache
        check_caches([layout], batch, capacity, held=layout.nbytes(self.batch, self._written))
        kind = _InPlace if layout.kind == "in-place" else _Functional
        self._past = kind(layout, batch, capacity)
        self.batch, self.capacity, self._written = batch, layout.rounded(capacity), 0

    def reset(self) -> None:
        """Forget all columns but keep the memory of the caches."""
        self.truncate(0)

    def truncate(self, columns: int) -> None:
        """Forget all but the first `columns` columns; raise UsageError if there are fewer."""
        if not 0 <= columns <= self.past:
            raise UsageError(f"cannot keep {columns} columns of {self.past}")
        self._past.truncate(columns)

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike, positions: npt.ArrayLike | None = None) -> Logits:
        """Append columns to the caches and return their logits.

        Args:
            ids: The token ids, `[batch, seq]`.
            mask: `[batch, past + seq]`, 1 where a column is part of its sequence and 0 where it is padding.
            positions: The positions of the new columns, `[batch, seq]`, for models that read them. By default a
                column's position is the number of columns to its left whose mask is 1.

        Returns:
            The logits, `[batch, seq, vocab]`, or `[batch, 1, vocab]` of the last column, as the library says.

        Raises:
            UsageError: If an argument is wrong or the columns do not fit, before anything runs.
            ModelError: If the library fails. The caches are then as they were before the call.
        """
        columns = _whole_numbers("ids", ids)
        self._check_ids(columns)
        seq = columns.shape[1]
        seen = _whole_numbers("mask", mask)
        if seen.shape != (self.batch, self.past + seq):
            raise UsageError(
                f"mask has shape {list(seen.shape)}, expected {[self.batch, self.past + seq]} (past + seq)"
            )
        found = self._checked_positions(seen, seq, positions) if self.takes_positions else None
        before = self.past
        try:
            logits = [self._forward(columns, seen, found, before, *part) for part in self._parts(seq)]
        except BaseException:
            self._past.truncate(before)
            raise
        if self.library.logits.positions == "last":
            return logits[-1]
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    def _parts(self, seq: int) -> Iterator[tuple[int, int]]:
        """Return (start, stop) of each part in which `seq` columns run; the last part may be shorter than the others.

        A functional cache runs all columns in one part.
        """
        count = -(-seq // PREFILL_COLUMNS) if self.library.cache.kind == "in-place" else 1
        longest = -(-seq // count)
        return ((start, min(start + longest, seq)) for start in range(0, seq, longest))

    def _forward(self, ids: Ids, mask: Ids, positions: Ids | None, past: int, start: int, stop: int) -> Logits:
        """Run columns `start` to `stop` of `ids` and return their logits.

        `past` is the number of cached columns before the first column of `ids`; `mask` covers these and all of `ids`.
        """
        arguments = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, : past + stop]}
        if positions is not None:
            arguments["position_ids"] = positions[:, start:stop]
        inputs = [virtual_machine.tensor(arguments[name]) for name in self.library.inputs]
        self._release_unless(stop - start)
        shape = virtual_machine.runtime().Shape((self.past,))
        result = self._machine(*inputs, shape, *self._past.tensors, *self._parameters)
        logits = self._past.take(result, stop - start)
        self._written = max(self._written, self.past)
        return logits

    def _release_unless(self, seq: int) -> None:
        """Free the memory of intermediate results if the last call was a prefill of another length than `seq`.

        Prefills of the same length use the same memory again, whereas decoding has no use for it.
        """
        if self._buffers_of not in (1, seq):
            self._machine.release_buffers()
        self._buffers_of = seq

    def _check_ids(self, ids: Ids) -> None:
        if ids.ndim != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise UsageError(f"ids have shape {list(ids.shape)}, expected [{self.batch}, seq] with seq of at least 1")
        if ids.min() < 0 or ids.max() >= self.vocab:
            bad = next(int(number) for number in ids.flat if not 0 <= number < self.vocab)
            raise UsageError(f"token id {bad} is outside of the vocabulary (0 to {self.vocab - 1})")
        wanted = self.past + ids.shape[1]
        if wanted > self.capacity:
            raise UsageError(
                f"{ids.shape[1]} columns after {self.past} make {wanted}; the caches hold {self.capacity}. "
                f"Ask for a larger capacity, or shorten the input."
            )
        if self.max_positions is not None and not self.takes_positions and wanted > self.max_positions:
            raise UsageError(f"{wanted} columns: the model has {self.max_positions} positions. Shorten the input.")

    def _checked_positions(self, mask: Ids, seq: int, positions: npt.ArrayLike | None) -> Ids:
        if positions is None:
            found = np.maximum(np.cumsum(mask, axis=1)[:, -seq:] - 1, 0)
        else:
            found = _whole_numbers("positions", positions)
        if found.shape != (self.batch, seq):
            raise UsageError(f"positions have shape {list(found.shape)}, expected {[self.batch, seq]}")
        last = int(found.max())
        if found.min() < 0 or (self.max_positions is not None and last >= self.max_positions):
            raise UsageError(
                f"position {last if found.min() >= 0 else int(found.min())}: the model has {self.max_positions} "
                f"positions, counted from 0. Shorten the input."
            )
        return found


class _Past(Protocol):
    """The cached columns, as the tensors that the compiled function takes for them."""

    columns: int
    tensors: list[Any]

    def take(self, result: Any, seq: int) -> Logits:
        """Add the `seq` columns of a call, given the result of the function, and return its logits."""
        ...

    def truncate(self, columns: int) -> None:
        """Forget all but the first `columns` columns."""
        ...


class _InPlace:
    """A cache of full capacity, into which the function writes new columns."""

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        dtype = _CACHE_DTYPES[layout.dtype]
        blocks = layout.rounded(capacity) // layout.block
        key = (batch, layout.kv_heads, blocks, layout.head_dim, layout.block)
        value = (batch, layout.kv_heads, blocks * layout.block, layout.head_dim)
        layer = [(key, dtype), (value, dtype)]
        if layout.dtype == "int8":
            layer += [(value[:3], "float32")] * 2  # the scales of both
        try:
            self.tensors = [virtual_machine.zeros(*kind) for _ in range(layout.layers) for kind in layer]
        except (OSError, OverflowError, MemoryError, ValueError) as error:
            raise no_room(layout.nbytes(batch, capacity), batch, capacity, str(error)) from error
        self.columns = 0

    def take(self, result: Any, seq: int) -> Logits:
        self.columns += seq
        return _as_logits(result)

    def truncate(self, columns: int) -> None:
        self.columns = columns


class _Functional:
    """A cache that grows with every call: the function takes the past and returns the present."""

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        del capacity
        self._dtype = _CACHE_DTYPES[layout.dtype]
        self._shape = (batch, layout.kv_heads, 0, layout.head_dim)
        self.tensors = [virtual_machine.zeros(self._shape, self._dtype) for _ in range(2 * layout.layers)]
        self.columns = 0

    def take(self, result: Any, seq: int) -> Logits:
        self.tensors = [result[index + 1] for index in range(len(self.tensors))]
        self.columns += seq
        return _as_logits(result[0])

    def truncate(self, columns: int) -> None:
        self.tensors = [self._cut(tensor, columns) for tensor in self.tensors]
        self.columns = columns

    def _cut(self, tensor: Any, columns: int) -> Any:
        """Return a copy of the first columns of a tensor, copied as bits, since numpy may not know the dtype."""
        batch, heads, _, width = self._shape
        kept = virtual_machine.zeros((batch, heads, columns, width), self._dtype)
        if columns:
            np.copyto(_bits(kept), _bits(tensor)[:, :, :columns])
        return kept


def _bits(tensor: Any) -> npt.NDArray[Any]:
    """Return the bits of a tensor as unsigned integers of the same size, without copying."""
    name = f"uint{tensor.dtype.itemsize * 8}"
    return np.asarray(np.from_dlpack(virtual_machine.reinterpret(tensor, tensor.shape, name)))


def _as_logits(tensor: Any) -> Logits:
    return np.asarray(np.from_dlpack(tensor))


def checked_capacity(library: Library, batch: int, capacity: int | None) -> int:
    """Return `capacity`, or the model's positions if it is None.

    Raises UsageError if neither is given, or if `batch` or `capacity` is less than 1.
    """
    capacity = library.max_positions if capacity is None else capacity
    if capacity is None:
        raise UsageError("the model sets no bound to positions: say how many the caches shall hold (capacity)")
    if batch < 1 or capacity < 1:
        raise UsageError(f"room for {batch} sequences of {capacity} columns: both must be at least 1")
    return capacity


def _whole_numbers(what: str, numbers: npt.ArrayLike) -> Ids:
    array = np.asarray(numbers)
    if array.size and array.dtype.kind not in "iub":
        raise UsageError(f"{what} are {array.dtype}, expected whole numbers")
    return array.astype(np.int64)


def _check_target(folder: Path, library: Library) -> None:
    if library.target != "llvm":
        raise ModelError(
            f"{folder}: was compiled for {library.target} ({library.isa}), which was never run on a GPU: this "
            f"release loads libraries for llvm. Compile the model without `target={library.target}` to run it."
        )


def _check_cpu(folder: Path, library: Library) -> None:
    missing = missing_features(library.features)
    if missing:
        raise ModelError(
            f"{folder}: was compiled for {library.mcpu} ({library.isa}) and needs {', '.join(missing)}, which this CPU "
            f"lacks. Compile the model on this machine, or with `mcpu` for a CPU that has no more than this one."
        )


def _check_code(path: Path, library: Library) -> None:
    try:
        with open_regular(path) as file:
            digest = blake3.blake3(file.read()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}. Compile the model again.") from error
    if digest != library.library.blake3:
        raise ModelError(
            f"{path}: is not the library that was compiled (blake3 {digest[:16]}…, expected "
            f"{library.library.blake3[:16]}…). Restore the file, or compile the model again."
        )
