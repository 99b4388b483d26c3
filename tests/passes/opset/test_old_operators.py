"""legalize over operators of images and of opsets below 11: attributes that became inputs, defaults that changed."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.errors import PassError
from passopt.ir.serialization.text import parse_model
from passopt.passes.opset.legalize import Legalize
from passopt.testing.checking import check


def converted(opset, target, body, **settings):
    """(operators, model) after every check of `check`, numbers included."""
    model, result = check(Legalize(opset=target), f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}', **settings)
    assert result.modified
    return [node.op_type for node in model.graph], model


def refused(opset, target, body, message):
    with pytest.raises(PassError, match=message):
        Legalize(opset=target).run(parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}'))


X = "g (float[2,3,5] x) => (float[] y)"
IMAGE = "g (float[1,2,6,8] x) => (float[] y)"


@pytest.mark.parametrize("target", [11, 13, 18, 23, 26])
@pytest.mark.parametrize("opset", [7, 9, 10])
def test_a_network_of_images_reaches_every_opset(opset, target):
    scales = ", scales = [1.0, 1.0, 2.0, 1.5]> (q)" if opset < 9 else "> (q, up)"
    up = "Upsample" if opset < 10 else "Resize"
    spatial = "<spatial = 1>" if opset < 9 else ""
    body = f"""{IMAGE} <float[3,2,3,3] w = random, float[3] b = {{0.5, -1, 2}}, float[3] v = {{1, 2, 4}},
        float[3,4] h = random, float[4] up = {{1, 1, 2, 1.5}}> {{
        c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        n = BatchNormalization {spatial} (c, b, b, b, v)
        r = Clip <min = 0.0, max = 6.0> (n)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        q = AveragePool <kernel_shape = [2, 3], auto_pad = "SAME_UPPER"> (p)
        u = {up} <mode = "nearest"{scales}
        t = Transpose <perm = [0, 1, 3, 2]> (u)
        g0 = GlobalAveragePool (t)
        f = Flatten (g0)
        d = Dropout <ratio = 0.4> (f)
        m = Gemm (d, h, k)
        y = Softmax (m)
    }}""".replace("float[4] up", "float[4] k = {1, 2, 3, 4}, float[4] up")
    body = body.replace(
        "float[3,2,3,3] w = random", "float[3,2,3,3] w = {" + ",".join(f"{i % 7 - 3}" for i in range(54)) + "}"
    )
    if opset < 9:
        body = body.replace(", float[4] up = {1, 1, 2, 1.5}", "")
    _, model = converted(opset, target, body)
    assert not any(node.op_type == "Upsample" for node in model.graph)


@pytest.mark.parametrize(("mode", "scales", "nearest"), [
    ("nearest", "1, 1, 2.5, 1.5", "floor"), ("nearest", "1, 1, 0.5, 0.6", "ceil"), ("nearest", "1, 2, 1, 1", "floor"),
    ("linear", "1, 1, 0.6, 2", None), ("linear", "1, 1, 2.5, 1.5", None),
])  # fmt: skip
def test_resize_places_its_samples_as_before(mode, scales, nearest):
    body = f'{IMAGE} <float[4] s = {{{scales}}}> {{ y = Resize <mode = "{mode}"> (x, s) }}'
    for target in (11, 13, 19, 26):
        _, model = converted(10, target, body)
        found = model.graph[0].attributes
        assert found["coordinate_transformation_mode"].as_string() == "asymmetric"
        assert (found["nearest_mode"].as_string() if "nearest_mode" in found else None) == nearest


def test_declines_a_nearest_resize_of_two_minds():
    body = f"{IMAGE} <float[4] s = {{1, 1, 0.5, 2}}> {{ y = Resize (x, s) }}"
    refused(10, 13, body, "from opset 10 to 11: it rounds down along some axes and up along others")
    body = "g (float[1,2,6,8] x, float[4] s) => (float[] y) { y = Resize (x, s) }"
    refused(
        10, 13, body, "its scales are not constant, so it is unknown whether it rounds up or down. Change that node"
    )
    converted(
        10, 13, body.replace("Resize", 'Resize <mode = "linear">'), feeds={"s": np.array([1, 1, 2, 0.5], np.float32)}
    )


def test_an_upsample_by_computed_scales_only_grows():
    body = "g (float[1,2,6,8] x, float[4] s) => (float[] y) { y = Upsample (x, s) }"
    converted(9, 13, body, feeds={"s": np.array([1, 1, 2.5, 2], np.float32)})


def test_resize_by_sizes_leaves_the_empty_scales_out():
    body = f"{IMAGE} <float[0] none = {{}}, int64[4] n = {{1, 2, 9, 5}}> {{ y = Resize (x, none, none, n) }}"
    _, model = converted(11, 18, body)
    assert model.graph[0].inputs[2] is None
    refused(
        11, 18, body.replace("Resize", 'Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn">'), "no longer"
    )


@pytest.mark.parametrize("pads", ["", ", pads = [0, 1, 1, 0]", ", pads = [1, 0, 1, 0], ceil_mode = 1"])
@pytest.mark.parametrize("included", [0, 1])
def test_average_pooling(pads, included):
    attributes = f"kernel_shape = [3, 2], strides = [2, 3], count_include_pad = {included}{pads}"
    body = f"{IMAGE} {{ y = AveragePool <{attributes}> (x) }}"
    for target in (18, 19, 22):
        converted(11, target, body)


@pytest.mark.parametrize("name", [
    "LpPool <kernel_shape = [2, 3], p = 3>", "MaxPool <kernel_shape = [3, 3], ceil_mode = 1>",
    "GlobalMaxPool", "GlobalLpPool",
])  # fmt: skip
def test_other_pooling(name):
    converted(11, 21, f"{IMAGE} {{ y = {name} (x) }}")  # onnxruntime has no GlobalLpPool of opset 22.


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_grid_sample_up_and_down(mode):
    head = "g (float[1,2,6,8] x, float[1,3,4,2] i) => (float[] y)"
    _, model = converted(16, 20, f'{head} {{ y = GridSample <mode = "{mode}", padding_mode = "border"> (x, i) }}')
    newer = model.graph[0].attributes["mode"].as_string()
    assert newer == {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    _, model = converted(20, 18, f'{head} {{ y = GridSample <mode = "{newer}", padding_mode = "border"> (x, i) }}')
    assert model.graph[0].attributes["mode"].as_string() == mode


def test_grid_sample_keeps_its_default():
    head = "g (float[1,2,6,8] x, float[1,3,4,2] i) => (float[] y)"
    for opset, target in ((16, 20), (20, 18)):
        converted(opset, target, f"{head} {{ y = GridSample (x, i) }}")


def test_declines_grid_samples_of_volumes_downwards():
    body = "g (float[1,2,4,6,8] x, float[1,2,3,4,3] i) => (float[] y) { y = GridSample (x, i) }"
    refused(20, 18, body, r"from opset 20 to 19: it samples images \[n, c, h, w\] only there")


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode):
    body = f"""g (float[1,2,6,8] x) => (float[] y)
    <float[2,4] r = {{0, 0, 5, 5, 1, 2, 7, 6}}, int64[2] b = {{0, 0}}> {{
        y = RoiAlign <output_height = 3, output_width = 2, spatial_scale = 0.7, mode = "{mode}"> (x, r, b) }}"""
    converted(10, 21, body)


@pytest.mark.parametrize("attributes", ["", "<axis = 2>", "<axis = 1, onesided = 1>", "<axis = -3>"])
def test_dft_up(attributes):
    converted(17, 20, f"g (float[2,3,5,1] x) => (float[] y) {{ y = DFT {attributes} (x) }}")


@pytest.mark.parametrize("operands", ["x", 'x, "", a', "x, n", "x, n, a"])
def test_dft_down(operands):
    body = f"g (float[2,3,5,1] x) => (float[] y) <int64 n = {{4}}, int64 a = {{1}}> {{ y = DFT ({operands}) }}"
    converted(20, 18, body)


def test_declines_a_dft_along_a_computed_axis():
    body = 'g (float[2,3,5,1] x, int64 a) => (float[] y) { y = DFT (x, "", a) }'
    refused(20, 18, body, "its axis a is not constant")


@pytest.mark.parametrize("body", [
    "{ y = Slice <starts = [1, 0], ends = [3, 9], axes = [1, 2]> (x) }",
    "{ y = Slice <starts = [0, 1], ends = [-1, 2]> (x) }",
    "{ y, i = TopK <k = 2, axis = 1> (x) }",
    "{ y = Clip (x) }",
    "{ y = Clip <min = -0.5> (x) }",
    "{ y = Clip <max = 0.25> (x) }",
    '{ y = Pad <pads = [0, 1, 2, 1, 0, 0], value = 2.5> (x) }',
    '{ y = Pad <pads = [0, 1, 2, 1, 0, 0], mode = "reflect"> (x) }',
    "<int64[1,1,2] i = {0, 2}, float[1,1,2] u = {7, 8}> { y = Scatter <axis = 1> (x, i, u) }",
    "{ d = Dropout <ratio = 0.3> (x) y = Neg(d) }",
    "<int64[2] i = {2, 0}, int64 n = {3}, float[2] v = {0.5, 2}> { y = OneHot (i, n, v) }",
    "{ s = Softmax <axis = 2> (x) l = LogSoftmax <axis = 1> (s) y = Hardmax <axis = 0> (l) }",
    "{ a = ArgMax <axis = 1> (x) y = Cast <to = 1> (a) }",
    "{ a, b = Split <axis = 1, split = [1, 2]> (x) y = Squeeze <axes = [1]> (a) }",
    "{ n, z = Dropout (x) y = ReduceSum <axes = [0, 2], keepdims = 0> (n) }",
])  # fmt: skip
@pytest.mark.parametrize("target", [11, 18, 26])
def test_operators_of_opset_9(body, target):
    converted(9, target, f"{X} {body}")


def test_a_clip_bounds_infinities_as_before():
    x = np.array([[np.inf, -np.inf], [3, -4]], np.float32)
    for attributes in ("", "<min = -1.0>", "<max = 1.0>"):
        body = f"g (float[2,2] x) => (float[2,2] y) {{ y = Clip {attributes} (x) }}"
        converted(9, 12, body, feeds={"x": x})


def test_declines_the_mask_of_a_dropout():
    body = "g (float[2,3] x) => (float[2,3] y, bool[2,3] m) { y, m = Dropout (x) }"
    refused(10, 13, body, "Dropout 'Dropout_0' cannot go from opset 11 to 12: its mask m is used, and is another one")
    body = "g (float[2,3] x) => (float[2,3] y, float[2,3] m) { y, m = Dropout (x) }"
    refused(9, 11, body, "from opset 9 to 10: its mask m is used")


def test_declines_statistics_for_every_place():
    body = """g (float[2,3] x, float[3] a) => (float[2,3] y) {
        y = BatchNormalization <spatial = 0> (x, a, a, a, a) }"""
    refused(8, 13, body, "its statistics are not per channel")


def test_declines_parameters_of_functions_that_no_constant_takes():
    text = """<ir_version: 8, opset_import: ["" : 10, "local" : 1]>
    g (float[2,3] x) => (float[2,3] y) { y = local.bounded <low = -0.5> (x) }
    <domain: "local", opset_import: ["" : 10]>
    bounded <low> (x) => (y) { y = Clip <min : float = @low> (x) }"""
    with pytest.raises(PassError, match="the dtype of x is unknown, and a bound needs the same. Run inline-functions"):
        Legalize(opset=13).run(parse_model(text))
    text = text.replace("low = -0.5", "low = 1").replace(
        "Clip <min : float = @low> (x)", "t, i = TopK <k : int = @low> (x)"
    )
    text = text.replace("y = t, i", "y, i").replace('"" : 10', '"" : 9')
    with pytest.raises(PassError, match="its attribute k is a parameter of the function that it stands in. Run inline"):
        Legalize(opset=13).run(parse_model(text))


@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
def test_declines_windows_in_the_padding(kind):
    """ONNX counted them before opset 22; onnxruntime never did."""
    attributes = "kernel_shape = [2, 2], strides = [3, 1], ceil_mode = 1"
    text = f"g (float[1,2,{{}},5] x) => (float[] y) {{{{ y = {kind} <{attributes}{{}}> (x) }}}}"
    for opset, target in ((18, 22), (22, 18)):
        converted(opset, target, text.format(5, ""))
        converted(opset, target, text.format("h", "").replace("[3, 1]", "[2, 1]"))
        refused(
            opset, target, text.format(5, ", pads = [0, 0, 1, 0]"), "the last window along axis 2 starts in the padding"
        )
        refused(opset, target, text.format("h", ""), "a window along axis 2 may start in the padding")
