"""Write output folders of ONNX files: one model, or one per rank of an SPMD graph, with a manifest beside.

An `Output` is planned once, from a model and its `Origin`: it knows the size of every file to the byte without reading
a weight. Then it is written, exactly so and streamed, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import blake3
import onnx_ir

from passopt.ir.atomic_folders import JOURNAL_NAME, keep_only, resumable_directory, staged_directory
from passopt.ir.errors import VerifyError
from passopt.ir.graph.collectives import schedule_of
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.linears import reads_codes, reads_scales
from passopt.ir.serialization.model_files import MODEL_NAME, WEIGHTS_NAME, file_weights, model_bytes, save_reference
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import Concat
from passopt.ir.weights.safetensors_layout import layout_of
from passopt.ir.weights.streaming.budget import DEFAULT_STREAM, StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import StreamReport, write_weight_files
from passopt.targets.folders.companions import companions_in
from passopt.targets.folders.digests import root_digest
from passopt.targets.folders.manifest import (
    MANIFEST_NAME,
    NO_DIGEST,
    Manifest,
    RankFiles,
    rank_folders,
    refuse_single_rank,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Say where an output or a compiled folder comes from.

    Attributes:
        version: The version of passopt that makes it.
        pipeline: The passes that made the model, as `--passes` takes them; empty for none.
        source: What the model was read from, as plain JSON.
        companions: The folder whose tokenizer and configuration files go along; None for none.
    """

    version: str
    pipeline: str
    source: Mapping[str, object]
    companions: Path | None = None


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights over all ranks, by what they are; file headers and alignment are not counted."""

    codes: int = 0
    scales: int = 0
    other: int = 0
    padding: int = 0
    constants: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes that stand for weights of the checkpoint."""
        return self.codes + self.scales + self.other


@dataclasses.dataclass(frozen=True)
class OutputSizes:
    """The bytes of every file, by path inside the output folder, and of the weights in them."""

    files: Mapping[str, int]
    weights: WeightBytes

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, object]:
        """Return the sizes as plain JSON."""
        return {"files": dict(self.files), "bytes": self.nbytes, "weights": dataclasses.asdict(self.weights)}

    def to_text(self) -> str:
        """Return one line per file, the total, and what the weights are."""
        rows = [*self.files.items(), ("total", self.nbytes)]
        width = max(len(f"{nbytes:,}") for _, nbytes in rows)
        parts = [f"{nbytes:,} {name}" for name, nbytes in dataclasses.asdict(self.weights).items() if nbytes]
        lines = [f"{nbytes:>{width},}  {name}" for name, nbytes in rows]
        return "\n".join([*lines, f"weights: {', '.join(parts) or 'none outside model.onnx'}"])


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """What was written, and how: time, memory, and the finite values that fp16 made infinite."""

    sizes: OutputSizes
    manifest: Manifest
    stream: StreamReport


class Output:
    """An output folder of a model: planned once, then written.

    The ranks' graphs differ in small constants only. Each is serialised once, when its bytes are first needed; the
    model must not change from then on.

    Args:
        model: A model, or the SPMD model of all ranks.
        origin: What the manifest says of where it comes from.

    Raises:
        ModelError: The model holds the weights of one rank of several.
        VerifyError: A weight is a shard of an unknown degree, or the collectives are out of order.
    """

    def __init__(self, model: onnx_ir.Model, origin: Origin) -> None:
        refuse_single_rank(model)
        self._model = model
        self._origin = origin
        self._weights = file_weights(model)
        self.degree = degree_of(model)
        self._folders = rank_folders(self.degree)
        sharded = tuple(name for name, weight in self._weights.items() if weight.depends_on_rank)
        if sharded and self.degree == 1:
            raise VerifyError(f"weight {sharded[0]!r} is a shard, but the model does not say of which degree")
        replicated = tuple(name for name in self._weights if name not in set(sharded)) if self.degree > 1 else ()
        collectives = schedule_of(model)
        self._outline = Manifest(
            origin.version, origin.pipeline, self.degree, origin.source, collectives, replicated, sharded
        )

    @functools.cached_property
    def sizes(self) -> OutputSizes:
        """Return the size of every file that `write` would write. Reads no weight."""
        files = {path.name: path.stat().st_size for path in companions_in(self._origin.companions)}
        layout = layout_of(self._weights)
        no_digests = dict.fromkeys(layout.offsets, NO_DIGEST)
        files[MANIFEST_NAME] = len(self._manifest([no_digests for _ in self._folders]).text())
        for folder, graph in zip(self._folders, self._graphs, strict=True):
            files[_inside(folder, MODEL_NAME)] = len(graph)
            files[_inside(folder, WEIGHTS_NAME)] = layout.nbytes
        return OutputSizes(files, _weight_bytes(self._model, self._weights))

    def write(
        self,
        directory: Path,
        *,
        progress: Callable[[int], None] | None = None,
        stream: StreamOptions = DEFAULT_STREAM,
    ) -> OutputReport:
        """Write the whole output or nothing, all ranks in one pass over the source.

        What an interruption leaves is taken up by the next call with the same arguments.

        Args:
            directory: The new folder. Its disk must hold the planned bytes.
            progress: Gets the bytes of weights written since its last call.
            stream: Bounds of memory and the number of threads.

        Raises:
            UsageError: The folder exists, or the disk is too small.
            ModelError: A weight cannot be read, or its file changed.
        """
        with resumable_directory(directory, self.sizes.nbytes) as staged:
            keep_only(staged, {*self.sizes.files, JOURNAL_NAME})
            for path in companions_in(self._origin.companions):
                shutil.copyfile(path, staged / path.name)
            for folder, graph in zip(self._folders, self._graphs, strict=True):
                (staged / folder).mkdir(exist_ok=True)
                (staged / folder / MODEL_NAME).write_bytes(graph)
            files = [
                WeightFile(staged / folder / WEIGHTS_NAME, self._weights, rank)
                for rank, folder in enumerate(self._folders)
            ]
            report = write_weight_files(files, stream, progress=progress, journal=staged / JOURNAL_NAME)
            manifest = self._manifest(report.digests)
            (staged / MANIFEST_NAME).write_text(manifest.text(), encoding="utf-8")
        return OutputReport(self.sizes, manifest, report)

    def write_reference(self, directory: Path) -> Manifest:
        """Write model.onnx, weights.plan.json and a manifest without digests: no weight is copied, shards stay shards.

        Raises UsageError if `directory` exists.
        """
        with staged_directory(directory) as staged:
            for path in companions_in(self._origin.companions):
                shutil.copyfile(path, staged / path.name)
            save_reference(self._model, staged)
            (staged / MANIFEST_NAME).write_text(self._outline.text(), encoding="utf-8")
        return self._outline

    @functools.cached_property
    def _graphs(self) -> list[bytes]:
        """The bytes of each rank's model.onnx."""
        return [model_bytes(self._model, self._weights, rank) for rank in range(self.degree)]

    def _manifest(self, digests: Sequence[Mapping[str, str]]) -> Manifest:
        """Return the manifest with the digests of each rank's tensors."""
        ranks = tuple(
            RankFiles(folder, blake3.blake3(graph).hexdigest(), root_digest(tensors), tensors)
            for folder, graph, tensors in zip(self._folders, self._graphs, digests, strict=True)
        )
        root = root_digest({f"{rank.directory}/{name}": d for rank in ranks for name, d in rank.tensors.items()})
        return dataclasses.replace(self._outline, ranks=ranks, root=root)


def _inside(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _weight_bytes(model: onnx_ir.Model, weights: Mapping[str, ex.Expression]) -> WeightBytes:
    found, degree = dataclasses.asdict(WeightBytes()), degree_of(model)
    for name, weight in weights.items():
        real = _real_bytes(weight, degree)
        found[_kind(model.graph.initializers[name], weight)] += real
        found["padding"] += degree * weight.nbytes - real
    return WeightBytes(**found)


def _real_bytes(weight: ex.Expression, degree: int) -> int:
    """Return the bytes that all ranks hold of a weight, without what sharding added to make its units divide.

    A whole weight counts once per rank. What is made of shards counts as they do.
    """
    if not weight.depends_on_rank:
        return degree * weight.nbytes
    if isinstance(weight, Concat):
        return sum(_real_bytes(part, degree) for part in weight.parts)
    (operand,) = weight.operands
    if not isinstance(weight, ex.Shard):  # Such as a cast: as much of it is real as of what it is made from.
        written = degree * operand.nbytes
        return degree * weight.nbytes * _real_bytes(operand, degree) // written if written else 0
    while isinstance(operand, ex.Shard | ex.Pad):  # Sharding pads first, then cuts.
        operand = operand.operand
    return operand.nbytes


def _kind(value: onnx_ir.Value, weight: ex.Expression) -> str:
    """By what reads the weight, so that codes are told also where they come from a file."""
    parts = {type(part) for part in weight.walk()}
    uses = [(use.node, use.idx) for use in value.uses()]
    if ex.QuantizeCodes in parts or any(reads_codes(node, index) for node, index in uses):
        return "codes"
    if ex.QuantizeScales in parts or any(reads_scales(node, index) for node, index in uses):
        return "scales"
    return "other" if any(True for _ in weight.sources()) else "constants"
