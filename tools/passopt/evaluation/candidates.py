"""Describe the models of an evaluation, graphs or compiled folders, and open each of them as an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.evaluation.graph_engine import GraphEngine
from passopt.generation.open_engine import Engine, open_engine, read_facts
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of, positions_of
from passopt.ir.serialization.model_files import MODEL_NAME
from passopt.ir.weights.lazy_weight import LazyWeight, constant_tensor
from passopt.targets.onnxruntime.joined_ranks import load_any
from passopt.targets.tvm.compiled_folder import LIBRARY_NAME
from passopt.verification.scenarios import vocabulary_of
from passopt.verification.verify import runnable


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to evaluate, known before its weights are loaded.

    Attributes:
        name: What reports call it: its path as it was given.
        path: Its file or folder; None for a model in memory.
        runs_in: "onnxruntime", or "compiled" for a compiled folder.
        weight_bytes: The bytes of its weights as they are stored.
        vocab: The number of logits of a position.
        max_positions: The longest sequence; None if nothing limits it.
        notes: What was done to run it, such as joining ranks.
        files: Returns the files that decide what it computes.
        load: Loads its weights and returns its engine.
    """

    name: str
    path: Path | None
    runs_in: str
    weight_bytes: int
    vocab: int
    max_positions: int | None
    notes: tuple[str, ...] = dataclasses.field(repr=False)
    files: Callable[[], list[Path]] = dataclasses.field(repr=False)
    load: Callable[[], Engine] = dataclasses.field(repr=False)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the folder in which its tokenizer would lie."""
        if self.path is None:
            return None
        return self.path if self.path.is_dir() else self.path.parent

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        """Open the engine for the time of a block."""
        engine = self.load()
        try:
            yield engine
        finally:
            close = getattr(engine, "close", None)  # only an engine with ranks has processes to end
            if close is not None:
                close()


def candidate_of(
    name: str, model: Path | onnx_ir.Model, *, threads: int, path: Path | None = None, scratch: Path | None = None
) -> Candidate:
    """Return what is known of a model, without loading its weights.

    Args:
        name: What reports call it.
        model: A graph, the file or folder of one, a folder of ranks, or a compiled folder.
        threads: The number of threads that it will run with.
        path: Where a graph was read from; it is known of files and folders.
        scratch: The folder for temporary files.

    Raises:
        ModelError: If there is no such model, or it is no decoder.
    """
    if isinstance(model, Path):
        if (model / LIBRARY_NAME).is_file():
            return _compiled(name, model, threads)
        graph, path = load_any(model), model
    else:
        graph = model
    notes: list[str] = []
    weight_bytes = sum(tensor.nbytes for tensor in _tensors(graph))
    files = functools.partial(_files, graph, path)
    try:
        graph = runnable(graph, name, notes)
        decoder_of(graph)
        vocab = vocabulary_of(graph)
    except ModelError as error:
        raise error if str(error).startswith(name) else ModelError(f"{name}: {error}") from error
    load = functools.partial(GraphEngine, graph, threads=threads, scratch=scratch)
    return Candidate(name, path, "onnxruntime", weight_bytes, vocab, positions_of(graph), tuple(notes), files, load)


def _compiled(name: str, folder: Path, threads: int) -> Candidate:
    facts = read_facts(folder)

    def files() -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    load = functools.partial(open_engine, folder, threads=threads)
    return Candidate(name, folder, "compiled", facts.weight_bytes, facts.vocab, facts.max_positions, (), files, load)


def _tensors(model: onnx_ir.Model) -> Iterator[onnx_ir.TensorProtocol]:
    """Yield the weights of a graph: its initializers, and the tensors of Constant nodes wherever they stand."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        tensor = constant_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None:
            yield tensor


def _files(model: onnx_ir.Model, path: Path | None) -> list[Path]:
    """Return the model's own files and those that its weights are read from."""
    if path is None:
        raise ModelError("a model in memory has no files by which kept results could know it again; save it first")
    inside = [path / MODEL_NAME, *sorted(path.glob(f"rank*/{MODEL_NAME}"))]
    own = [file for file in inside if file.is_file()] if path.is_dir() else [path]
    expressions = [tensor.expression for tensor in _tensors(model) if isinstance(tensor, LazyWeight)]
    read = {Path(source.file.path) for expression in expressions for source in expression.sources()}
    return [*own, *sorted(read)]


def gives_last_only(engine: Engine) -> bool:
    """Return whether an engine gives the logits of the last position of a call only, by running two tokens."""
    engine.allocate(1, 2)
    logits = engine.forward(np.zeros((1, 2), np.int64), np.ones((1, 2), np.int64))
    engine.reset()
    return int(logits.shape[1]) == 1
