"""Trace a step to a graph with either of torch's exporters, without reading a byte of the weights.

Dynamo traces weights without data, so it needs memory for the graph only; torchscript runs the step once, on zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch

from passopt.frontends.contract_names import COLUMNS, PREFIX, input_names
from passopt.frontends.family import CacheShape, Step
from passopt.frontends.options import ExportOptions, Phase
from passopt.frontends.precision import Fp32Islands
from passopt.frontends.probing.length_limits import Conditions, conditions, probe
from passopt.frontends.probing.weightless import fake_weights, zero_weights
from passopt.ir.graph.decoder import ATTENTION_MASK

# The sample sizes are unequal, and neither 0 nor 1, so that no branch of the stock code specialises on them.
_BATCH, _SEQ, _PAST = 2, 7, 3
#: The first opset for which torch writes fused operators.
_FUSED_OPSET = 23


@dataclasses.dataclass(frozen=True)
class Trace:
    """A graph under torch's names, and what it assumes of its lengths; None if the exporter does not say."""

    graph: onnx_ir.Model
    conditions: Conditions | None


def trace(step: Step, shape: CacheShape, options: ExportOptions, dtype: torch.dtype, scratch: Path) -> Trace:
    """Return the graph of a step.

    Args:
        step: The step.
        shape: The sizes of its cache.
        options: The options of the export, such as the exporter and the phase.
        dtype: The dtype of the model.
        scratch: A folder for temporary files.

    Raises:
        Exception: Whatever torch or the stock code raises.
    """
    fused = options.exporter == "dynamo" and options.target_opset >= _FUSED_OPSET
    run = _trace_dynamo if options.exporter == "dynamo" else _trace_torchscript
    with torch.no_grad(), Fp32Islands(dtype, fused=fused):
        return run(step, shape, options, dtype, scratch)


def probe_step(step: Step, shape: CacheShape, options: ExportOptions, dtype: torch.dtype) -> Conditions:
    """Return what the code of a step assumes of its lengths, without tracing it to a graph.

    Raises:
        Exception: Whatever torch or the stock code raises.
    """
    with torch.no_grad(), Fp32Islands(dtype, fused=False):
        return probe(step, _sample(step, shape, options, dtype), options.phase)


def _sample(step: Step, shape: CacheShape, options: ExportOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Return sample arguments of one step, by name."""
    past = 0 if options.phase == "prefill" else _PAST
    seq = 1 if options.phase == "decode" else _SEQ
    layers = 0 if options.phase == "prefill" else shape.layers
    cache = (_BATCH, shape.heads, past, shape.width)
    arguments: dict[str, Any] = {
        "input_ids": torch.ones(_BATCH, seq, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, past + seq, dtype=torch.long),
        "past": tuple((torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype)) for _ in range(layers)),
    }
    if step.takes_positions:
        arguments["position_ids"] = torch.arange(past, past + seq).repeat(_BATCH, 1)
    return arguments


def _trace_dynamo(step: Step, shape: CacheShape, options: ExportOptions, dtype: torch.dtype, scratch: Path) -> Trace:
    fake_weights(step)
    arguments = _sample(step, shape, options, dtype)
    free = torch.export.Dim.DYNAMIC
    length = {} if options.phase == "decode" else {1: free}
    shapes: dict[str, Any] = {name: {0: free, **length} for name in arguments if name != "past"}
    shapes["attention_mask"] = {0: free, 1: free}
    shapes["past"] = tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in arguments["past"])
    program = torch.export.export(step, (), arguments, dynamic_shapes=shapes, strict=False)
    exported = torch.onnx.export(
        program, (), dynamo=True, opset_version=options.target_opset, optimize=False, verbose=False
    )
    assert exported is not None
    return Trace(exported.model, _conditions(program, options.phase))


def _conditions(program: torch.export.ExportedProgram, phase: Phase) -> Conditions | None:
    """Return what torch recorded about lengths; None if no length is free."""
    named = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = {name: named[name] for name in program.graph_signature.user_inputs if isinstance(name, str)}
    env = next((value.fake_mode.shape_env for value in inputs.values()), None)
    return None if env is None else conditions(env, inputs, phase)


def _trace_torchscript(
    step: Step, shape: CacheShape, options: ExportOptions, dtype: torch.dtype, scratch: Path
) -> Trace:
    """Trace with the torchscript exporter.

    Weights are exported as graph inputs, so that none is written, and then become initializers without data.
    """
    zero_weights(step)
    arguments = _sample(step, shape, options, dtype)
    layers = len(arguments["past"])
    inputs = input_names(layers, positions="position_ids" in arguments)
    dynamic = {name: _dynamic_axes(name, options.phase) for name in inputs}
    file = scratch / "traced.onnx"
    with _discarded_output():
        torch.onnx.export(
            step,
            tuple(arguments.values()),
            file,
            dynamo=False,
            verbose=True,  # This also keeps the source lines of nodes.
            training=torch.onnx.TrainingMode.PRESERVE,  # The step has set the mode of each of its modules.
            export_params=False,
            do_constant_folding=False,
            opset_version=options.target_opset,
            input_names=inputs,
            dynamic_axes=dynamic,
        )
    model = onnx_ir.from_proto(onnx.load(file))
    file.unlink()
    _parameters_to_initializers(model.graph)
    vocabulary = model.graph.outputs[0].shape
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None  # The exporter's names of dimensions say nothing.
    logits, *present = model.graph.outputs
    length = 1 if options.phase == "decode" else "seq"
    logits.shape = onnx_ir.Shape(["batch", length, vocabulary[2] if vocabulary is not None else None])
    for state in present:
        state.shape = onnx_ir.Shape(["batch", shape.heads, COLUMNS[options.phase], shape.width])
    return Trace(model, None)


def _dynamic_axes(name: str, phase: Phase) -> dict[int, str]:
    if name.startswith("past."):
        return {0: "batch", 2: "past"}
    if name == ATTENTION_MASK:
        return {0: "batch", 1: COLUMNS[phase]}
    return {0: "batch"} if phase == "decode" else {0: "batch", 1: "seq"}


def _parameters_to_initializers(graph: onnx_ir.Graph) -> None:
    for value in list(graph.inputs):
        if value.name is not None and value.name.startswith(f"{PREFIX}."):
            graph.inputs.remove(value)
            value.const_value = None
            graph.initializers[value.name] = value


@contextlib.contextmanager
def _discarded_output() -> Iterator[None]:
    """Discard what C++ code prints to the standard output of the process within the block."""
    saved = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
