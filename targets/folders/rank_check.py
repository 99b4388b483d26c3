"""Check by digests that the folders of all ranks were written by the same run as their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import blake3
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import MODEL_NAME, WEIGHTS_NAME
from passopt.ir.weights.evaluator import weight_digest
from passopt.ir.weights.lazy_weight import expression_of
from passopt.targets.folders.manifest import MANIFEST_NAME, Manifest

#: In bytes. Larger weights are not compared here, since they would have to be read a second time later; the small
#: weights of norms and the scales are enough to tell two checkpoints apart.
_LARGEST = 1 << 18


def check_rank_folders(path: Path, manifest: Manifest, models: Sequence[onnx_ir.Model]) -> None:
    """Raise ModelError unless every rank's graph, and its weights of at most 256 KiB, match `manifest`.

    Graphs of two checkpoints may be equal byte for byte, so the weights are compared too.

    Args:
        path: The output folder that holds the folders of the ranks.
        manifest: The manifest of that output folder.
        models: The loaded graphs of all ranks, in the order of `manifest.ranks`.
    """
    for files, model in zip(manifest.ranks, models, strict=True):
        folder = path / files.directory
        found = blake3.blake3((folder / MODEL_NAME).read_bytes()).hexdigest()
        if found != files.model:
            raise _foreign(folder / MODEL_NAME, f"is not the graph that {MANIFEST_NAME} speaks of (blake3 differs)")
        for name, value in model.graph.initializers.items():
            expected, weight = files.tensors.get(name), expression_of(value)
            if expected is None or weight is None or weight.nbytes > _LARGEST:
                continue
            if weight_digest(weight) != expected:
                what = f"weight {name!r} is not the one that {MANIFEST_NAME} speaks of (blake3 differs)"
                raise _foreign(folder / WEIGHTS_NAME, what)


def _foreign(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file}: {what}: the folders are of different runs, or the file was changed. Write all ranks with one "
        f"`passopt run`."
    )
