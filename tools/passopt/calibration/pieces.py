"""Run the stages of a decoder's pieces in onnxruntime, window by window, with what lies between them on disk."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.calibration.spool import Spool
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, decoder_of
from passopt.targets.onnxruntime.session import Session
from passopt.verification.decoder_cut import Cut, Piece, cut_decoder
from passopt.verification.sampling.cache_inputs import empty_cache

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class WindowRunner:
    """Runs parts of a graph on windows of tokens.

    Each window runs on its own and in one thread, so that no bit depends on the number of threads.

    Attributes:
        ids: The token ids [windows, length].
        shared: What the prelude computes, which is the same for all windows.

    Args:
        ids: The token ids.
        model: The whole graph.
        cut: Its cut.
        threads: The number of windows that run at once.
        scratch: A folder for the weights of a part while it is loaded.
    """

    def __init__(self, ids: Array, model: onnx_ir.Model, cut: Cut, threads: int, scratch: Path) -> None:
        self.ids = ids
        self._scratch = scratch
        self._threads = threads
        length = ids.shape[1]
        self._same: dict[str, Array] = {
            ATTENTION_MASK: np.ones((1, length), np.int64),
            POSITION_IDS: np.arange(length, dtype=np.int64)[None, :],
            **empty_cache(model),
        }
        prelude = cut.prelude()
        self.shared: dict[str, Array] = {}
        if prelude is not None:
            self.shared = self._session(prelude).run({INPUT_IDS: ids[:1], **self._same})

    def _session(self, graph: onnx_ir.Model) -> Session:
        return Session(graph, threads=1, scratch=self._scratch)

    def run(
        self,
        graph: onnx_ir.Model,
        spool: Spool,
        take: Callable[[int, dict[str, Array]], None],
        progress: Callable[[int], None],
    ) -> None:
        """Run a graph on every window.

        Args:
            graph: The graph; its inputs are tokens, what is shared, and values of the spool.
            spool: The values on disk.
            take: Called with the number of a window and the outputs, also from several threads.
            progress: Called with 1 after each window.

        Raises:
            ModelError: If onnxruntime refuses the graph, or fails.
        """
        session = self._session(graph)
        kept = [name for name in session.inputs if name in spool]

        def one(window: int) -> None:
            feeds = {INPUT_IDS: self.ids[window : window + 1], **self._same, **self.shared}
            feeds.update((name, spool.get(name, window)) for name in kept)
            take(window, session.run(feeds))

        one(0)  # the first one decides the shapes of what is kept
        progress(1)
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            tasks = [pool.submit(functools.partial(one, window)) for window in range(1, len(self.ids))]
            try:
                for task in tasks:
                    task.result()
                    progress(1)
            finally:
                pool.shutdown(cancel_futures=True)


def pieces_of(model: onnx_ir.Model) -> tuple[Cut, Sequence[Piece], str]:
    """Return a cut of a decoder, its pieces, and why it is not cut; a graph that cannot be cut is one piece.

    Raises:
        ModelError: If the graph is no exported decoder.
    """
    layers = decoder_of(model).layers
    reason = ""
    try:
        cut = cut_decoder(model)
    except ModelError as error:
        reason = str(error).partition(". Verify")[0]
        cut = Cut(model, ("",) * (layers + 1), ())
    kept = [index for index, name in enumerate(cut.boundaries) if name]
    return cut, cut.pieces(kept), reason
