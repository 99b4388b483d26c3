"""Tensors in files: `stored` writes an array as safetensors and gives the lazy source of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.weights.sources import safetensors_sources


@pytest.fixture
def stored(tmp_path):
    """Write an array beside another tensor, so that its bytes do not start where the data starts."""
    numbers = itertools.count()

    def write(array, name="w"):
        path = tmp_path / f"stored{next(numbers)}.safetensors"
        save_file({"a.before": np.arange(5, dtype=np.int32), name: np.asarray(array, order="C")}, path)
        return safetensors_sources(path)[name]

    return write
