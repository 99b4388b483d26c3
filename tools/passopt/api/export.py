"""Export a stock Hugging Face checkpoint to ONNX: `passopt.export`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir

from passopt.api import checked
from passopt.api.model import Model, refuse_existing, write
from passopt.ir.dtypes import DTYPES
from passopt.ir.errors import UsageError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import MAX_POSITIONS, SELF_CHECK
from passopt.ir.serialization.model_files import MODEL_NAME, load_model
from passopt.ir.version import __version__
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.source_file import SourceFile
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.reporting.reporter import SILENT, Reporter, progress_bar
from passopt.reporting.result import Result
from passopt.targets.folders.output import Origin, Output

if TYPE_CHECKING:
    from passopt.frontends.checkpoint import Checkpoint
    from passopt.frontends.options import Alibi, Attention, Exporter, ExportOptions, Phase

Dtype = Literal["fp16", "fp32", "bf16"]

#: The passes that every exported graph goes through, so that the exporter's arithmetic on constants and lengths is done
#: once, and not at every run of the model.
CLEAN_UP = "fold-constants,dead-code"
GGUF_SUFFIX = ".gguf"
_SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """The result of an export.

    Attributes:
        output: The new folder.
        nodes: The number of nodes of the graph.
        layers: The number of decoder layers.
        dtype: The number type of the weights.
        opset: The opset of the graph.
        error: The error of the self-check, max|difference| / max|reference|: a small model of the same class is
            exported and compared with eager torch. None if the self-check was skipped.
        positions: The number of positions for which the graph is known to hold, if that is fewer than its tables have
            or it has none; else None.
        codes: The number of weights that are the codes of a quantised checkpoint.
    """

    output: Path
    nodes: int
    layers: int
    dtype: str
    opset: int
    error: float | None
    positions: int | None = None
    codes: int = 0

    @property
    def model(self) -> Model:
        """Load and return the exported model."""
        return Model(load_model(self.output), self.output / MODEL_NAME, CLEAN_UP)

    def to_text(self) -> str:
        verdict = "skipped (--no-self-check): nobody compared this graph with the original model"
        if self.error is not None:
            verdict = f"max|Δ|/max|reference| = {self.error:.2e} against eager torch"
        graph = f"{self.nodes} nodes, {self.layers} layers, {self.dtype}, opset {self.opset}"
        limit = "" if self.positions is None else f", at most {self.positions} positions"
        codes = "" if not self.codes else f"\n{self.codes} weights keep the codes and scales of the checkpoint"
        return f"{graph}{limit}{codes}\nself-check: {verdict}\n→ {self.output}"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "output": str(self.output)}


def export(
    checkpoint: Path | str,
    output: Path | str,
    *,
    dtype: Dtype = "fp16",
    alibi: Alibi = "formula",
    opset: int | None = None,
    exporter: Exporter = "dynamo",
    attention: Attention | None = None,
    phase: Phase = "merged",
    weights: Literal["copy", "reference"] = "copy",
    dequantize: bool = False,
    trust_remote_code: bool = False,
    self_check: bool = True,
    memory: int | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> ExportResult:
    """Export a stock checkpoint, its code unmodified, to a folder with model.onnx and its weights.

    Args:
        checkpoint: The folder with config.json, code and weights; or a GGUF file of a decoder like Llama, whose weights
            are dequantised first.
        output: The new folder. It appears whole or not at all.
        dtype: The number type of the weights.
        alibi: "formula" keeps ALiBi as slopes, "baked" writes it as a constant mask.
        opset: The opset, from 18 to 23; None for 21, or for 20 with torchscript.
        exporter: The exporter of torch: "dynamo", or "torchscript", which runs the model once.
        attention: The attention of transformers to trace, "eager" or "sdpa"; None for what suits the family.
        phase: "merged" for one graph that does everything, "prefill" for a graph without past, "decode" for a graph of
            single tokens.
        weights: "copy" copies weights into the output; "reference" only refers to the files that hold them.
        dequantize: Let the weights of a quantised checkpoint be floats, for passes that change weights, instead of its
            codes behind DequantizeLinear; the pass int8 finds the codes again where `weights` is "reference".
        trust_remote_code: Run the checkpoint's own Python files. Read them first.
        self_check: Export a small model of the same class too, and compare it with eager torch.
        memory: The bytes of memory that the process may take while it writes weights; None for 1 GiB.
        workers: The number of threads that write weights; None for two per core, at most 8.
        reporter: Is told about progress and warnings.

    Returns:
        The folder, figures of the graph, and the error of the self-check.

    Raises:
        UsageError: The output exists, an option is unknown, options contradict each other, or memory or disk is too
            small.
        ModelError: The checkpoint is incomplete, or its code cannot be exported.
        CheckError: The self-check found a difference from eager torch.
    """
    from passopt.frontends.options import ExportOptions

    checked.one_of("weights", weights, ("copy", "reference"))
    checked.streaming(memory, workers)
    output = checked.path("output", output)
    refuse_existing(output)
    if dtype not in DTYPES:
        raise UsageError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if alibi == "baked" and weights == "reference":
        raise UsageError("a baked mask lies in no file of the checkpoint to refer to; use `weights=copy`")
    settings = ExportOptions(
        dtype=DTYPES[dtype],
        opset=opset,
        exporter=exporter,
        attention=attention,
        alibi=alibi,
        phase=phase,
        trust_remote_code=trust_remote_code,
    )
    opened = _opened(checked.path("checkpoint", checkpoint), settings, weights)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.scratch-", dir=output.absolute().parent) as scratch:
        found = opened.checkpoint(Path(scratch), reporter)
        if found.scheme is not None:
            _tell_of_codes(found, settings.dtype, reporter)
        model = _traced(found, opened.name, settings, Path(scratch), reporter)
        keeping = "" if dequantize else _keeping_codes(found)
        codes = _keep_codes(model, keeping) if keeping else 0
        error = _checked(found, settings, reporter) if self_check else None
        model.metadata_props[SELF_CHECK] = _SKIPPED if error is None else f"{error:.2e}"
        source = {"checkpoint": opened.name, "files": opened.files(found)}
        planned = Output(
            model,
            Origin(
                __version__,
                resolve(f"{CLEAN_UP},{keeping}" if keeping else CLEAN_UP).expanded,
                source,
                opened.companions,
            ),
        )
        if weights == "reference":
            planned.write_reference(output)
        else:
            write(planned, output, StreamOptions(memory, workers), reporter)
    layers = sum((value.name or "").endswith(".key") for value in model.graph.outputs)
    limit = int(model.metadata_props[MAX_POSITIONS]) if MAX_POSITIONS in model.metadata_props else None
    return ExportResult(output, len(model.graph), layers, dtype, settings.target_opset, error, limit, codes)


def _keeping_codes(checkpoint: Checkpoint) -> str:
    """Return the passes after which weights that were quantised elsewhere are their codes, or "" if there are none."""
    groups = sorted({weight.group for weight in checkpoint.tensors.values() if isinstance(weight, Dequantized)})
    return ",".join(f"int4{{method=stored,group={size}}}" if size else "int8{method=stored}" for size in groups)


def _keep_codes(model: onnx_ir.Model, passes: str) -> int:
    """Let weights that were quantised elsewhere be their codes, in place, and return how many they are."""
    run_passes(model, resolve(passes).passes)
    complete_types(model)
    return sum(node.op_type == "DequantizeLinear" for node in model.graph)


def _tell_of_codes(checkpoint: Checkpoint, dtype: onnx_ir.DataType, reporter: Reporter) -> None:
    """Say what of a quantised checkpoint the graph does not keep; raise ModelError if its dtype loses scales."""
    from passopt.frontends.quantised.scheme import rounded_scales

    assert checkpoint.scheme is not None
    rounded, total = rounded_scales(checkpoint.tensors, dtype, checkpoint.directory)
    if rounded:
        reporter.say(f"{rounded:,} of {total:,} scales are rounded to {dtype.name}; fp32 keeps all of them")
    if checkpoint.scheme.quantises_activations:
        reporter.say(
            "the checkpoint asks for int8 activations, and the graph computes in floats: "
            "the pass quantize-activations quantises them, too"
        )


def clean_up(model: onnx_ir.Model) -> onnx_ir.Model:
    """Fold the exporter's arithmetic on constants and complete the types of a graph, in place.

    Args:
        model: The graph as the exporter made it.

    Returns:
        The same model.
    """
    run_passes(model, resolve(CLEAN_UP).passes)
    complete_types(model)
    return model


class _Folder:
    """A checkpoint that is opened from its folder."""

    def __init__(self, path: Path, settings: ExportOptions) -> None:
        from passopt.frontends.checkpoint import open_checkpoint
        from passopt.frontends.open_family import is_remote, refuse_passed_over
        from passopt.frontends.remote_code import check_consent

        self._checkpoint = open_checkpoint(path)
        if is_remote(self._checkpoint) and self._checkpoint.config.get("auto_map"):
            check_consent(self._checkpoint, trust_remote_code=settings.trust_remote_code)
        refuse_passed_over(self._checkpoint, trust_remote_code=settings.trust_remote_code)
        self.name, self.companions = self._checkpoint.directory.name, self._checkpoint.directory

    def checkpoint(self, scratch: Path, reporter: Reporter) -> Checkpoint:
        return self._checkpoint

    def files(self, found: Checkpoint) -> list[dict[str, object]]:
        """Return the name, the size and the digest of the header of each weight file that was read."""
        return _described(source.file for weight in found.tensors.values() for source in weight.sources())


class _Gguf:
    """A GGUF file, which is written as a checkpoint first."""

    def __init__(self, path: Path) -> None:
        from passopt.frontends.gguf.convert import check_gguf
        from passopt.frontends.gguf.reader import open_gguf

        self._model = open_gguf(path)
        check_gguf(self._model)
        self.name = path.name
        #: The folder with tokenizer and configuration, once there is a checkpoint.
        self.companions: Path | None = None

    def checkpoint(self, scratch: Path, reporter: Reporter) -> Checkpoint:
        from passopt.frontends.gguf.convert import write_checkpoint
        from passopt.frontends.gguf.tensors import nbytes_of

        with progress_bar(reporter, f"dequantising {self.name}", nbytes_of(self._model)) as tell:
            found = write_checkpoint(self._model, scratch / "checkpoint", reporter.say, tell)
        self.companions = found.directory
        # From here on messages name the file, and not the temporary folder.
        return dataclasses.replace(found, directory=self._model.path)

    def files(self, found: Checkpoint) -> list[dict[str, object]]:
        """Return the name, the size and the digest of the header of the GGUF file."""
        return _described([self._model.file])


def _opened(path: Path, settings: ExportOptions, weights: str) -> _Folder | _Gguf:
    if path.suffix.lower() != GGUF_SUFFIX or path.is_dir():
        return _Folder(path, settings)
    if weights == "reference":
        raise UsageError("weights of a GGUF file are dequantised and lie in no file to refer to; use `weights=copy`")
    return _Gguf(path)


def _traced(
    checkpoint: Checkpoint, name: str, settings: ExportOptions, scratch: Path, reporter: Reporter
) -> onnx_ir.Model:
    from passopt.frontends.export import export_graph

    reporter.say(f"tracing {name}, stock code")
    return clean_up(export_graph(checkpoint, settings, scratch))


def _checked(checkpoint: Checkpoint, settings: ExportOptions, reporter: Reporter) -> float:
    from passopt.frontends.self_check import self_check

    reporter.say("self-check: a small model of the same class, eager torch against its exported graph")
    return self_check(checkpoint, settings, finish=clean_up)


def _described(files: Iterable[SourceFile]) -> list[dict[str, object]]:
    by_name = {Path(file.path).name: file for file in files}
    return [
        {"name": name, "size": file.size, "header_digest": file.header_digest} for name, file in sorted(by_name.items())
    ]
