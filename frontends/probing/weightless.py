"""Give weights a shape and a dtype but no bytes, so that tracing costs no memory, however large the model is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

#: The integers below this one are distinct in bf16.
_EXACT_INTEGERS = 256


def fake_weights(module: torch.nn.Module, mode: FakeTensorMode | None = None) -> None:
    """Put parameters and buffers of the meta device on the CPU without giving them memory, for torch.export."""
    with mode or FakeTensorMode(allow_non_fake_inputs=True):
        _replace(module, torch.empty)


def zero_weights(module: torch.nn.Module) -> None:
    """Fill parameters, and buffers without data, with zeros whose pages take no memory until they are written.

    A tracer that computes needs them. Each parameter starts with a number of its own, because the torchscript exporter
    merges weights of equal values.
    """
    _replace(module, _unwritten_zeros)
    for number, weight in enumerate(module.parameters()):
        start = weight.data.view(-1)[:2]
        start.copy_(torch.tensor(divmod(number, _EXACT_INTEGERS))[: len(start)])


def _unwritten_zeros(shape: torch.Size, *, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that the system provides on demand through numpy, while torch.zeros would write them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _replace(module: torch.nn.Module, make: Callable[..., torch.Tensor]) -> None:
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # Keyed by identity, so that tied weights stay one.
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None:
                continue
            if weight not in made:
                made[weight] = torch.nn.Parameter(make(weight.shape, dtype=weight.dtype), requires_grad=False)
            part._parameters[name] = made[weight]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = make(buffer.shape, dtype=buffer.dtype)
