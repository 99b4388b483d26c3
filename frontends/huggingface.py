"""Export a checkpoint's own, unmodified class to an ONNX graph whose weights are lazy references to its files.

The class is traced with fake weights, so memory does not grow with the model. Every tensor of the checkpoint must find
its initializer and every initializer its tensor; otherwise ModelError names those left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import onnx_ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from passopt.frontends import baichuan2
from passopt.frontends.binding import bind_weights, check_tensors
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.naming import apply_contract
from passopt.frontends.quiet import quiet
from passopt.frontends.remote_code import StockClasses, stock_classes
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.expressions import DataType, Source

TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}
IR_VERSION = 10
DEFAULT_OPSET = 21

# Unequal, and neither 0 nor 1, so that no branch of the stock code specialises on them.
_BATCH, _SEQ, _PAST = 2, 7, 3


def export_graph(
    checkpoint: Checkpoint,
    *,
    dtype: DataType = DataType.FLOAT16,
    alibi: baichuan2.Alibi = "formula",
    opset: int = DEFAULT_OPSET,
    trust_remote_code: bool,
    scratch: Path,
) -> onnx_ir.Model:
    """One graph for prefill, chunked prefill and decode, computing in `dtype`.

    Inputs input_ids [batch, seq], attention_mask [batch, past+seq], position_ids [batch, seq] (rotary family only) and
    past.{layer}.{key,value} [batch, heads, past, head_dim]; outputs logits [batch, seq, vocab] and
    present.{layer}.{key,value} [batch, heads, past+seq, head_dim]. A baked ALiBi mask is written to `scratch`, which
    has to outlive the model. Raises ModelError for checkpoint, class and consent, UsageError for `dtype` and `alibi`.
    """
    if dtype not in TORCH_DTYPES:
        raise UsageError(f"export computes in {', '.join(kind.name for kind in TORCH_DTYPES)}, not in {dtype.name}")
    if alibi not in get_args(baichuan2.Alibi):
        raise UsageError(f"alibi is one of {', '.join(get_args(baichuan2.Alibi))}, not {alibi!r}")
    with quiet(), stock_classes(checkpoint, trust_remote_code=trust_remote_code) as classes:
        model = build_model(classes, checkpoint, TORCH_DTYPES[dtype])
        baichuan2.prepare(model, alibi)
        check_tensors(checkpoint, model)
        graph = _traced(checkpoint, model, TORCH_DTYPES[dtype], opset)
        layers = len(model.model.layers)
        extra: dict[str, Source] = {}
        if baichuan2.is_alibi(model) and alibi == "baked":
            shape = baichuan2.future_mask_shape(model)
            extra[baichuan2.FUTURE_MASK] = baichuan2.write_future_mask(scratch / "alibi.safetensors", shape)
        apply_contract(graph, checkpoint, layers)
        bind_weights(graph, checkpoint, dtype, extra)
    graph.ir_version = IR_VERSION
    baichuan2.check_head(graph)
    return graph


def build_model(classes: StockClasses, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """An instance of the stock class in `dtype`: parameters without data, its computed tables real."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = classes.config.from_dict(dict(checkpoint.config))
        with init_empty_weights(include_buffers=False):
            model = classes.model(config)
    except Exception as error:  # foreign code and foreign values
        raise ModelError(
            f"{checkpoint.directory}: {classes.model.__name__} cannot be built from config.json: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False)


def _traced(checkpoint: Checkpoint, model: Any, dtype: torch.dtype, opset: int) -> onnx_ir.Model:
    step = baichuan2.Step(model)
    _fake_weights(step)
    arguments, shapes = _sample(step, dtype)
    try:
        with torch.no_grad(), baichuan2.Fp32Islands(dtype):
            program = torch.export.export(step, (), arguments, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(program, (), dynamo=True, opset_version=opset, optimize=False, verbose=False)
    except Exception as error:  # torch raises all kinds
        raise ModelError(
            f"{checkpoint.directory}: {type(model).__name__} cannot be traced: {type(error).__name__}: {error}"
        ) from error
    assert exported is not None
    graph = exported.model
    if graph.opset_imports.get("") != opset:
        raise ModelError(f"torch exports opset {graph.opset_imports.get('')} where {opset} was asked for")
    return graph


def _fake_weights(module: torch.nn.Module) -> None:
    """Give parameters and buffers on the meta device a shape and dtype on the CPU, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _sample(step: baichuan2.Step, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of one step with a cache, and which of their axes are dynamic."""
    config = step.stock.config
    free = torch.export.Dim.DYNAMIC
    cache = (_BATCH, config.num_attention_heads, _PAST, config.hidden_size // config.num_attention_heads)
    arguments = {
        "input_ids": torch.ones(_BATCH, _SEQ, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQ, dtype=torch.long),
        "past": tuple(
            (torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype)) for _ in step.stock.model.layers
        ),
    }
    shapes = {
        "input_ids": {0: free, 1: free},
        "attention_mask": {0: free, 1: free},
        "past": tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in step.stock.model.layers),
    }
    if not step.alibi:
        arguments["position_ids"] = torch.arange(_PAST, _PAST + _SEQ).repeat(_BATCH, 1)
        shapes["position_ids"] = {0: free, 1: free}
    return arguments, shapes
