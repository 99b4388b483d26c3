"""Run a model with lazy weights in stock onnxruntime on the CPU.

Results are exact: int8 weights are multiplied in fp32, and onnxruntime is kept from quantising activations itself.
"""

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

#: The log level "fatal". At lower levels onnxruntime also logs warnings about its own rewrites, and every error that
#: it raises anyway.
_FATAL_ONLY = 4

#: Words in the names of onnxruntime's types that numpy does not hold.
_NARROW = ("float8", "float4", "int4", "int2", "float6")


class Session:
    """One model, loaded into onnxruntime.

    `inputs` maps the name of each input to its type, and `outputs` lists the names of the outputs.
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
        """Load `model`, by way of a temporary folder that is deleted as soon as onnxruntime has loaded it.

        Args:
            model: The model; its lazy weights are evaluated and written to the temporary folder.
            threads: The number of threads that one operator may use.
            fold_qdq: If true, all int8 weights are dequantised once, at load. By default they are multiplied with fp32
                activations as they are; onnxruntime's own default would quantise the activations too, with a relative
                error of 1e-2.
            optimize: If false, each node runs as it stands in the graph, without onnxruntime's own rewrites.
            scratch: The folder in which the temporary folder is made; by default the system's.

        Raises:
            ModelError: If onnxruntime refuses the model.
        """
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = threads
        # The arena doubles whenever it grows, and memory patterns keep all of it: that would take several times the
        # size of a large weight.
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

    def leave_out_narrow(self) -> None:
        """Drop the outputs of types that numpy does not hold: those of less than 8 bits, and 8-bit floats."""
        types = {value.name: value.type for value in self._session.get_outputs()}
        self.outputs = [name for name in self.outputs if not any(word in types[name] for word in _NARROW)]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once and return all outputs by name.

        `feeds` maps the names of inputs to values; names that are not inputs of the model are ignored. Raises
        ModelError if an input has no value or if the run fails.
        """
        missing = self.inputs.keys() - feeds.keys()
        if missing:
            raise ModelError(f"no value for the inputs {', '.join(sorted(missing))}")
        try:
            values = self._session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        except Exception as error:
            raise ModelError(f"onnxruntime fails on the model: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def runtime_version() -> str:
    """Return the name and the version of the runtime: another version may give other last digits."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
