"""Run a graph in onnxruntime through the interface of an engine: one loop serves graphs and compiled folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir

from passopt.ir.errors import UsageError
from passopt.ir.graph.decoder import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, positions_of
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.cache_inputs import cache_inputs, next_cache
from passopt.verification.scenarios import vocabulary_of


class GraphEngine:
    """A decoder in onnxruntime with its cache; `forward` appends to it, as the engine of a compiled folder does."""

    def __init__(self, model: onnx_ir.Model, *, threads: int, scratch: Path | None = None) -> None:
        """Load the model.

        Args:
            model: A decoder that onnxruntime can run as it is.
            threads: The number of threads.
            scratch: The folder for temporary files.

        Raises:
            ModelError: If the graph is no decoder, does not say its vocabulary, or onnxruntime refuses it.
        """
        self._caches = cache_inputs(model)
        self.vocab = vocabulary_of(model)
        self.max_positions = positions_of(model)
        self._session = Session(model, threads=threads, scratch=scratch)
        self.batch = 1
        self.capacity = 1
        self.reset()

    @property
    def past(self) -> int:
        """Return the number of columns in the cache."""
        return self._past

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the cache, which grows with what is in it."""
        return sum(array.nbytes for array in self._cache.values())

    def allocate(self, batch: int, capacity: int | None = None) -> None:
        """Forget all sequences; the cache grows by itself, so there is no room to make."""
        self.batch = batch
        self.capacity = capacity if capacity is not None else self.max_positions or 1
        self.reset()

    def reset(self) -> None:
        """Forget all sequences."""
        empty = (cache.empty(self.batch) for cache in self._caches)
        self._cache = {name: array for arrays in empty for name, array in arrays.items()}
        self._past = 0

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append `ids` [batch, seq] under `mask` [batch, past + seq], and return logits [batch, seq or 1, vocab].

        Raises:
            UsageError: If a token id is outside of the vocabulary, or the sequence outgrows the capacity.
            ModelError: If onnxruntime fails on the graph.
        """
        tokens, seen = np.asarray(ids, np.int64), np.asarray(mask, np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            raise UsageError(
                f"token ids reach from {tokens.min()} to {tokens.max()}, the vocabulary to {self.vocab - 1}"
            )
        if seen.shape[1] > self.capacity:
            raise UsageError(f"{seen.shape[1]} columns are more than the {self.capacity} that were allocated")
        positions = np.clip(seen.cumsum(axis=1) - 1, 0, None)[:, -tokens.shape[1] :]
        feeds = {INPUT_IDS: tokens, ATTENTION_MASK: seen, POSITION_IDS: positions, **self._cache}
        outputs = self._session.run(feeds)
        logits = outputs.pop(LOGITS)
        self._cache = next_cache(outputs)
        self._past = seen.shape[1]
        return np.asarray(logits, np.float32)
