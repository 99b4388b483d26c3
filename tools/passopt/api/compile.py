"""Compile a fused model, or the models of all ranks, to native code with packed weights: `passopt.compile`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir

from passopt.api import checked
from passopt.api.model import Model, ModelLike, changeable, refuse_existing
from passopt.ir.errors import UsageError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.serialization.model_files import MODEL_NAME, load_model
from passopt.ir.version import __version__
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.write_weights import StreamReport
from passopt.passes.pipeline.as_pipeline import PassesLike, as_pipeline
from passopt.passes.pipeline.expectations import parse_expectation
from passopt.passes.pipeline.runner import run_passes
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.reporting.result import Result
from passopt.targets.folders.manifest import MANIFEST_NAME, read_manifest, refuse_single_rank
from passopt.targets.folders.output import Origin
from passopt.targets.folders.rank_check import check_rank_folders
from passopt.targets.tvm.compiled_folder import Library


@dataclasses.dataclass(frozen=True)
class Source:
    """The models to compile: one model (which may be SPMD) or one per rank.

    Attributes:
        models: The models.
        folder: The folder that holds the tokenizer and the configuration; None for a model in memory.
        passes: The pipeline that made them, as far as it is known.
    """

    models: tuple[onnx_ir.Model, ...]
    folder: Path | None
    passes: str


@dataclasses.dataclass(frozen=True, repr=False)
class CompileResult(Result):
    """The result of a compilation.

    Attributes:
        output: The new folder.
        library: The description of the library: CPU, instructions, cache, inputs.
        kernels: The number of native kernels by name.
        fallbacks: The nodes without a native kernel, each with the reason.
        imported: The small operators that TVM's own importer translated.
        weight_bytes: The bytes of weights per rank.
        degree: The number of ranks.
        stream: How the weights were written.
    """

    output: Path
    library: Library
    kernels: Mapping[str, int]
    fallbacks: tuple[Any, ...]
    imported: tuple[Any, ...]
    weight_bytes: int
    degree: int
    stream: StreamReport

    def to_text(self) -> str:
        library = self.library
        per_rank = f" per rank, {self.degree} ranks" if self.degree > 1 else ""
        lines = [f"{library.mcpu} ({library.isa}), weights {self.weight_bytes:,} bytes{per_rank}"]
        lines += [f"{count:6}  {name}" for name, count in sorted(self.kernels.items())]
        small = collections.Counter(item.op_type for item in self.imported)
        lines += [f"{count:6}  small operator by TVM's importer: {name}" for name, count in sorted(small.items())]
        cache = library.cache
        position = cache.nbytes(1, cache.block) // cache.block
        lines.append(f"cache: {position:,} bytes per position, {cache.kind}, {cache.dtype}")
        if library.logits.positions == "all":
            lines.append("logits of every position are computed; slice-last-token makes generation cheaper")
        if library.target == "cuda":
            lines.append(
                "for cuda kernels are compiled only: nothing of them has run on a GPU, and no command loads them"
            )
        return "\n".join([*lines, f"→ {self.output}"])

    def to_json(self) -> dict[str, Any]:
        library = self.library
        return {
            "output": str(self.output),
            "target": library.target,
            "mcpu": library.mcpu,
            "isa": library.isa,
            "kernels": dict(self.kernels),
            "fallbacks": [dataclasses.asdict(item) for item in self.fallbacks],
            "imported": [dataclasses.asdict(item) for item in self.imported],
            "weights": self.weight_bytes,
            "degree": self.degree,
            "cache": dataclasses.asdict(library.cache),
        }


def compile(
    model: ModelLike,
    output: Path | str,
    *,
    passes: PassesLike | None = None,
    target: Literal["llvm", "cuda"] = "llvm",
    arch: str = "sm_80",
    mcpu: str = "native",
    allow_fallback: bool = False,
    print_after: str | Sequence[str] | None = None,
    memory: int | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> CompileResult:
    """Compile a fused model, or the models of all ranks, to native code with weights laid out for its kernels.

    Args:
        model: A model, a file, a folder, or a folder of ranks.
        output: The new folder for code and weights.
        passes: A pipeline to run first, in memory.
        target: "llvm" for CPUs; "cuda" only compiles, nothing can run the result yet.
        arch: The architecture of the GPU, for cuda.
        mcpu: LLVM's name of the CPU; "native" for that of this machine.
        allow_fallback: Use TVM's own code where there is no native kernel, instead of refusing.
        print_after: The steps after which the Relax module is shown to the reporter; an empty list means all.
        memory: The bytes of memory that the process may take while it writes weights; None for 1 GiB.
        workers: The number of threads that write weights; None for two per core, at most 8.
        reporter: Is told about progress, fallbacks and texts.

    Returns:
        The new folder, its kernels, and how the weights were written.

    Raises:
        UsageError: The output exists, a pass, step, CPU or GPU is unknown, no C compiler is installed, or memory or
            disk is too small; also if `passes` is given for a folder of ranks.
        ModelError: The model cannot be read or compiled: no native kernel for a node, or no interface that an engine
            serves.
        PassError: A pass cannot work on this model.
        ExpectationError: An expectation of the pipeline does not hold.
    """
    checked.one_of("target", target, ("llvm", "cuda"))
    checked.streaming(memory, workers)
    output = checked.path("output", output)
    refuse_existing(output)
    # Errors of the model are reported before TVM is imported, because that import takes a second.
    opened = _opened(model)
    from passopt.targets.tvm.compiler.compile_models import compile_models
    from passopt.targets.tvm.compiler.relax_steps import SKIPPED, check_step_names
    from passopt.targets.tvm.machines import find_cpu, find_gpu

    shown = list(checked.texts("print_after", print_after or ()))
    check_step_names(shown, target)
    host = find_cpu(mcpu)
    machine = find_gpu(arch, host) if target == "cuda" else host
    source = _transformed(opened, passes)

    def on_step(name: str, module: Any) -> None:
        if name == SKIPPED:
            reporter.say("TVM cannot fuse the small operators of this model; they stay apart")
        if print_after is not None and (not shown or name in shown):
            reporter.show(f"// after {name}\n{module.script()}\n")

    with progress_bar(reporter, f"packing weights for {output.name}", _weight_bytes(source)) as progress:
        report = compile_models(
            source.models,
            output,
            machine,
            Origin(__version__, source.passes, {}, source.folder),
            allow_fallback=allow_fallback,
            on_step=on_step,
            progress=progress,
            stream=StreamOptions(memory, workers),
        )
    for item in report.lowered.fallbacks:
        reporter.say(f"fallback: {item}")
    lowered = report.lowered
    return CompileResult(
        output,
        report.library,
        lowered.kernels,
        tuple(lowered.fallbacks),
        tuple(lowered.imported),
        report.weight_bytes,
        report.degree,
        report.stream,
    )


def load_source(model: ModelLike, passes: PassesLike | None = None) -> Source:
    """Return the model, or the models of all ranks, after `passes`.

    Args:
        model: A model, a file, a folder, or a folder of ranks.
        passes: A pipeline to run; None for none.

    Returns:
        The models, their folder, and the pipeline that made them.

    Raises:
        ModelError: A model or a manifest cannot be read, or the model is a single rank of several.
        UsageError: `passes` is wrong, or is given for a folder of ranks.
        PassError: A pass cannot work on this model.
        ExpectationError: An expectation of the pipeline does not hold.
    """
    return _transformed(_opened(model), passes)


def _opened(model: ModelLike) -> Source:
    """Return the model as it is, or the models of all ranks of a folder."""
    path = None if isinstance(model, (Model, onnx_ir.Model)) else Path(model)
    if path is not None and path.is_dir() and any(path.glob("rank*/model.onnx")) and not (path / MODEL_NAME).exists():
        manifest = read_manifest(path)
        models = tuple(load_model(path / rank.directory) for rank in manifest.ranks)
        check_rank_folders(path, manifest, models)
        return Source(models, path, manifest.pipeline)
    found = changeable(model)
    done = found.pipeline
    if found.path is not None and (found.path.parent / MANIFEST_NAME).is_file() and path is not None:
        done = read_manifest(found.path.parent).pipeline  # a damaged manifest is an error here
    return Source((found.ir,), found.path.parent if found.path is not None else None, done)


def _transformed(source: Source, passes: PassesLike | None) -> Source:
    """Return the source after a pipeline ran on it, whose expectations must hold."""
    if len(source.models) > 1:
        if passes:
            raise UsageError(
                f"{source.folder}: holds one model per rank, on which passes cannot run any more; run them before the "
                f"model is sharded, with passopt run"
            )
        return source
    (model,), done = source.models, source.passes
    if passes:
        pipeline = as_pipeline(passes)
        names = [item.name for item in pipeline.passes]
        run_passes(
            model, pipeline.passes, expectations=[parse_expectation(text, names) for text in pipeline.expectations]
        )
        done = ",".join(item for item in (done, pipeline.expanded) if item)
    refuse_single_rank(model)
    return Source((model,), source.folder, done)


def _weight_bytes(source: Source) -> int:
    """Return about how many bytes of weights will be written, for the progress bar."""
    degree = len(source.models) if len(source.models) > 1 else degree_of(source.models[0])
    values = source.models[0].graph.initializers.values()
    return degree * sum(int(value.const_value.nbytes) for value in values if value.const_value is not None)
