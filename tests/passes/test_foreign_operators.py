"""Operators of other domains may mean anything: every pass leaves them as they are, whatever their names are."""

from __future__ import annotations

import collections
import dataclasses

import pytest

from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes.framework.catalog import catalog, pass_class

#: Calls that passes would change, fold or read if they were ONNX's own, as `operator attributes (inputs)`.
CALLS = """
    Identity (x)|Cast <to = 10> (x)|Cast <to = 1> (x)|Cast <to = 7> (s)|CastLike (x, h)|Dropout (x)|Shape (x)|Size (x)
    Constant <value_float = 1.0> ()|Constant <value_ints = [1, 2]> ()|Concat <axis = 0> (x)|Concat <axis = 0> (s, s)
    Gather <axis = 0> (w, s)|Gather (s, i)|Slice (s, i, i)|Squeeze (x)|Unsqueeze <axes = [0]> (x)|Reshape (x, s)
    Expand (x, s)|Transpose <perm = [1, 0]> (w)|Transpose (x)|MatMul (x, w)|Gemm <transB = 1> (x, w)|Add (x, x)
    Mul (x, one)|Mul (x, x)|Div (x, one)|Sub (x, zero)|Pow (x, two)|Sqrt (x)|Softmax <axis = 0> (x)|Relu (x)
    Softmax (x)|LogSoftmax (x)|ReduceMean <axes = [1]> (x)|ReduceSum <keepdims = 0> (x)|Range (i, i, i)|Where (c, x, x)
    Split <axis = 1> (x)|Pad <pads = [0, 0, 0, 0]> (x)|Clip <min = 0.0> (x)|Upsample <mode = "nearest"> (x)|Tile (x, s)
    Attention (x, x, x)|RotaryEmbedding (x, x, x)|RMSNormalization (x, w)|LayerNormalization (x, w)|Gelu (x)|Swish (x)
    QuantizeLinear (x, one, zero)|DequantizeLinear <axis = 0> (x, one)|MatMulInteger (x, w)|DynamicQuantizeLinear (x)
    RandomNormal <shape = [2]> ()|RandomNormal <shape = [2]> ()|AllReduce (x)|AllGather (x)|AllGather <axis = 0> (x)
    ConstantOfShape (s)|NonZero (x)|Equal (s, s)|Loop (x)|If (c)|Scan (x)|GroupQueryAttention (x)|AlibiAttention (x)
"""
LISTED = [call.strip() for line in CALLS.split("\n") for call in line.split("|") if call.strip()]
#: Passes that cannot go on behind a value whose dtype nobody knows, that split every operator, or that need to know all
#: operators of a decoder or statistics of it, and say so.
REFUSES = {"cast", "quantize-cache", "shard", "rotate-residual", "smooth"}
#: This one knows what some of them mean.
KNOWS = {("decompose-contrib", "com.microsoft")}


def graph_of(domain, opset=18):
    """Every call twice, and a standard operator behind each, whose result the graph gives."""
    lines, outputs = [], []
    for index, call in enumerate(LISTED * 2):
        lines.append(f"a{index} = {domain}.{call}")
        lines.append(f"r{index} = Identity (a{index})")
        outputs.append(f"float[?] r{index}")
    return parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "{domain}" : 1]>
        g (float[2,3] x, float[3] h, int64[2] s, bool[2,3] c) => ({", ".join(outputs)})
        <float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, float one = {{1}}, float zero = {{0}}, float two = {{2}},
         int64[1] i = {{0}}> {{ {" ".join(lines)} }}"""
    )


def calls(model, domain):
    """How often each call of the domain stands in the graph, with its inputs by name and its attributes."""
    found = collections.Counter()
    for node in model.graph:
        if node.domain == domain:
            inputs = [value.name if value is not None else "" for value in node.inputs]
            found[node.op_type, tuple(inputs), str(sorted(node.attributes.items()))] += 1
    return found


def options(name):
    """The options that make a pass do as much as it can."""
    fields = {field.name: field for field in dataclasses.fields(pass_class(name))}
    return {key: True for key in ("embedding", "head") if key in fields}


@pytest.mark.parametrize("domain", ["own", "com.acme.ops", "com.microsoft"])
@pytest.mark.parametrize("name", sorted(set(catalog()) - REFUSES))
def test_every_pass_leaves_them(name, domain):
    if (name, domain) in KNOWS:
        pytest.skip("decomposes them")
    model = graph_of(domain, opset=21 if name == "quantize-groups" else 18)
    before = calls(model, domain)
    assert sum(before.values()) == 2 * len(LISTED)
    pass_class(name)(**options(name)).run(model)
    verify_model(model)
    assert calls(model, domain) == before
    assert print_model(model, fold=False)


def test_their_results_have_no_dtype():
    model = graph_of("com.acme.ops")
    pass_class("dead-code")().run(model)
    assert all(value.dtype is None for node in model.graph if node.domain for value in node.outputs)
