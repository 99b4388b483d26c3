"""`passopt export` and `passopt materialize`: from a checkpoint or a plan to a self-contained model."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from passopt import __version__
from passopt.commands.writing import write_with_progress
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import SELF_CHECK
from passopt.ir.graph.shapes import complete_types
from passopt.ir.serialization.model_files import load_model, model_path
from passopt.ir.weights.expressions import DataType
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.folders.manifest import read_manifest
from passopt.targets.folders.output import OutputFacts, plan_output, write_reference_output

if TYPE_CHECKING:
    from passopt.frontends.checkpoint import Checkpoint

DTYPES = {"fp16": DataType.FLOAT16, "fp32": DataType.FLOAT, "bf16": DataType.BFLOAT16}

#: What every exported graph goes through: the exporter's arithmetic on constants and lengths is done once.
CLEAN_UP = "fold-constants,dead-code"


def export(options: argparse.Namespace) -> int:
    """Trace the checkpoint's class, check it against eager torch, write the graph and its weights."""
    from passopt.frontends.checkpoint import open_checkpoint
    from passopt.frontends.options import ExportOptions

    output = Path(options.output)
    if output.exists():
        raise UsageError(f"{output}: output exists. Name another with -o, or remove it first; nothing was written.")
    if options.alibi == "baked" and options.weights == "reference":
        raise UsageError("a baked mask lies in no file of the checkpoint to refer to; use --weights=copy")
    checkpoint = open_checkpoint(Path(options.checkpoint))
    settings = ExportOptions(
        dtype=DTYPES[options.dtype],
        opset=options.opset,
        exporter=options.exporter,
        attention=options.attention,
        alibi=options.alibi,
        phase=options.phase,
        trust_remote_code=options.trust_remote_code,
    )
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.scratch-", dir=output.absolute().parent) as scratch:
        from passopt.frontends.export import export_graph

        _log(f"tracing {checkpoint.directory.name}, stock code")
        model = export_graph(checkpoint, settings, Path(scratch))
        model = clean_up(model)
        model.metadata_props[SELF_CHECK] = "skipped"
        if not options.no_self_check:
            from passopt.frontends.self_check import self_check

            _log("self-check: a small model of the same class, eager torch against its exported graph")
            error = self_check(checkpoint, settings, finish=clean_up)
            model.metadata_props[SELF_CHECK] = f"{error:.2e}"
        source = {"checkpoint": checkpoint.directory.name, "files": _files(checkpoint)}
        pipeline = resolve(CLEAN_UP).expanded
        facts: OutputFacts = {
            "version": __version__,
            "pipeline": pipeline,
            "source": source,
            "companions": checkpoint.directory,
        }
        plan = plan_output(model, **facts)
        if options.weights == "reference":
            write_reference_output(model, output, **facts)
        else:
            write_with_progress(model, output, plan, facts, options)
    layers = sum((value.name or "").endswith(".key") for value in model.graph.outputs)
    print(f"{len(model.graph)} nodes, {layers} layers, {options.dtype}, opset {settings.target_opset}")
    print(f"self-check: {_verdict(model.metadata_props[SELF_CHECK])}")
    print(f"→ {output}")
    return 0


def _files(checkpoint: Checkpoint) -> list[dict[str, object]]:
    """Name, size and header digest of each weight file that was read."""
    files = {Path(source.file.path).name: source.file for source in checkpoint.tensors.values()}
    return [
        {"name": name, "size": file.size, "header_digest": file.header_digest} for name, file in sorted(files.items())
    ]


def materialize(options: argparse.Namespace) -> int:
    """Evaluate a plan into files."""
    path = model_path(Path(options.model))
    model = load_model(path)
    pipeline, source = "", {"model": path.name}
    with contextlib.suppress(ModelError):  # a dump has no manifest
        pipeline = read_manifest(path.parent).pipeline
    facts = OutputFacts(version=__version__, pipeline=pipeline, source=source, companions=path.parent)
    plan = plan_output(model, **facts)
    write_with_progress(model, Path(options.output), plan, facts, options)
    print(plan.to_text())
    print(f"→ {options.output}")
    return 0


def clean_up(model: onnx_ir.Model) -> onnx_ir.Model:
    """Fold the exporter's arithmetic and complete the types, in place."""
    run_passes(model, resolve(CLEAN_UP).passes)
    complete_types(model)
    return model


def _verdict(text: str) -> str:
    if text == "skipped":
        return "skipped (--no-self-check): nobody compared this graph with the original model"
    return f"max|Δ|/max|reference| = {text} against eager torch"


def _log(text: str) -> None:
    print(f"passopt: {text}", file=sys.stderr)
