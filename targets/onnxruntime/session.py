"""Run a model whose weights are lazy in stock onnxruntime on the CPU, exactly: int8 weights are multiplied in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import MODEL_NAME, save_materialized

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Below "fatal", onnxruntime warns about its own rewrites and repeats the errors that it raises.
_FATAL_ONLY = 4


class Session:
    """One model, loaded. The weights pass through a temporary folder that is gone once they are loaded.

    Activations of int8 products stay in fp32, which onnxruntime would quantise too (relative error 1e-2); `fold_qdq`
    dequantises all weights once instead. Without `optimize`, each node runs as it stands. `scratch` is where the
    temporary folder goes. Raises ModelError if onnxruntime refuses it.
    """

    def __init__(
        self,
        model: onnx_ir.Model,
        *,
        threads: int = 2,
        fold_qdq: bool = False,
        optimize: bool = True,
        scratch: Path | None = None,
    ) -> None:
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = threads
        # The arena doubles each time that it grows, and with patterns keeps all: several times a large weight.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if fold_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        with tempfile.TemporaryDirectory(prefix="passopt-session-", dir=scratch) as folder:
            save_materialized(model, Path(folder))
            try:
                self._session: Any = onnxruntime.InferenceSession(
                    str(Path(folder) / MODEL_NAME), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's exceptions have no common base of their own
                raise ModelError(f"onnxruntime refuses the model: {_first_line(error)}") from error
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. `feeds` may hold more than the model's inputs. Raises ModelError if the run fails."""
        missing = self.inputs.keys() - feeds.keys()
        if missing:
            raise ModelError(f"no value for the inputs {', '.join(sorted(missing))}")
        try:
            values = self._session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        except Exception as error:
            raise ModelError(f"onnxruntime fails on the model: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
