"""passopt's own operators: the body computes what the docstring says, and calls have types."""

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.functions import local_function
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model
from passopt.targets.onnxruntime.session import Session

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,6,seq,5] q, float[batch,3,seq,5] k, float[batch,3,seq,5] v, float[6,1,1] slopes,
   float[1,total] positions, float[batch,1,seq,total] mask, float[batch,3,past,5] pk, float[batch,3,past,5] pv)
=> (float[batch,6,seq,5] y0) { y0 = Identity(q) }
"""


def with_attention(cached: bool = True) -> onnx_ir.Model:
    model = parse_model(TEXT)
    editor = Editor(model, "test")
    inputs = list(model.graph.inputs)
    builder = editor.builder("attention")
    name = "AlibiAttention" if cached else "AlibiAttentionNoCache"
    outputs = builder.node(
        name, *inputs[: 8 if cached else 6], outputs=3 if cached else 1, domain="passopt", scale=0.25
    )
    editor.insert(builder.built, None)
    made = list(outputs) if cached else [outputs]
    for value, label in zip(made, ("y", "present_key", "present_value")):
        value.name = label
    model.graph.outputs[:] = made
    return model


def feeds(past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch, seq, total = 2, 4, past + 4

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    causal = np.where(np.arange(total) > np.arange(past, total)[:, None], -np.inf, 0)
    mask = np.repeat(causal[None, None], batch, axis=0)
    mask[1, :, :, : past + 2] = np.finfo(np.float32).min  # left padding: two rows see nothing at all
    return {
        "q": draw(batch, 6, seq, 5),
        "k": draw(batch, 3, seq, 5),
        "v": draw(batch, 3, seq, 5),
        "slopes": draw(6, 1, 1),
        "positions": np.arange(total, dtype=np.float32)[None],
        "mask": mask.astype(np.float32),
        "pk": draw(batch, 3, past, 5),
        "pv": draw(batch, 3, past, 5),
    }


def reference(given: dict[str, np.ndarray], cached: bool) -> np.ndarray:
    key = np.concatenate([given["pk"], given["k"]], axis=2) if cached else given["k"]
    value = np.concatenate([given["pv"], given["v"]], axis=2) if cached else given["v"]
    key, value = key.repeat(2, axis=1), value.repeat(2, axis=1)
    scores = np.einsum("bhqd,bhkd->bhqk", given["q"], key) * 0.25
    scores = scores + given["slopes"] * given["positions"][:, None, None] + given["mask"]
    scores = np.maximum(scores, np.finfo(np.float32).min)  # as the stock code does: a row without any column is uniform
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


@pytest.mark.parametrize("past", [0, 3])
def test_body_computes_attention_with_slopes_and_cache(past):
    given = feeds(past)
    found = Session(with_attention()).run(given)
    np.testing.assert_allclose(found["y"], reference(given, True), rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(found["present_key"], np.concatenate([given["pk"], given["k"]], axis=2))
    np.testing.assert_array_equal(found["present_value"], np.concatenate([given["pv"], given["v"]], axis=2))


def test_body_without_cache():
    given = {name: array for name, array in feeds(0).items() if name not in {"pk", "pv"}}
    model = with_attention(cached=False)
    model.graph.inputs[:] = list(model.graph.inputs)[:6]
    found = Session(model).run(given)
    np.testing.assert_allclose(found["y"], reference(given, False), rtol=2e-5, atol=2e-6)


def test_calls_have_types_and_the_model_holds_the_definition():
    model = with_attention()
    y, present, _ = model.graph.outputs
    assert str(y.shape) == "[batch,6,seq,5]"
    assert str(present.shape) == "[batch,3,past+seq,5]"
    assert y.dtype == onnx_ir.DataType.FLOAT
    assert [identifier[1] for identifier in model.functions] == ["AlibiAttention"]
    verify_model(model)


def test_no_definition_below_the_opset_of_attention():
    assert local_function("AlibiAttention", 22) is None
    assert local_function("Unheard", 23) is None
    model = parse_model(TEXT.replace("23", "22"))
    editor = Editor(model, "test")
    builder = editor.builder("attention")
    builder.node("AlibiAttention", *model.graph.inputs, outputs=3, domain="passopt", scale=0.25)
    with pytest.raises(VerifyError, match="test: AlibiAttention has no definition over opset 22"):
        editor.insert(builder.built, None)
