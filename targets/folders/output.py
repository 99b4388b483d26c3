"""Output folders of ONNX files: one model, or one per rank of an SPMD graph, with a manifest beside.

`plan_output` tells every file's size to the byte without reading a weight; `write_output` writes exactly that,
streamed, or nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import blake3
import onnx_ir

from passopt.ir.atomic_folders import JOURNAL_NAME, keep_only, resumable_directory, staged_directory
from passopt.ir.errors import VerifyError
from passopt.ir.graph.collectives import schedule_of
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.linears import reads_codes, reads_scales
from passopt.ir.serialization.model_files import MODEL_NAME, WEIGHTS_NAME, file_weights, model_bytes, save_reference
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.safetensors_layout import plan_layout
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


class OutputFacts(TypedDict):
    """What an output says of itself: the arguments that planning and writing share."""

    version: str
    pipeline: str
    source: Mapping[str, object]
    companions: Path | None


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
class OutputPlan:
    """Bytes of every file, by path inside the output folder, and of the weights in them."""

    files: Mapping[str, int]
    weights: WeightBytes

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def to_json(self) -> dict[str, object]:
        return {"files": dict(self.files), "bytes": self.nbytes, "weights": dataclasses.asdict(self.weights)}

    def to_text(self) -> str:
        """One line per file, the total, and what the weights are."""
        rows = [*self.files.items(), ("total", self.nbytes)]
        width = max(len(f"{nbytes:,}") for _, nbytes in rows)
        parts = [f"{nbytes:,} {name}" for name, nbytes in dataclasses.asdict(self.weights).items() if nbytes]
        lines = [f"{nbytes:>{width},}  {name}" for name, nbytes in rows]
        return "\n".join([*lines, f"weights: {', '.join(parts) or 'none'}"])


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """What was written, and how: time, memory, and the finite values that fp16 made infinite."""

    plan: OutputPlan
    manifest: Manifest
    stream: StreamReport


def plan_output(
    model: onnx_ir.Model,
    *,
    version: str,
    pipeline: str,
    source: Mapping[str, object],
    companions: Path | None = None,
) -> OutputPlan:
    """What `write_output` with the same arguments would write. Reads no weight."""
    draft = _Draft(model, version, pipeline, source)
    files = {path.name: path.stat().st_size for path in companions_in(companions)}
    files[MANIFEST_NAME] = len(draft.manifest(draft.no_digests()).text())
    for folder, graph in zip(draft.folders, draft.graphs, strict=True):
        files[_inside(folder, MODEL_NAME)] = len(graph)
        files[_inside(folder, WEIGHTS_NAME)] = plan_layout(draft.weights).nbytes
    return OutputPlan(files, _weight_bytes(model, draft.weights))


def write_output(
    model: onnx_ir.Model,
    directory: Path,
    *,
    version: str,
    pipeline: str,
    source: Mapping[str, object],
    companions: Path | None = None,
    progress: Callable[[int], None] | None = None,
    stream: StreamOptions = DEFAULT_STREAM,
) -> OutputReport:
    """Write the whole output or nothing: `directory` must not exist, and the disk must hold the planned bytes.

    `version` is that of passopt; `source` says what the model was made of (plain JSON); tokenizer and configuration are
    copied from the folder `companions`; `progress` gets the weight bytes written since its last call. All ranks are
    written in one pass over the source, within the memory of `stream`; what an interruption leaves is taken up again.
    Raises UsageError, ModelError.
    """
    plan = plan_output(model, version=version, pipeline=pipeline, source=source, companions=companions)
    draft = _Draft(model, version, pipeline, source)
    with resumable_directory(directory, plan.nbytes) as staged:
        keep_only(staged, {*plan.files, JOURNAL_NAME})
        for path in companions_in(companions):
            shutil.copyfile(path, staged / path.name)
        for folder, graph in zip(draft.folders, draft.graphs, strict=True):
            (staged / folder).mkdir(exist_ok=True)
            (staged / folder / MODEL_NAME).write_bytes(graph)
        files = [
            WeightFile(staged / folder / WEIGHTS_NAME, draft.weights, rank) for rank, folder in enumerate(draft.folders)
        ]
        report = write_weight_files(files, stream, progress=progress, journal=staged / JOURNAL_NAME)
        manifest = draft.manifest(report.digests)
        (staged / MANIFEST_NAME).write_text(manifest.text(), encoding="utf-8")
    return OutputReport(plan, manifest, report)


def write_reference_output(
    model: onnx_ir.Model,
    directory: Path,
    *,
    version: str,
    pipeline: str,
    source: Mapping[str, object],
    companions: Path | None = None,
) -> Manifest:
    """Write model.onnx, weights.plan.json and a manifest without digests; no weight is copied, shards stay shards."""
    manifest = _Draft(model, version, pipeline, source).manifest([])
    with staged_directory(directory) as staged:
        for path in companions_in(companions):
            shutil.copyfile(path, staged / path.name)
        save_reference(model, staged)
        (staged / MANIFEST_NAME).write_text(manifest.text(), encoding="utf-8")
    return manifest


class _Draft:
    """What is known of an output before its weights are read. The ranks' graphs differ in small constants only."""

    def __init__(self, model: onnx_ir.Model, version: str, pipeline: str, source: Mapping[str, object]) -> None:
        refuse_single_rank(model)
        self.weights = file_weights(model)
        self.degree = degree_of(model)
        self.graphs = [model_bytes(model, self.weights, rank) for rank in range(self.degree)]
        self.folders = rank_folders(self.degree)
        sharded = tuple(name for name, weight in self.weights.items() if weight.depends_on_rank)
        if sharded and self.degree == 1:
            raise VerifyError(f"weight {sharded[0]!r} is a shard, but the model does not say of which degree")
        replicated = tuple(name for name in self.weights if name not in set(sharded)) if self.degree > 1 else ()
        collectives = schedule_of(model)
        self._outline = Manifest(version, pipeline, self.degree, source, collectives, replicated, sharded)

    def no_digests(self) -> list[dict[str, str]]:
        return [dict.fromkeys(plan_layout(self.weights).offsets, NO_DIGEST) for _ in self.folders]

    def manifest(self, digests: Sequence[Mapping[str, str]]) -> Manifest:
        """With the digests of each rank's tensors; with none, the manifest of an output that only refers to weights."""
        if not digests:
            return self._outline
        ranks = tuple(
            RankFiles(folder, blake3.blake3(graph).hexdigest(), root_digest(tensors), tensors)
            for folder, graph, tensors in zip(self.folders, self.graphs, digests, strict=True)
        )
        root = root_digest({f"{rank.directory}/{name}": d for rank in ranks for name, d in rank.tensors.items()})
        return dataclasses.replace(self._outline, ranks=ranks, root=root)


def _inside(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _weight_bytes(model: onnx_ir.Model, weights: Mapping[str, ex.Expression]) -> WeightBytes:
    found = dataclasses.asdict(WeightBytes())
    for name, weight in weights.items():
        written = degree_of(model) * weight.nbytes
        real = _unpadded(weight).nbytes if weight.depends_on_rank else written
        found[_kind(model.graph.initializers[name], weight)] += real
        found["padding"] += written - real
    return WeightBytes(**found)


def _unpadded(weight: ex.Expression) -> ex.Expression:
    """The full tensor that the ranks share: sharding pads first, then cuts."""
    while isinstance(weight, ex.Shard | ex.Pad):
        weight = weight.operand
    return weight


def _kind(value: onnx_ir.Value, weight: ex.Expression) -> str:
    """By what reads the weight, so that codes are told also where they come from a file."""
    parts = {type(part) for part in weight.walk()}
    uses = [(use.node, use.idx) for use in value.uses()]
    if ex.QuantizeCodes in parts or any(reads_codes(node, index) for node, index in uses):
        return "codes"
    if ex.QuantizeScales in parts or any(reads_scales(node, index) for node, index in uses):
        return "scales"
    return "other" if any(True for _ in weight.sources()) else "constants"
