"""Export a checkpoint's own, unmodified class to an ONNX graph whose weights are lazy references to its files.

The class is traced without weights, so memory does not grow with the model. Every tensor of the checkpoint must match
an initializer, and every initializer a tensor; otherwise a ModelError names those left over.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir
import torch

from passopt.frontends.bind_weights import bind_weights, check_tensors, merge_tied, without_zero_biases
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.contract_names import Contract, apply_contract
from passopt.frontends.family import Family
from passopt.frontends.open_family import open_family
from passopt.frontends.options import ExportOptions
from passopt.frontends.probing.length_limits import Conditions
from passopt.frontends.quiet import quiet
from passopt.frontends.stock_errors import stock_errors
from passopt.frontends.tracing import probe_step, trace
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import MAX_POSITIONS
from passopt.ir.weights.expressions import DataType

TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}
IR_VERSION = 10


def export_graph(checkpoint: Checkpoint, options: ExportOptions, scratch: Path) -> onnx_ir.Model:
    """Export a checkpoint to one graph for prefill, chunked prefill and decode, or for one of them by `options.phase`.

    The inputs are input_ids `[batch, seq]`, attention_mask `[batch, past+seq]`, position_ids `[batch, seq]` (if the
    model uses them) and past.{layer}.{key,value} `[batch, kv_heads, past, head_dim]`. The outputs are logits
    `[batch, seq, vocab]` and present.{layer}.{key,value} `[batch, kv_heads, past+seq, head_dim]`.

    Args:
        checkpoint: The checkpoint.
        options: The options of the export.
        scratch: A folder for what the export computes, such as a baked ALiBi mask. It must outlive the model.

    Raises:
        ModelError: If the checkpoint or its class is not supported or fails, or if consent to run its code is missing.
        UsageError: If the checkpoint's family does not have one of the options.
    """
    with quiet(), open_family(checkpoint, options) as family:
        return export_family(family, options, scratch)


def export_family(family: Family, options: ExportOptions, scratch: Path, *, small: bool = False) -> onnx_ir.Model:
    """Export the model of an open family as `export_graph` does; with `small`, the small model of a self-check."""
    dtype = TORCH_DTYPES[options.dtype]
    model = family.build(dtype, small=small)
    checkpoint = dataclasses.replace(family.checkpoint, tensors=without_zero_biases(family.sources(model), model))
    check_tensors(checkpoint, model)
    ties = family.ties(model)
    with stock_errors(checkpoint, f"{type(model).__name__} cannot be traced"):
        shape = family.cache_shape(model)
        step = family.step(model)
        traced = trace(step, shape, options, dtype, scratch)
    graph = traced.graph
    if graph.opset_imports.get("") != options.target_opset:
        found = graph.opset_imports.get("")
        raise ModelError(f"torch exports opset {found} where {options.target_opset} was asked for")
    apply_contract(graph, Contract(shape.layers, options.phase, family.source_root, family.constants))
    merge_tied(graph.graph, ties)
    bind_weights(graph, checkpoint, options.dtype, family.extra_weights(model, scratch))
    graph.ir_version = IR_VERSION
    family.check(graph)
    conditions = traced.conditions or _probed(family, options)
    found = conditions.limit(options.phase, family.positions(model), f"{checkpoint.directory}: {type(model).__name__}")
    limits = [limit for limit in (found, family.longest(model)) if limit is not None]
    if limits:
        graph.metadata_props[MAX_POSITIONS] = str(min(limits))
    return graph


def _probed(family: Family, options: ExportOptions) -> Conditions:
    """Return what the code of a small model assumes of lengths.

    The torchscript exporter follows one branch and does not say which.
    """
    dtype = TORCH_DTYPES[options.dtype]
    model = family.build(dtype, small=True)
    with stock_errors(family.checkpoint, f"the branches of {type(model).__name__} on lengths cannot be followed"):
        shape = family.cache_shape(model)
        return probe_step(family.step(model), shape, options, dtype)
