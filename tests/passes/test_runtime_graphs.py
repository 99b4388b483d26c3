"""Graphs that onnxruntime optimised and saved: they load, and every pass and pipeline keeps their numbers."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest

from passopt.ir.graph.verifier import verify_model
from passopt.ir.relative_error import operator_error
from passopt.ir.serialization.model_files import MODEL_NAME, load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import random_feeds, read_model
from passopt.testing.decoders import tiny_decoder

NORM = """
    {o}_m = ReduceMean<axes = [-1]>({x})
    {o}_c = Sub({x}, {o}_m)
    {o}_s = Pow({o}_c, two)
    {o}_v = ReduceMean<axes = [-1]>({o}_s)
    {o}_e = Add({o}_v, eps)
    {o}_r = Sqrt({o}_e)
    {o}_d = Div({o}_c, {o}_r)
    {o}_g = Mul({o}_d, {o}_w)
    {o} = Add({o}_g, {o}_b)"""
ATTENTION = """
    {o}_q0 = MatMul({x}, {o}_wq) {o}_q1 = Add({o}_q0, {o}_bq) {o}_q2 = Reshape({o}_q1, heads)
    {o}_q = Transpose<perm=[0,2,1,3]>({o}_q2)
    {o}_k0 = MatMul({x}, {o}_wk) {o}_k1 = Add({o}_k0, {o}_bk) {o}_k2 = Reshape({o}_k1, heads)
    {o}_k = Transpose<perm=[0,2,3,1]>({o}_k2)
    {o}_v0 = MatMul({x}, {o}_wv) {o}_v1 = Add({o}_v0, {o}_bv) {o}_v2 = Reshape({o}_v1, heads)
    {o}_v = Transpose<perm=[0,2,1,3]>({o}_v2)
    {o}_s0 = MatMul({o}_q, {o}_k) {o}_s1 = Div({o}_s0, root) {o}_s2 = Add({o}_s1, hidden)
    {o}_p = Softmax<axis = -1>({o}_s2)
    {o}_y0 = MatMul({o}_p, {o}_v) {o}_y1 = Transpose<perm=[0,2,1,3]>({o}_y0) {o}_y2 = Reshape({o}_y1, joined)
    {o}_y3 = MatMul({o}_y2, {o}_wo) {o} = Add({o}_y3, {o}_bo)"""
MLP = """
    {o}_h0 = MatMul({x}, {o}_up) {o}_h1 = Add({o}_h0, {o}_c)
    {o}_t0 = Div({o}_h1, root2) {o}_t1 = Erf({o}_t0) {o}_t2 = Add({o}_t1, one) {o}_t3 = Mul({o}_h1, {o}_t2)
    {o}_t4 = Mul({o}_t3, half) {o}_y = MatMul({o}_t4, {o}_down) {o} = Add({o}_y, {o}_d)"""
HIDDEN, WIDE = 12, 20


def encoder(opset=17):
    """A BERT-like encoder of two layers, in primitive operators."""
    lines = [
        "words = Gather(table, input_ids)",
        "kinds = Gather(segments, token_type_ids)",
        "start = Add(words, kinds)",
        "m0 = Unsqueeze(attention_mask, axis1) m1 = Unsqueeze(m0, axis2) wide = Cast<to = 1>(m1)",
        "m2 = Sub(one, wide) hidden = Mul(m2, most)",
        NORM.format(x="start", o="n0"),
    ]
    x = "n0"
    for layer in range(2):
        parts = [f"a{layer}", f"r{layer}", f"n{layer}a", f"f{layer}", f"s{layer}", f"n{layer}f"]
        lines.append(ATTENTION.format(x=x, o=parts[0]) + f"\n{parts[1]} = Add({parts[0]}, {x})")
        lines.append(NORM.format(x=parts[1], o=parts[2]) + MLP.format(x=parts[2], o=parts[3]))
        lines.append(f"{parts[4]} = Add({parts[3]}, {parts[2]})" + NORM.format(x=parts[4], o=parts[5]))
        x = parts[5]
    body = "\n".join(lines).replace(f"\n    {x} = ", "\n    y = ")
    weights = [f"float[9,{HIDDEN}] table = random", f"float[2,{HIDDEN}] segments = random"]
    for name in dict.fromkeys(word for word in body.replace("(", " ").replace(",", " ").replace(")", " ").split()):
        stem, _, end = name.rpartition("_")
        if stem and end in {"w", "b", "bq", "bk", "bv", "bo", "d"} and (end != "b" or stem.startswith("n")):
            if end == "d" and stem.startswith("n"):
                continue
            weights.append(f"float[{HIDDEN}] {name} = random")
        if stem and end in {"wq", "wk", "wv", "wo"}:
            weights.append(f"float[{HIDDEN},{HIDDEN}] {name} = random")
        if stem.startswith("f") and end in {"up", "down", "c"}:
            shape = {"up": f"{HIDDEN},{WIDE}", "down": f"{WIDE},{HIDDEN}", "c": f"{WIDE}"}[end]
            weights.append(f"float[{shape}] {name} = random")
    numbers = "float two = {2}, float eps = {1e-5}, float one = {1}, float half = {0.5}, float root = {2}, "
    numbers += "float root2 = {1.4142135}, float most = {-10000}, int64[1] axis1 = {1}, int64[1] axis2 = {2}, "
    numbers += f"int64[4] heads = {{0, 0, 3, 4}}, int64[3] joined = {{0, 0, {HIDDEN}}}"
    return read_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        bert (int64[batch,seq] input_ids, int64[batch,seq] attention_mask, int64[batch,seq] token_type_ids)
        => (float[batch,seq,{HIDDEN}] y) <{numbers}, {", ".join(weights)}> {{ {body} }}"""
    )


MODELS = {"encoder": encoder, "encoder at 13": functools.partial(encoder, 13), "decoder": tiny_decoder}
LEVELS = ("EXTENDED", *(pytest.param(level, marks=pytest.mark.slow) for level in ("BASIC", "ALL")))
PIPELINES = [
    "cse,dead-code",
    "fold-constants,canonicalize",
    "legalize,fold-constants,canonicalize,cse",
    "decompose-contrib",
    "legalize,decompose-contrib,canonicalize,cse,dead-code",
    "decompose-contrib,legalize,decompose-activations",
    "simplify",
]
LOSSY = {"cast{dtype=fp16}": 2e-2, "decompose-contrib,cast{dtype=fp16}": 2e-2, "int8": 8e-2}


def fused_by_its_tool(original, plain, *, apart):
    """The file that onnxruntime's tool for transformers writes, with an Attention or MultiHeadAttention per layer."""
    tool = pytest.importorskip("onnxruntime.transformers.optimizer")
    settings = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
    settings.use_multi_head_attention = apart
    save_materialized(original, plain)
    fused = tool.optimize_model(
        str(plain / MODEL_NAME), "bert", num_heads=3, hidden_size=HIDDEN, opt_level=0, optimization_options=settings
    )
    fused.save_model_to_file(str(plain / "fused.onnx"))
    return plain / "fused.onnx"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("passes", ["decompose-contrib", "cse,dead-code", "legalize,decompose-contrib,fuse"])
def test_what_the_tool_for_transformers_writes(passes, apart, tmp_path):
    original = encoder()
    model = load_model(fused_by_its_tool(original, tmp_path, apart=apart))
    kinds = {node.op_type for node in model.graph if node.domain}
    attention = "MultiHeadAttention" if apart else "Attention"
    assert kinds == {"SkipLayerNormalization", "BiasGelu", "EmbedLayerNormalization", attention}
    run_passes(model, resolve(passes).passes)
    verify_model(model)
    assert ("decompose-contrib" not in passes) == any(node.domain for node in model.graph)
    feeds = random_feeds(original, {})
    feeds["attention_mask"] = np.array([[1, 1, 0], [1, 0, 1]], np.int64)
    feeds["token_type_ids"] %= 2
    expected, found = Session(original).run(feeds)["y"], Session(model).run(feeds)["y"]
    assert operator_error(expected, found) < 2e-5


@functools.cache
def saved(name, level, folder):
    """The model as onnxruntime wrote it, optimised up to a level, and inputs with the outputs that it gives."""
    original = MODELS[name]()
    plain = folder / f"{name}-{level}"
    plain.mkdir()
    target = plain / "optimised.onnx"  # It goes on referring to the weights beside the original.
    save_materialized(original, plain)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(plain / MODEL_NAME), options, providers=["CPUExecutionProvider"])
    feeds = random_feeds(original, {})
    if "token_type_ids" in feeds:
        feeds["attention_mask"] = np.array([[1, 1, 0], [1, 0, 1]], np.int64)
        feeds["token_type_ids"] %= 2
    return target, feeds, Session(load_model(target)).run(feeds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime")


@pytest.mark.parametrize("passes", [*PIPELINES, *LOSSY])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["encoder", pytest.param("encoder at 13", marks=pytest.mark.slow), "decoder"])
def test_passes_keep_its_numbers(name, level, passes, folder):
    path, feeds, expected = saved(name, level, folder)
    model = load_model(path)
    verify_model(model)
    run_passes(model, resolve(passes).passes)
    verify_model(model)
    assert print_model(model)
    session = Session(model)
    half = {name: feeds[name].astype(np.float16) for name, kind in session.inputs.items() if kind == "tensor(float16)"}
    for output, value in session.run({**feeds, **half}).items():
        error = operator_error(expected[output], value.astype(expected[output].dtype))
        assert error <= LOSSY.get(passes, 2e-5), f"{output}: {error}"


@pytest.mark.parametrize("name", ["encoder", "encoder at 13"])
def test_it_holds_contrib_operators_that_are_decomposed(name, folder):
    """If onnxruntime stops fusing these, the tests above test nothing."""
    path, _, _ = saved(name, "EXTENDED", folder)
    model = load_model(path)
    before = {node.op_type for node in model.graph if node.domain}
    assert before >= {"SkipLayerNormalization", "BiasGelu"}
    run_passes(model, resolve("decompose-contrib").passes)
    assert not [node.op_type for node in model.graph if node.domain]
