"""Export a checkpoint's own, unmodified class to an ONNX graph whose weights are lazy references to its files.

The class is traced without weights, so memory does not grow with the model. Every tensor of the checkpoint must find
its initializer and every initializer its tensor; otherwise ModelError names those left over.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir
import torch

from passopt.frontends.bind_weights import bind_weights, check_tensors, merge_tied
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.contract_names import Contract, apply_contract
from passopt.frontends.family import Family
from passopt.frontends.open_family import open_family
from passopt.frontends.options import ExportOptions
from passopt.frontends.quiet import quiet
from passopt.frontends.tracing import trace
from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType

TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}
IR_VERSION = 10


def export_graph(checkpoint: Checkpoint, options: ExportOptions, scratch: Path) -> onnx_ir.Model:
    """One graph for prefill, chunked prefill and decode (or for one of them, by `options.phase`).

    Inputs input_ids [batch, seq], attention_mask [batch, past+seq], position_ids [batch, seq] (where the model uses
    them) and past.{layer}.{key,value} [batch, kv_heads, past, head_dim]; outputs logits [batch, seq, vocab] and
    present.{layer}.{key,value} [batch, kv_heads, past+seq, head_dim]. What is computed for the export, such as a baked
    ALiBi mask, is written to `scratch`, which has to outlive the model. Raises ModelError for checkpoint, class and
    consent, UsageError for options that the checkpoint's family does not have.
    """
    with quiet(), open_family(checkpoint, options) as family:
        return export_family(family, options, scratch)


def export_family(family: Family, options: ExportOptions, scratch: Path, *, small: bool = False) -> onnx_ir.Model:
    """`export_graph` for an open family; `small` traces the model of a self-check."""
    dtype = TORCH_DTYPES[options.dtype]
    model = family.build(dtype, small=small)
    checkpoint = dataclasses.replace(family.checkpoint, tensors=family.sources(model))
    check_tensors(checkpoint, model)
    ties = family.ties(model)
    shape = family.cache_shape(model)
    step = family.step(model)
    try:
        graph = trace(step, shape, options, dtype, scratch)
    except Exception as error:  # torch raises all kinds
        raise ModelError(
            f"{checkpoint.directory}: {type(model).__name__} cannot be traced: {type(error).__name__}: {error}"
        ) from error
    if graph.opset_imports.get("") != options.target_opset:
        found = graph.opset_imports.get("")
        raise ModelError(f"torch exports opset {found} where {options.target_opset} was asked for")
    apply_contract(graph, Contract(shape.layers, options.phase, family.source_root, family.constants))
    merge_tied(graph.graph, ties)
    bind_weights(graph, checkpoint, options.dtype, family.extra_weights(model, scratch))
    graph.ir_version = IR_VERSION
    family.check(graph)
    return graph
