"""Compile a model to a folder with a library and its weights: lower the graph, build the code, lay out the weights.

The folder appears only when it is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir

from passopt.ir.atomic_folders import JOURNAL_NAME, keep_only, resumable_directory
from passopt.ir.dtypes import DTYPES, DataType
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import INPUT_IDS, LENGTH_KEYS, LOGITS, SCALES, decoder_of, degree_of, positions_of
from passopt.ir.json_text import read_json
from passopt.ir.serialization.model_files import WEIGHTS_NAME
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import small_constant
from passopt.ir.weights.safetensors_layout import layout_of
from passopt.ir.weights.streaming.budget import DEFAULT_STREAM, StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import StreamReport, write_weight_files
from passopt.targets.folders.companions import companions_in
from passopt.targets.folders.manifest import rank_folders
from passopt.targets.folders.output import Origin
from passopt.targets.tvm.compiled_folder import (
    CODE_NAME,
    INPUTS,
    SOURCE_NAME,
    CacheDtype,
    CacheLayout,
    CodeFile,
    Library,
    Logits,
    Numbers,
    RankFolders,
    WeightsFile,
)
from passopt.targets.tvm.compiler.kernels.code_generation import code_generation
from passopt.targets.tvm.compiler.lowering.graph import MAIN, Lowered, lower
from passopt.targets.tvm.compiler.relax_steps import run_steps
from passopt.targets.tvm.machines import Gpu, Machine


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A report of what was compiled.

    Attributes:
        lowered: The lowered model, with its kernels and fallbacks; that of rank 0 if there are several ranks.
        library: The description of the library; that of the last rank if there are several ranks.
        weight_bytes: The bytes of a weights file, on average over the ranks.
        degree: The number of ranks.
        stream: How the weights were written.
    """

    lowered: Lowered
    library: Library
    weight_bytes: int
    degree: int
    stream: StreamReport


def compile_models(
    models: Sequence[onnx_ir.Model],
    directory: Path,
    machine: Machine,
    origin: Origin,
    *,
    allow_fallback: bool = False,
    on_step: Callable[[str, Any], None] | None = None,
    progress: Callable[[int], None] | None = None,
    stream: StreamOptions = DEFAULT_STREAM,
) -> CompileReport:
    """Compile a model, an SPMD model, or the models of all ranks, to the new folder `directory`.

    All ranks get the same library, because whatever differs between them is a parameter. Memory does not grow with the
    size of the weights: they are laid out chunk by chunk. If the call is interrupted while it writes weights, the same
    call resumes and keeps the tensors that are finished.

    Args:
        models: One model (which may be an SPMD model), or one model per rank, in the order of ranks.
        directory: The folder to write, which must not exist.
        machine: The CPU or GPU to generate code for.
        origin: The origin of the model, and the folder of its tokenizer and configuration.
        allow_fallback: If true, compile linears and attentions without a native kernel by TVM's own operators.
        on_step: Called after each Relax step with its name and the module.
        progress: Called with the weight bytes written since its last call.
        stream: The memory and threads to write weights with.

    Returns:
        A report of what was compiled.

    Raises:
        ModelError: If a node has no native kernel (the message lists all of them), or the model cannot be compiled.
        UsageError: If the output exists, the disk is too small, or there is no C compiler to link with.
    """
    degree = max(len(models), degree_of(models[0]))
    if degree > 1 and isinstance(machine, Gpu):
        raise ModelError(f"{degree} ranks: collectives have no form on a GPU yet; compile one rank, or for llvm")
    check_linker()
    lowered, *others = _lowered(models, machine, allow_fallback=allow_fallback)
    interface = _Interface.of(models[0], lowered, origin.companions)
    weights = [_weights(item) for item in ([lowered, *others] if others else [lowered] * degree)]
    needed = sum(layout_of(item).nbytes for item in weights)
    folders = rank_folders(degree)
    with resumable_directory(directory, needed) as staged:
        keep_only(staged, {JOURNAL_NAME, *(str(Path(folder) / WEIGHTS_NAME) for folder in folders)})
        code = staged / CODE_NAME
        build(lowered, machine, code, on_step)
        files = []
        for rank, (folder, expressions) in enumerate(zip(folders, weights, strict=True)):
            target = staged / folder
            target.mkdir(exist_ok=True)
            if degree > 1:
                shutil.copyfile(code, target / CODE_NAME)
            files.append(WeightFile(target / WEIGHTS_NAME, expressions, rank if len(models) == 1 else 0))
        written = write_weight_files(files, stream, progress=progress, journal=staged / JOURNAL_NAME)
        libraries = [
            _library(interface, lowered, machine, origin, staged / folder, written.digests[rank], rank, degree)
            for rank, folder in enumerate(folders)
        ]
        for folder, library in zip(folders, libraries, strict=True):
            library.write(staged / folder)
        if degree > 1:
            code.unlink()
            roots = tuple(library.weights.root for library in libraries)
            RankFolders(degree, tuple(folders), roots).write(staged)
        for path in companions_in(origin.companions):
            shutil.copyfile(path, staged / path.name)
    return CompileReport(lowered, libraries[-1], needed // degree, degree, written)


def check_linker() -> None:
    """Raise UsageError if there is no C compiler, which TVM needs to link libraries."""
    from tvm.support.cc import get_cc

    compiler = get_cc()
    if compiler is None or shutil.which(compiler) is None:
        named = f"{compiler} (from CXX or CC) is not there" if compiler else "none is installed"
        raise UsageError(f"a C compiler links the library, and {named}. Install gcc or clang. Nothing was written.")


def build(lowered: Lowered, machine: Machine, path: Path, on_step: Callable[[str, Any], None] | None = None) -> None:
    """Run the Relax steps, generate code and link it to the library `path`.

    For a GPU, the source of the kernels is written beside it. Raises ModelError if TVM fails.
    """
    from tvm import relax

    target = machine.target()
    module = run_steps(lowered.module, target, on_step)
    try:
        with code_generation(target):
            executable = relax.build(module, target, relax_pipeline=None)
        executable.export_library(str(path))
    except (RuntimeError, ValueError) as error:
        what = f"cuda ({machine.arch})" if isinstance(machine, Gpu) else machine.mcpu
        raise ModelError(f"TVM builds no library for {what} of this model: {error}") from error
    if isinstance(machine, Gpu):
        path.with_name(SOURCE_NAME).write_text(_source(executable.mod), encoding="utf-8")


def _source(module: Any) -> str:
    """Return the CUDA source of all kernels of a built library."""
    found = [_source(item) for item in module.imports]
    return "\n".join([str(module.inspect_source()), *found] if module.kind == "cuda" else found)


def _differing(models: Sequence[onnx_ir.Model]) -> frozenset[str]:
    """Return the names of small constants that differ between ranks, such as the first row of a vocabulary shard."""
    if len(models) == 1:
        return frozenset()
    found = set()
    for name, value in models[0].graph.initializers.items():
        first = small_constant(value)
        if first is None:
            continue
        for model in models[1:]:
            theirs = model.graph.initializers.get(name)
            other = None if theirs is None else small_constant(theirs)
            if other is None or other.tobytes() != first.tobytes():
                found.add(name)
    return frozenset(found)


def _lowered(models: Sequence[onnx_ir.Model], machine: Machine, *, allow_fallback: bool) -> list[Lowered]:
    """Lower every model, and raise ModelError unless all of them have the same code as the first.

    Only the code of the first model is compiled, for all ranks.
    """
    from tvm_ffi import structural_equal

    per_rank = _differing(models)
    found = [lower(model, machine, allow_fallback=allow_fallback, per_rank=per_rank) for model in models]
    for rank, item in enumerate(found):
        if rank and not structural_equal(found[0].module, item.module, map_free_vars=True):
            raise ModelError(f"rank {rank} computes something else than rank 0: the folders are of different runs")
    return found


def _weights(lowered: Lowered) -> dict[str, Expression]:
    return {item.name: item.expression for item in lowered.parameters}


@dataclasses.dataclass(frozen=True)
class _Interface:
    """The part of a library's description that says how it is called.

    It is found before anything is written, so that an unsuitable model is refused early.
    """

    cache: CacheLayout
    logits: Logits
    max_positions: int | None

    @classmethod
    def of(cls, model: onnx_ir.Model, lowered: Lowered, companions: Path | None) -> _Interface:
        """Return the interface of a model; raise ModelError if an engine could not call it."""
        decoder = decoder_of(model)
        check_inputs(model, lowered.inputs)
        names: dict[DataType, Numbers] = {kind: name for name, kind in DTYPES.items()}
        if decoder.dtype not in names or decoder.cache_dtype not in {decoder.dtype, DataType.INT8}:
            raise ModelError(f"a cache in {decoder.cache_dtype.name}; libraries keep {', '.join(names.values())}, int8")
        kind: Literal["in-place", "functional"] = "in-place" if lowered.in_place else "functional"
        numbers = names[decoder.dtype]
        dtype: CacheDtype = numbers if decoder.cache_dtype == decoder.dtype else "int8"
        cache = CacheLayout(
            decoder.layers, decoder.kv_heads, decoder.head_dim, dtype, numbers if dtype == "int8" else "fp32", kind=kind
        )
        return cls(cache, _logits(model), max_positions(model, companions))


def check_inputs(model: onnx_ir.Model, plain: Sequence[str]) -> None:
    """Raise ModelError if an engine could not provide the inputs of `model`.

    `plain` are the names of its inputs besides the past. Refused are inputs that an engine does not know, a graph for
    one fixed batch or length only, and layers whose caches differ in heads, width or dtype.
    """
    unknown = [name for name in plain if name not in INPUTS]
    if unknown:
        raise ModelError(
            f"input {unknown[0]!r}: a library takes {', '.join(INPUTS)} and the cache. Export the model without it."
        )
    inputs = {str(value.name): value for value in model.graph.inputs}
    ids = inputs[INPUT_IDS].shape
    if ids is None or len(ids) != 2 or any(isinstance(length, int) for length in ids):
        raise ModelError(
            f"input {INPUT_IDS} has shape {ids}, expected [batch, seq]: one library runs prefill and decode. "
            f"Export with `phase=merged`."
        )
    pasts = {name: value for name, value in inputs.items() if name.startswith("past.") and not name.endswith(SCALES)}
    kinds = {name: (value.shape and (value.shape[1], value.shape[3]), value.dtype) for name, value in pasts.items()}
    first = next(iter(kinds))
    unlike = next((name for name in kinds if kinds[name] != kinds[first]), None)
    if unlike is not None:
        raise ModelError(
            f"input {unlike!r} is {inputs[unlike].dtype} {inputs[unlike].shape}, {first!r} is {inputs[first].dtype} "
            f"{inputs[first].shape}: caches of all layers must have the same heads, width and type"
        )


def _library(
    interface: _Interface,
    lowered: Lowered,
    machine: Machine,
    origin: Origin,
    folder: Path,
    digests: Mapping[str, str],
    rank: int,
    degree: int,
) -> Library:
    return Library(
        passopt=origin.version,
        target="cuda" if isinstance(machine, Gpu) else "llvm",
        mcpu=machine.mcpu,
        isa=machine.arch if isinstance(machine, Gpu) else machine.isa.name,
        features=machine.required_features(),
        library=CodeFile.of(folder / CODE_NAME),
        weights=WeightsFile.of(folder / WEIGHTS_NAME, digests),
        function=MAIN,
        inputs=lowered.inputs,
        parameters=tuple(item.name for item in lowered.parameters),
        cache=interface.cache,
        logits=interface.logits,
        max_positions=interface.max_positions,
        rank=rank,
        degree=degree,
        passes=origin.pipeline,
        quantized=lowered.quantized,
    )


def _logits(model: onnx_ir.Model) -> Logits:
    value = next(item for item in model.graph.outputs if item.name == LOGITS)
    if value.shape is None or len(value.shape) != 3 or not isinstance(value.shape[2], int):
        raise ModelError(f"output {LOGITS} has shape {value.shape}, expected [batch, seq, vocab] with a known vocab")
    return Logits("last" if value.shape[1] == 1 else "all", value.shape[2])


def max_positions(model: onnx_ir.Model, companions: Path | None) -> int | None:
    """Return the length of the longest sequence that the model can take, or None if nothing bounds it.

    It is the smallest bound of the model's own tables, which must not be read beyond their end, and of config.json in
    the folder `companions`. Raises ModelError if that file is not JSON.
    """
    table = positions_of(model)
    found = [] if table is None else [table]
    path = companions / "config.json" if companions is not None else None
    if path is not None and path.is_file():
        try:
            config = read_json(path)
        except ValueError as error:
            raise ModelError(f"{path}: is no JSON: {error}. Restore it, or remove it.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path}: is {type(config).__name__} instead of an object. Restore it, or remove it.")
        found += [int(config[key]) for key in LENGTH_KEYS if isinstance(config.get(key), int)]
    return min(found, default=None)
