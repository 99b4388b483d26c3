"""Name the number types of models: the sets that passes ask about, and their short names on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import onnx_ir

DataType = onnx_ir.DataType
#: The short names of number types, on the command line and in library.json.
DtypeName: TypeAlias = Literal["fp32", "fp16", "bf16"]

#: The types in which a language model computes and keeps its weights.
MODEL_FLOATS = frozenset({DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16})
#: The types that a weight may have before it is quantised: fp64 too, which a model has on purpose.
FLOATS = MODEL_FLOATS | {DataType.DOUBLE}
#: The types by their short names.
DTYPES: Mapping[DtypeName, DataType] = {"fp32": DataType.FLOAT, "fp16": DataType.FLOAT16, "bf16": DataType.BFLOAT16}
#: From this opset on, QuantizeLinear and DequantizeLinear take scales of 16 bits.
OPSET_OF_HALF_SCALES = 19
#: From this opset on, they take one scale per channel.
OPSET_OF_SCALES_PER_CHANNEL = 13
#: From this opset on, they take codes of 4 bits, and scales of groups.
OPSET_OF_GROUPS = 21
#: What exporters write for "to the end" in a Slice.
SLICE_END = 2**63 - 1
