"""Make one row of the drift table in a process of its own: export each cell's graph, fuse it, count, and compare.

    python tools/docs/drift_row.py FAMILY PHASE PIPELINE KEEP CHECKS CELL...

A CELL is EXPORTER:OPSET:ATTENTION. KEEP is a folder in which the exported graphs are saved, or an empty string.
CHECKS is "numeric" to check every rewrite by numbers, or "structure". The program prints one JSON object per cell, as
soon as its result is known.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.api.export import clean_up
from passopt.frontends.checkpoint import Checkpoint, open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions
from passopt.ir.errors import PassoptError
from passopt.ir.graph.decoder import LOGITS
from passopt.ir.serialization.model_files import save_materialized
from passopt.ir.weights.expressions import DataType
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checkpoints import ALIBI, ROTARY, make_checkpoint
from passopt.testing.families import make_family_checkpoint
from passopt.verification.rewrites.check import NumericCheck

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The operators that the fusions make, by the kind of part that they stand for.
FUSED = {
    "norms": {"RMSNormalization"},
    "rotary": {"RotaryEmbedding"},
    "attention": {"Attention", "AlibiAttention", "AlibiAttentionNoCache"},
}
BAICHUAN2 = {"baichuan2-7b": ROTARY, "baichuan2-13b": ALIBI}

#: Positions per step. A merged graph runs a padded prefill, a chunk and decode; other graphs run what they can take.
_STEPS = {"merged": (7, 3, 1, 1), "prefill": (9,), "decode": (1, 1)}
#: Positions in the cache before the first step.
_PAST = {"merged": 0, "prefill": 0, "decode": 5}
#: Sequences of a batch, and positions of padding on the left of the second one.
_BATCH, _PADDING = 3, 4


def main() -> None:
    """Make the checkpoint of a family, and print the result of every cell."""
    family, phase, pipeline, keep, checks, *cells = sys.argv[1:]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="passopt-drift-") as folder:
        checkpoint = open_checkpoint(_make_checkpoint(Path(folder) / "checkpoint", family))
        for cell in cells:
            exporter, opset, attention = cell.split(":")
            options = ExportOptions(
                dtype=DataType.FLOAT,
                opset=int(opset),
                exporter=exporter,  # type: ignore[arg-type]
                attention=None if family in BAICHUAN2 else attention,  # type: ignore[arg-type]
                phase=phase,  # type: ignore[arg-type]
                trust_remote_code=True,
            )
            target = Path(keep) / f"{family}-{phase}-{exporter}-{opset}-{attention}" if keep else None
            found = _cell(checkpoint, options, pipeline, Path(folder), target, numeric=checks == "numeric")
            print(json.dumps({"cell": cell, **found}), flush=True)


def _make_checkpoint(directory: Path, family: str) -> Path:
    if family in BAICHUAN2:
        return make_checkpoint(directory, dataclasses.replace(BAICHUAN2[family], layers=2), trained=False)
    return make_family_checkpoint(directory, family)


def _cell(
    checkpoint: Checkpoint,
    options: ExportOptions,
    pipeline: str,
    scratch: Path,
    keep: Path | None,
    *,
    numeric: bool,
) -> dict[str, object]:
    """Return the counts by kind as `found` with the `error`, or the `step` that failed with its `reason`."""
    step = "export"
    try:
        graph = clean_up(export_graph(checkpoint, options, scratch))
        _save(graph, keep)
        step = pipeline
        fused = graph.clone()
        run_passes(fused, resolve(pipeline).passes, instruments=[NumericCheck()] if numeric else ())
        step = "compare"
        error = _difference(_run(graph, options.phase), _run(fused, options.phase))
    except PassoptError as failure:
        return {"step": step, "reason": str(failure).strip().partition("\n")[0]}
    counts = collections.Counter(node.op_type for node in fused.graph)
    return {"found": {kind: sum(counts[name] for name in names) for kind, names in FUSED.items()}, "error": error}


def _save(model: onnx_ir.Model, directory: Path | None) -> None:
    if directory is None:
        return
    directory.mkdir(parents=True)
    save_materialized(model, directory)


def _run(model: onnx_ir.Model, phase: str) -> list[dict[str, Array]]:
    """Run every step on the cache that the model's own earlier steps made, and return all outputs of each.

    The outputs hold all rows, padded ones too.
    """
    session = Session(model)
    vocabulary = next(value for value in model.graph.outputs if value.name == LOGITS).shape
    assert vocabulary is not None
    size = vocabulary[2]
    assert isinstance(size, int)
    outputs: list[dict[str, Array]] = []
    cache = dict(_first_cache(model, _PAST[phase]))
    for feeds in _feeds(phase, size):
        found = session.run({**feeds, **cache})
        outputs.append(found)
        cache = {name.replace("present.", "past.", 1): value for name, value in found.items() if name != LOGITS}
    return outputs


def _feeds(phase: str, vocabulary: int) -> Iterator[Mapping[str, Array]]:
    random = np.random.default_rng(0)
    past, steps = _PAST[phase], _STEPS[phase]
    total = past + sum(steps)
    ids = random.integers(3, vocabulary, (_BATCH, total))
    mask = np.ones((_BATCH, total), np.int64)
    mask[1, :_PADDING] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    for count in steps:
        here = slice(past, past + count)
        past += count
        yield {
            "input_ids": ids[:, here],
            "attention_mask": mask[:, :past],
            "position_ids": positions[:, here],
        }


def _first_cache(model: onnx_ir.Model, past: int) -> Iterator[tuple[str, Array]]:
    random = np.random.default_rng(1)
    for value in model.graph.inputs:
        name, shape = value.name or "", value.shape
        if name.startswith("past.") and shape is not None:
            yield name, random.standard_normal((_BATCH, shape[1], past, shape[3])).astype(np.float32)


def _difference(expected: list[dict[str, Array]], found: list[dict[str, Array]]) -> float | None:
    """Return the largest max|difference| / max|expected| of all outputs, or None if any is not finite."""
    errors = [
        float(np.abs(other[name] - one[name]).max() / np.abs(one[name]).max())
        for one, other in zip(expected, found, strict=True)
        for name in one
    ]
    return max(errors) if np.isfinite(errors).all() else None


if __name__ == "__main__":
    main()
