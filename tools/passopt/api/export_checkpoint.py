"""Write a quantised checkpoint for other tools: `passopt.export_checkpoint`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from passopt.api import checked
from passopt.api.model import refuse_existing
from passopt.ir.calibration.calibration import Calibration
from passopt.ir.calibration.entries import MANIFEST_NAME
from passopt.ir.dtypes import DTYPES
from passopt.ir.errors import UsageError
from passopt.ir.serialization.model_files import load_model
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.reporting.result import Result
from passopt.targets.checkpoints.formats import FORMATS, Array, QuantisedFormat, settings_of, tensors_of
from passopt.targets.checkpoints.stored_pieces import joined, pieces_of_calibration, pieces_of_graph
from passopt.targets.checkpoints.write_checkpoint import write_checkpoint

if TYPE_CHECKING:
    from passopt.frontends.checkpoint import Checkpoint

Dtype = Literal["fp16", "fp32", "bf16"]

_NAMES: Mapping[str, str] = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
#: A weight of a decoder layer, and the names of heads; other matrices are embeddings, which the formats do not have.
_IN_LAYER, _HEADS = re.compile(r"\.\d+\."), ("lm_head", "embed_out")
#: The largest change of a scale by rounding: more is lost only where a 16-bit dtype has no normal number for it.
_LARGEST_ROUNDING = 2.0**-8


@dataclasses.dataclass(frozen=True, repr=False)
class ExportCheckpointResult(Result):
    """The result of writing a checkpoint.

    Attributes:
        output: The new folder.
        format: Its format.
        dtype: The number type of its scales and other tensors.
        bits: The bits of a code.
        quantised: The number of weights that are codes.
        left_out: Linears of layers whose weights are floats.
        rounded: The number of scales that the dtype does not hold exactly.
        nbytes: The bytes of its weights.
    """

    output: Path
    format: QuantisedFormat
    dtype: str
    bits: int
    quantised: int
    left_out: tuple[str, ...]
    rounded: int
    nbytes: int

    def to_text(self) -> str:
        others = f"other tensors {self.dtype}, {self.nbytes:,} bytes"
        lines = [f"{self.quantised} weights of {self.bits} bits, {self.format}, {others}"]
        if self.left_out:
            more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
            lines.append(f"not quantised: {', '.join(self.left_out[:3])}{more}")
        if self.rounded:
            lines.append(f"{self.rounded:,} scales are rounded to {self.dtype}")
        return "\n".join([*lines, f"→ {self.output}"])

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "output": str(self.output), "left_out": list(self.left_out)}


def export_checkpoint(
    checkpoint: Path | str,
    output: Path | str,
    *,
    codes: Path | str | None = None,
    format: QuantisedFormat = "int-quantized",
    activations: Literal["none", "dynamic"] = "none",
    dtype: Dtype | None = None,
    memory: int | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> ExportCheckpointResult:
    """Write a checkpoint whose linears are codes of 8 or 4 bits, in a format that other tools load.

    Args:
        checkpoint: The float checkpoint from which the codes were made, or one that is quantised itself, whose format
            is then changed.
        output: The new folder. It appears whole or not at all.
        codes: A calibration folder, or the folder of a model that int8 or int4 has quantised; None for the codes of the
            checkpoint itself.
        format: "int-quantized" or "pack-quantized" for compressed-tensors, "gptq" for GPTQ's first format.
        activations: "dynamic" asks loaders to quantise activations per token, too; only for "int-quantized".
        dtype: The number type of scales and other tensors; None for that of the scales, and fp16 for "gptq".
        memory: The bytes of memory that the process may take while it writes; None for 1 GiB.
        workers: The number of threads that write; None for two per core, at most 8.
        reporter: Is told about progress.

    Returns:
        The folder, and what was written.

    Raises:
        UsageError: The output exists, an option is unknown, or the codes are not of this checkpoint.
        ModelError: A file is damaged.
    """
    from passopt.frontends.checkpoint import open_checkpoint

    checked.one_of("format", format, FORMATS)
    checked.one_of("activations", activations, ("none", "dynamic"))
    if dtype is not None:
        checked.one_of("dtype", dtype, get_args(Dtype))
    if activations == "dynamic" and format != "int-quantized":
        raise UsageError(f"the format {format} has no quantised activations; take `format=int-quantized`")
    checked.streaming(memory, workers)
    output = checked.path("output", output)
    refuse_existing(output)
    opened = open_checkpoint(checked.path("checkpoint", checkpoint))
    found = _codes(opened, None if codes is None else checked.path("codes", codes))
    group = _group(found, format)
    kind = _dtype(found, format, dtype)
    tensors, rounded = _tensors(opened, found, format, kind)
    left_out = tuple(sorted(name for name in _linears(opened) if f"{name}.weight" not in found))
    has_head = any(f"{name}.weight" in found for name in _HEADS)
    settings = settings_of(format, group, left_out, has_head=has_head, activations=activations == "dynamic")
    name = next(name for name, each in DTYPES.items() if each == kind)
    config = {**opened.config, "torch_dtype": _NAMES[name], "quantization_config": settings}
    config.pop("dtype", None)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with progress_bar(reporter, f"writing {output.name}", nbytes) as progress:
        stream = StreamOptions(memory, workers)
        report = write_checkpoint(output, opened.directory, config, tensors, stream, progress)
    for tensor, count in report.overflows.items():
        reporter.say(f"warning: {tensor}: {count} values overflow fp16 and became infinite")
    return ExportCheckpointResult(output, format, name, 4 if group else 8, len(found), left_out, rounded, nbytes)


def _linears(opened: Checkpoint) -> list[str]:
    """Return the modules of matrices in layers, and of the head."""
    return [
        name.removesuffix(".weight")
        for name, weight in opened.tensors.items()
        if name.endswith(".weight") and len(weight.shape) == 2 and _is_linear(name)
    ]


def _is_linear(name: str) -> bool:
    return bool(_IN_LAYER.search(name)) or name.removesuffix(".weight") in _HEADS


def _codes(opened: Checkpoint, folder: Path | None) -> dict[str, Dequantized]:
    """Return codes and scales of the checkpoint's linears by the names of its tensors."""
    own = {name: weight for name, weight in opened.tensors.items() if isinstance(weight, Dequantized)}
    if folder is None:
        if not own:
            raise UsageError(
                f"{opened.directory}: holds floats. Name the codes: `codes=CALIB`, made by passopt calibrate MODEL "
                f"--data FILE -o CALIB; or `codes=DIR` of a model that passopt run MODEL --passes int8 -o DIR wrote"
            )
        return own
    if own:
        raise UsageError(f"{opened.directory}: is quantised itself; leave out `codes` to change its format")
    if (folder / MANIFEST_NAME).exists() and not (folder / "model.onnx").exists():
        pieces = pieces_of_calibration(Calibration.open(folder))
    else:
        pieces = pieces_of_graph(load_model(folder))
    known = {name: found for name, found in pieces.items() if _is_linear(name)}
    if unknown := sorted(known.keys() - opened.tensors.keys()):
        raise UsageError(
            f"{folder}: holds codes of {', '.join(unknown[:3])}, which {opened.directory} does not have; name the "
            f"checkpoint that was exported and quantised"
        )
    if not known:
        raise UsageError(f"{folder}: holds no codes of linears; make them with passopt calibrate, or run int8")
    return {name: joined(name, found, opened.tensors[name], folder) for name, found in known.items()}


def _group(found: Mapping[str, Dequantized], form: QuantisedFormat) -> int:
    """Return the inputs that share a scale, 0 for all of a channel; the settings of a checkpoint name one number."""
    groups = {weight.group for weight in found.values()}
    if len(groups) > 1:
        raise UsageError(f"the codes are in groups of {sorted(groups)} inputs; a checkpoint has one kind of codes")
    (group,) = groups
    if group and form == "int-quantized":
        raise UsageError("the format int-quantized has a scale per channel; take `format=pack-quantized` for groups")
    return group


def _dtype(found: Mapping[str, Dequantized], form: QuantisedFormat, asked: Dtype | None) -> DataType:
    """Return the dtype of scales and other tensors: a loader computes in one dtype only."""
    if asked is not None:
        return DTYPES[asked]
    if form == "gptq":
        return DataType.FLOAT16
    kinds = sorted({weight.scales.dtype.name for weight in found.values()})
    if len(kinds) > 1:
        raise UsageError(f"scales are {' and '.join(kinds)}; say in which dtype to write them, such as `dtype=fp32`")
    return next(iter(found.values())).scales.dtype


def _tensors(
    opened: Checkpoint, found: Mapping[str, Dequantized], form: QuantisedFormat, kind: DataType
) -> tuple[dict[str, Expression], int]:
    """Return all tensors of the new checkpoint, and how many scales were rounded."""
    tensors: dict[str, Expression] = {}
    rounded = 0
    for name, weight in opened.tensors.items():
        if name not in found:
            tensors[name] = weight.cast(kind)
            continue
        scales, changed = _scales(name, found[name], kind)
        tensors |= tensors_of(name.removesuffix(".weight"), found[name].codes, scales, form)
        rounded += changed
    return tensors, rounded


def _scales(name: str, weight: Dequantized, kind: DataType) -> tuple[Array, int]:
    """Return the scales of a weight in another dtype, and how many of them it does not hold exactly."""
    with Evaluator() as evaluator:
        exact = evaluator.array(weight.scales).astype(np.float64)
    scales = exact.astype(kind.numpy())
    change = np.abs(scales.astype(np.float64) - exact)
    if not (change <= _LARGEST_ROUNDING * np.abs(exact)).all():
        raise UsageError(
            f"{kind.name} does not hold the scales of {name}, down to {np.abs(exact).min():.3g}; its codes would "
            f"stand for other weights. Write fp32 scales: `dtype=fp32`"
        )
    return scales, int(np.count_nonzero(change))
