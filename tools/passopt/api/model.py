"""Load models, save them, and print their canonical text: `passopt.load`, `passopt.save`, `passopt.print_text`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import html
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx_ir

from passopt.api import checked
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.serialization.model_files import load_model, model_path
from passopt.ir.serialization.text import print_model
from passopt.ir.version import __version__
from passopt.ir.weights.sources import identify
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.write_weights import StreamReport
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.reporting.result import Result, html_table
from passopt.targets.folders.manifest import read_manifest
from passopt.targets.folders.output import Origin, Output, OutputSizes

#: The number of operators that the view of a model in a notebook lists.
_SHOWN_OPERATORS = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: its graph, with weights that stay on disk until they are written.

    Attributes:
        ir: The graph, as a model of onnx-ir; `passopt.passes` and `passopt.testing` work on it.
        path: The model file that it was read from; None for a model made in memory.
        pipeline: The passes that made it, as far as they are known, in the form that `--passes` takes.
        changes: The passes among them that ran since it was read from `path`.
    """

    ir: onnx_ir.Model
    path: Path | None = None
    pipeline: str = ""
    changes: str = ""

    def after(self, pipeline: str) -> Model:
        """Return the same graph, with passes added to those that made it.

        Args:
            pipeline: The passes that have run on it, as `--passes` takes them.
        """
        return dataclasses.replace(
            self, pipeline=_joined(self.pipeline, pipeline), changes=_joined(self.changes, pipeline)
        )

    def origin(self) -> Origin:
        """Return what a manifest says of where this model comes from.

        That is the size and digest of the file that it was read from, the root digest of its weights if passopt wrote
        them, and the passes that ran since; the passes of a model that was only read are those that made it.
        """
        if self.path is None:
            return Origin(__version__, self.pipeline, {})
        file = identify(self.path)
        weights: str | None = None
        with contextlib.suppress(ModelError):  # a manifest.json may be missing, or belong to another tool
            weights = read_manifest(self.path.parent).root
        source = {"model": self.path.name, "size": file.size, "header_digest": file.header_digest, "weights": weights}
        return Origin(__version__, self.changes or self.pipeline, source, self.path.parent)

    @property
    def degree(self) -> int:
        """Return the degree of tensor parallelism, 1 for a model that is not sharded."""
        return degree_of(self.ir)

    def copy(self) -> Model:
        """Return a copy whose graph can be changed without changing this one; the lazy weights are shared."""
        return dataclasses.replace(self, ir=self.ir.clone())

    def __str__(self) -> str:
        return print_text(self)

    def __repr__(self) -> str:
        ranks = f", {self.degree} ranks" if self.degree > 1 else ""
        changed = f", changed by {self.changes}" if self.changes else ""
        return f"<passopt.Model of {self.path or 'memory'}: {len(self.ir.graph)} nodes{ranks}{changed[:60]}>"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: nodes, operators, inputs, outputs and bytes of weights."""
        graph = self.ir.graph
        counts = collections.Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in graph)
        shown = [f"{name} × {count}" for name, count in counts.most_common(_SHOWN_OPERATORS)]
        more = ["…"] if len(counts) > len(shown) else []
        weights = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in graph.opset_imports.items())
        rows: list[tuple[str, object]] = [
            ("file", self.path or "in memory"),
            ("nodes", len(graph)),
            ("operators", ", ".join([*shown, *more])),
            (
                "inputs",
                ", ".join(str(value.name) for value in graph.inputs[:6]) + (" …" if len(graph.inputs) > 6 else ""),
            ),
            ("outputs", len(graph.outputs)),
            ("weights", f"{len(weights)}, {sum(int(tensor.nbytes) for tensor in weights):,} bytes"),
            ("opsets", opsets),
            ("ranks", self.degree),
        ]
        return f"<b>{html.escape(graph.name or 'model')}</b>" + html_table(("", ""), rows)


def _joined(*pipelines: str) -> str:
    return ",".join(text for text in pipelines if text)


#: The forms in which operations take a model: a loaded one, a model of onnx-ir, or the path of a file or its folder.
ModelLike: TypeAlias = "Model | onnx_ir.Model | Path | str"


def load(path: Path | str) -> Model:
    """Load a model, leaving its weights on disk.

    Args:
        path: The path of model.onnx, of a folder that holds it, or of ONNX text (graph.onnxtxt).

    Returns:
        The model. Its pipeline is read from the manifest beside it, if there is one of passopt's.

    Raises:
        ModelError: There is no such model, or it is damaged.
        UsageError: What is given is no path.

    Example:
        >>> model = passopt.load("baichuan2")
        >>> print(model)  # its canonical text
    """
    if not isinstance(path, (str, Path)):
        raise UsageError(f"a model is a passopt.Model, a graph of onnx-ir or a path, not {type(path).__name__}")
    file = model_path(Path(path))
    model = load_model(file)
    pipeline = ""
    with contextlib.suppress(ModelError):  # a manifest.json may be missing, or belong to another tool
        pipeline = read_manifest(file.parent).pipeline
    return Model(model, file, pipeline)


def as_model(model: ModelLike) -> Model:
    """Return `model` as a `Model`, loaded if it is a path.

    Args:
        model: A model, or its path.

    Returns:
        The model. It shares its graph with `model`, unless that is a path.

    Raises:
        ModelError: There is no model at the path, or it is damaged.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, onnx_ir.Model):
        return Model(model)
    return load(model)


def changeable(model: ModelLike) -> Model:
    """Return a model whose graph may be changed without changing `model`.

    Args:
        model: A model, which is copied, or its path.

    Returns:
        The copy, or the model that was loaded from the path.

    Raises:
        ModelError: There is no model at the path, or it is damaged.
    """
    return as_model(model).copy() if isinstance(model, (Model, onnx_ir.Model)) else as_model(model)


@dataclasses.dataclass(frozen=True, repr=False)
class SaveResult(Result):
    """The result of `save`.

    Attributes:
        output: The new folder.
        sizes: The bytes of every file.
        stream: How the weights were written; None if they were not copied.
    """

    output: Path
    sizes: OutputSizes
    stream: StreamReport | None

    def to_text(self) -> str:
        return f"{self.sizes.to_text()}\n→ {self.output}"

    def to_json(self) -> dict[str, Any]:
        stream = self.stream.to_json() if self.stream is not None else None
        return {"output": str(self.output), **self.sizes.to_json(), "stream": stream}


def save(
    model: ModelLike,
    directory: Path | str,
    *,
    weights: Literal["copy", "reference"] = "copy",
    memory: int | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> SaveResult:
    """Write a model to a new folder: model.onnx, weights and manifest, one folder per rank if it is sharded.

    Args:
        model: A model, or its path.
        directory: The new folder. It appears whole or not at all.
        weights: "copy" copies weights into the folder; "reference" only refers to the files that hold them.
        memory: The bytes of memory that the process may take; None for 1 GiB.
        workers: The number of threads that write weights; None for two per core, at most 8.
        reporter: Is told about progress and warnings.

    Returns:
        The folder, the bytes of its files, and how the weights were written.

    Raises:
        UsageError: The folder exists, the disk is too small, or `memory` does not suffice.
        ModelError: The model or a weight cannot be read.
    """
    checked.one_of("weights", weights, ("copy", "reference"))
    checked.streaming(memory, workers)
    found, directory = as_model(model), checked.path("directory", directory)
    output = Output(found.ir, found.origin())
    if weights == "reference":
        output.write_reference(directory)
        return SaveResult(directory, output.sizes, None)
    return SaveResult(directory, output.sizes, write(output, directory, StreamOptions(memory, workers), reporter))


def write(output: Output, directory: Path, stream: StreamOptions, reporter: Reporter) -> StreamReport:
    """Write an output with a progress bar, and warn about values that became infinite in fp16.

    Args:
        output: The model to write.
        directory: The new folder.
        stream: The memory and the threads to write with.
        reporter: Is told about progress and warnings.

    Returns:
        How the weights were written.

    Raises:
        UsageError: The folder exists, the disk is too small, or the memory does not suffice.
        ModelError: A weight cannot be read.
    """
    with progress_bar(reporter, f"writing {directory.name}", output.sizes.nbytes) as progress:
        report = output.write(directory, progress=progress, stream=stream).stream
    for name, count in report.overflows.items():
        reporter.say(f"warning: {name}: {count} values overflow fp16 and became infinite")
    return report


def refuse_existing(output: Path) -> None:
    """Check that the folder to be written does not exist.

    Args:
        output: The folder.

    Raises:
        UsageError: The folder exists.
    """
    if output.exists():
        raise UsageError(
            f"{output}: output exists. Name another with `output`, or remove it first; nothing was written."
        )


def print_text(model: ModelLike, *, fold: bool = True, canonical: bool = False) -> str:
    """Return the canonical text of a model, which golden tests compare.

    Args:
        model: A model, or its path.
        fold: Show equal layers once.
        canonical: Name values by operator and place, so that texts of models with other names can be compared.

    Returns:
        The text, with a line break at its end.

    Raises:
        ModelError: There is no model at the path, or it is damaged.
    """
    return print_model(as_model(model).ir, fold=fold, canonical=canonical)
