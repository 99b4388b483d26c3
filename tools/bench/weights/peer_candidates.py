"""Run one tool of `weights/peers.py` on a model whose weights lie in a file of their own.

    python tools/bench/weights/peer_candidates.py CANDIDATE MODEL OUTPUT-FOLDER

Each tool saves its result with the weights beside the graph, as every model beyond 2 GB must.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def passopt(model: Path, output: Path) -> None:
    """Quantise with passopt: int8 codes and a scale per output channel."""
    from passopt.cli import main

    code = main(["run", str(model), "--passes", "quantize-weights,dead-code", "-o", str(output / "model")])
    if code:
        raise SystemExit(code)


def quantize_dynamic(model: Path, output: Path) -> None:
    """Quantise the MatMuls with onnxruntime's `quantize_dynamic`, per channel."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": True}
    quantize(model, output / "model.onnx", op_types_to_quantize=["MatMul"], **options)


def quantize_static(model: Path, output: Path) -> None:
    """Quantise the MatMuls with onnxruntime's `quantize_static`, per channel, calibrated on one prompt."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):
        """Give one prompt of 16 tokens to the calibration."""

        def __init__(self) -> None:
            self._feeds = iter([{"input_ids": np.arange(16)[None], "mask": np.zeros((1, 1, 16, 16), np.float32)}])

        def get_next(self) -> dict[str, Any]:
            return next(self._feeds, None)  # type: ignore[return-value]

    options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": True}
    form = {"quant_format": QuantFormat.QDQ, "op_types_to_quantize": ["MatMul"]}
    quantize(model, output / "model.onnx", Reader(), **form, **options)


def matmul_nbits(model: Path, output: Path) -> None:
    """Quantise to onnxruntime's MatMulNBits with 8 bits in blocks of 128."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output / "model.onnx"), True)


def onnxsim(model: Path, output: Path) -> None:
    """Simplify the graph with onnxsim, and save it."""
    import onnx
    import onnxsim as tool

    simplified, _ = tool.simplify(str(model))
    onnx.save(simplified, output / "model.onnx", save_as_external_data=True, location="weights")


def onnxslim(model: Path, output: Path) -> None:
    """Simplify the graph with onnxslim, which saves it."""
    import onnxslim as tool

    tool.slim(str(model), str(output / "model.onnx"), save_as_external_data=True)


def neural_compressor(model: Path, output: Path) -> None:
    """Quantise weights only, rounded to nearest, with onnx-neural-compressor as its documentation shows it."""
    import onnx
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as tool

    options = {"n_bits": 8, "block_size": 128, "is_symmetric": True, "algo_config": tool.RTNWeightOnlyQuantConfig()}
    quantizer = tool.MatMulNBitsQuantizer(str(model), **options)
    quantizer.process()
    found = quantizer.model
    found = found if isinstance(found, onnx.ModelProto) else found.model
    onnx.save(found, output / "model.onnx", save_as_external_data=True, location="weights")


CANDIDATES: dict[str, Callable[[Path, Path], None]] = {
    "passopt": passopt,
    "onnxruntime quantize_dynamic": quantize_dynamic,
    "onnxruntime quantize_static": quantize_static,
    "onnxruntime MatMulNBits": matmul_nbits,
    "onnx-neural-compressor RTN": neural_compressor,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
}


if __name__ == "__main__":
    CANDIDATES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
