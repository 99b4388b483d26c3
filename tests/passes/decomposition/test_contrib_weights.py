"""decompose-contrib on weights of few bits: the bytes stay those of the file, and the numbers those of the kernel."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from passopt.ir.serialization.model_files import load_model, save_materialized
from passopt.ir.weights.expressions import Source
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib
from passopt.testing.checking import check

RNG = np.random.default_rng(13)


def model_of(node, inputs, output, initializers, opset=21):
    graph = helper.make_graph([node], "g", inputs, [output], initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def declared(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def matmul_nbits(*, bits=4, rows=6, columns=64, block=32, zeros=None, more=(), flat=True, kind=np.float32, **extra):
    """A product with a weight [rows, columns] of few bits; `zeros` is None, "codes" or "floats"."""
    blocks = -(-columns // block)
    shape = [rows * blocks] if flat else [rows, blocks]
    data = [
        numpy_helper.from_array(RNG.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8), "w"),
        numpy_helper.from_array(RNG.uniform(0.01, 0.1, shape).astype(kind), "s"),
    ]
    inputs = ["x", "w", "s"]
    if zeros == "codes":
        points = RNG.integers(0, 256, rows * -(-blocks * bits // 8)).astype(np.uint8)
        data.append(numpy_helper.from_array(points, "z"))
    if zeros == "floats":
        data.append(numpy_helper.from_array(RNG.uniform(6, 9, rows * blocks).astype(kind), "z"))
    inputs += ["z"] if zeros else []
    if "g_idx" in more:
        data.append(numpy_helper.from_array(np.arange(columns, dtype=np.int32) // block, "g"))
        inputs += [""] * (4 - len(inputs)) + ["g"]
    if "bias" in more:
        data.append(numpy_helper.from_array(RNG.standard_normal(rows).astype(kind), "b"))
        inputs += [""] * (5 - len(inputs)) + ["b"]
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes, **extra)
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return model_of(node, [declared("x", ["b", 3, columns], number)], declared("y", ["b", 3, rows], number), data)


def decomposed(proto, tmp_path, tolerance=1e-5, matches=1, **options):
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, **options)
    model, result = check(DecomposeContrib(), load_model(path), matches=matches, tolerance=tolerance)
    return model, result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [None, "codes"])
@pytest.mark.parametrize("more", [(), ("bias",)])
@pytest.mark.parametrize("columns", [64, 96, 50])
def test_matmul_nbits(bits, zeros, more, columns, tmp_path):
    if zeros and bits == 4 and columns == 96:
        pytest.skip("three zero points of a row fill up two bytes: declined below")
    model, _ = decomposed(matmul_nbits(bits=bits, zeros=zeros, more=more, columns=columns), tmp_path)
    kinds = {value.dtype.name for value in model.graph.initializers.values()}
    assert f"UINT{bits}" in kinds


def test_scales_may_have_two_axes(tmp_path):
    decomposed(matmul_nbits(flat=False), tmp_path)


def test_half_precision(tmp_path):
    decomposed(matmul_nbits(kind=np.float16), tmp_path, tolerance=3e-3)


def test_the_bytes_of_the_file_are_read_as_codes(tmp_path):
    """The weight of the result is the weight of the file under another dtype; nothing is loaded or repacked."""
    proto = matmul_nbits(rows=40, columns=128, zeros="codes")
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    model, _ = decomposed(proto, tmp_path, **options)
    codes = next(v.const_value for v in model.graph.initializers.values() if list(v.shape) == [40, 128])
    assert isinstance(codes, LazyWeight)
    assert isinstance(codes.expression, Source)
    out = tmp_path / "out"
    out.mkdir()
    save_materialized(model, out)
    written = {item.name: item for item in onnx.load(out / "model.onnx").graph.initializer}
    raw = next(item.raw_data for item in written.values() if list(item.dims) == [40, 128])
    assert raw == (tmp_path / "w.bin").read_bytes()[: 40 * 64]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"zeros": "codes", "columns": 96}, "fills up the bytes of a row of 3 zero points"),
        ({"zeros": "floats"}, "holds zero points in FLOAT"),
        ({"more": ("g_idx",)}, "orders its channels by g (g_idx)"),
        ({"bits": 2}, "has codes of 2 bits, expected 4 or 8"),
    ],
)
def test_declines_what_dequantize_linear_lacks(options, reason, tmp_path):
    _, result = decomposed(matmul_nbits(**options), tmp_path, matches=0)
    assert [key for key in result.declines if reason in key], result.declines


def test_declines_before_blocks_were_standard(tmp_path):
    proto = matmul_nbits()
    proto.opset_import[0].version = 18
    _, result = decomposed(proto, tmp_path, matches=0)
    assert list(result.declines) == ["MatMulNBits needs opset 21, this model has 18; run legalize first"]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint8 of 8 bits", "UINT4", "INT4"])
def test_gather_block_quantized(zeros, kind, tmp_path):
    rows, width, block = 9, 64, 16
    bits = 8 if "8 bits" in kind else 4
    count = width * bits // 8
    points = rows * (width // block)
    if kind.startswith("uint8"):
        data = numpy_helper.from_array(RNG.integers(0, 256, (rows, count)).astype(np.uint8), "w")
        zero = numpy_helper.from_array(RNG.integers(0, 256, (rows, width // block * bits // 8)).astype(np.uint8), "z")
    else:
        number = getattr(TensorProto, kind)
        data = TensorProto(name="w", data_type=number, dims=[rows, width], raw_data=RNG.bytes(rows * count))
        zero = TensorProto(name="z", data_type=number, dims=[rows, width // block], raw_data=RNG.bytes(points // 2))
    scales = numpy_helper.from_array(RNG.uniform(0.01, 0.1, (rows, width // block)).astype(np.float32), "s")
    inputs = ["w", "i", "s", *(["z"] if zeros else [])]
    node = helper.make_node(
        "GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", bits=bits, block_size=block, quantize_axis=1
    )
    initializers = [data, scales, *([zero] if zeros else [])]
    proto = model_of(node, [declared("i", ["b", 3], TensorProto.INT64)], declared("y", ["b", 3, width]), initializers)
    decomposed(proto, tmp_path)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("axis", ["", "<axis = 1>"])
def test_linear_quantisation(kind, axis):
    size = "[3]" if axis else ""
    text = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n,3,5] x, float{size} s, {kind}{size} z) => ({kind}[n,3,5] q, float[n,3,5] y) {{
        q = com.microsoft.QuantizeLinear {axis} (x, s, z)
        y = com.microsoft.DequantizeLinear {axis} (q, s, z)
    }}"""
    feeds = {"s": np.array([0.05, 0.03, 0.1] if axis else 0.05, np.float32)}
    check(DecomposeContrib(), text, matches=2, feeds=feeds)


def test_declines_codes_of_sixteen_bits():
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n,3] x, float s, uint16 z) => (uint16[n,3] q) { q = com.microsoft.QuantizeLinear(x, s, z) }"""
    _, result = check(DecomposeContrib(), text, matches=0)
    assert list(result.declines) == ["QuantizeLinear 'QuantizeLinear_0' has codes of UINT16, expected 8 bits"]
