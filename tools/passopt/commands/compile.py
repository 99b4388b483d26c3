"""`passopt compile`: a fused model, or the models of all ranks, to native code with packed weights."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir

from passopt import __version__
from passopt.commands.progress import Progress
from passopt.commands.writing import say_report, stream_options
from passopt.ir.errors import UsageError
from passopt.ir.graph.decoder import degree_of
from passopt.ir.serialization.model_files import load_model, model_path
from passopt.passes.pipeline.expectations import parse_expectation
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.folders.manifest import MANIFEST_NAME, read_manifest, refuse_single_rank
from passopt.targets.folders.rank_check import check_rank_folders
from passopt.targets.tvm.compiled_folder import Library


@dataclasses.dataclass(frozen=True)
class Source:
    """What is compiled: one model (which may be SPMD) or one per rank; the folder of tokenizer and configuration."""

    models: tuple[onnx_ir.Model, ...]
    folder: Path
    passes: str


def compile_(options: argparse.Namespace) -> int:
    """Load, optionally transform, compile, report."""
    from passopt.targets.tvm.compiler.compile_models import CompileFacts, CompileReport, compile_models
    from passopt.targets.tvm.compiler.relax_steps import SKIPPED, check_step_names
    from passopt.targets.tvm.machines import find_cpu, find_gpu

    output = Path(options.output)
    if output.exists():
        raise UsageError(f"{output}: output exists. Name another with -o, or remove it first; nothing was written.")
    shown = [name for name in options.print_after or [] if name]
    check_step_names(shown, options.target)
    host = find_cpu(options.mcpu)
    machine = find_gpu(options.arch, host) if options.target == "cuda" else host
    source = load(Path(options.model), options.passes)

    def on_step(name: str, module: Any) -> None:
        if name == SKIPPED:
            print(
                "passopt compile: TVM cannot fuse the small operators of this model; they stay apart", file=sys.stderr
            )
        if options.print_after is not None and (not shown or name in shown):
            print(f"// after {name}\n{module.script()}", file=sys.stderr)

    progress = Progress(f"packing weights for {output.name}", _weight_bytes(source))
    try:
        report: CompileReport = compile_models(
            source.models,
            output,
            machine,
            CompileFacts(__version__, source.passes, source.folder),
            allow_fallback=options.allow_fallback,
            on_step=on_step,
            progress=progress,
            stream=stream_options(options),
        )
    finally:
        progress.close()
    say_report(report.stream, options.command)
    for item in report.lowered.fallbacks:
        print(f"passopt compile: fallback: {item}", file=sys.stderr)
    _print(report, output, as_json=options.json)
    return 0


def load(path: Path, passes: str | None) -> Source:
    """The model or the models of ranks at `path`, after `passes`. Raises ModelError, UsageError."""
    if path.is_dir() and any(path.glob("rank*/model.onnx")) and not (path / "model.onnx").exists():
        if passes:
            raise UsageError(f"{path}: holds one model per rank; run passes before they come apart, with passopt run")
        manifest = read_manifest(path)
        models = tuple(load_model(path / rank.directory) for rank in manifest.ranks)
        check_rank_folders(path, manifest, models)
        return Source(models, path, manifest.pipeline)
    file = model_path(path)
    model = load_model(file)
    done = read_manifest(file.parent).pipeline if (file.parent / MANIFEST_NAME).is_file() else ""
    if passes:
        pipeline = resolve(passes)
        names = [item.name for item in pipeline.passes]
        run_passes(
            model, pipeline.passes, expectations=[parse_expectation(text, names) for text in pipeline.expectations]
        )
        done = ",".join(item for item in (done, pipeline.expanded) if item)
    refuse_single_rank(model)
    return Source((model,), file.parent, done)


def _weight_bytes(source: Source) -> int:
    """About what will be written: for the progress bar."""
    degree = len(source.models) if len(source.models) > 1 else degree_of(source.models[0])
    values = source.models[0].graph.initializers.values()
    return degree * sum(int(value.const_value.nbytes) for value in values if value.const_value is not None)


def _print(report: Any, output: Path, *, as_json: bool) -> None:
    library: Library = report.library
    if as_json:
        body = {
            "output": str(output),
            "target": library.target,
            "mcpu": library.mcpu,
            "isa": library.isa,
            "kernels": report.lowered.kernels,
            "fallbacks": [dataclasses.asdict(item) for item in report.lowered.fallbacks],
            "imported": [dataclasses.asdict(item) for item in report.lowered.imported],
            "weights": report.weight_bytes,
            "degree": report.degree,
            "cache": dataclasses.asdict(library.cache),
        }
        print(json.dumps(body, indent=2))
        return
    print(f"{library.mcpu} ({library.isa}), weights {report.weight_bytes:,} bytes" + _per_rank(report.degree))
    for name, count in sorted(report.lowered.kernels.items()):
        print(f"{count:6}  {name}")
    for name, count in sorted(collections.Counter(item.op_type for item in report.lowered.imported).items()):
        print(f"{count:6}  small operator by TVM's importer: {name}")
    cache = library.cache
    print(f"cache: {cache.nbytes(1, cache.block) // cache.block:,} bytes per position, {cache.kind}, {cache.dtype}")
    if library.logits.positions == "all":
        print("logits of every position are computed; slice-last-token makes generation cheaper")
    if library.target == "cuda":
        print("for cuda kernels are compiled only: nothing of them has run on a GPU, and no command loads them")
    print(f"→ {output}")


def _per_rank(degree: int) -> str:
    return f" per rank, {degree} ranks" if degree > 1 else ""
