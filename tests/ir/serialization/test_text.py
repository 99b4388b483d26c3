"""Canonical text: it parses back, says what matters and nothing else, and folds equal layers only."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.text import parse_model, print_model
from passopt.ir.weights.expressions import Source
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.source_file import SourceFile

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'

SMALL = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
"odd name" (
   float[batch,3] x,
   float16["past+seq",3] half,
   int64 scalar,
   ? unknown
) => (
   float[batch,3] "y.0",
   bool[3] z
)
<
   float[3] "w.1" = {0.1,-2.0,1e-12},
   float[3] odd = {inf,-inf,nan},
   float16[2] f16 = {15360,49152},
   bfloat16[2] b16 = {16256,49152},
   double d = {0.1},
   int8[2] i8 = {-127,127},
   uint8[2] u8 = {0,255},
   bool[3] flags = {1,0,1},
   int64[0] none = {}
>
{
   a = LeakyRelu <alpha: float = 0.1> (x)
   b = Clip (a, "", "w.1")
   "y.0", rest = local.pair (b)
   z = Identity (flags)
}
<
  domain: "local",
  opset_import: ["" : 21]
>
pair (p) => (q, r)
{
   q = Relu (p)
   r = Neg (p)
}
"""


def test_small_models_parse_back():
    model = parse_model(SMALL.replace(",\n   ? unknown", "").replace(",\n   int64[0] none = {}", ""))
    text = print_model(model)
    again = parse_model(text)
    assert print_model(again) == text
    for name, value in model.graph.initializers.items():
        other = again.graph.initializers[name].const_value
        assert (other.dtype, other.tobytes()) == (value.const_value.dtype, value.const_value.tobytes())
    assert [value.name for value in again.graph.outputs] == ["y.0", "z"]
    assert text == SMALL.replace(",\n   ? unknown", "").replace(",\n   int64[0] none = {}", "")


def test_sixteen_bit_floats_are_bit_patterns():
    model = parse_model(SMALL.replace(",\n   ? unknown", "").replace(",\n   int64[0] none = {}", ""))
    tensors = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert tensors["f16"].tolist() == [1, -2]
    assert tensors["b16"].astype(float).tolist() == [1, -2]


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_every_sixteen_bit_number_survives_the_text(kind):
    numbers = np.array([0, -0.0, 1e-7, 3.14159, 60000, np.inf, np.nan], np.float32).astype(kind)
    model = parse_model(HEADER + "g (float[7] x) => (float[7] y) { y = Relu(x) }")
    tensor = onnx_ir.tensor(numbers, name="c")
    model.graph.register_initializer(
        onnx_ir.Value(name="c", shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    )
    again = parse_model(print_model(model))
    assert again.graph.initializers["c"].const_value.tobytes() == numbers.tobytes()


def test_seventeen_elements_are_a_digest():
    def text(count):
        numbers = ",".join(str(index) for index in range(count))
        return print_model(
            parse_model(HEADER + f"g (float[2] x) => (float[2] y) <int64[{count}] c = {{{numbers}}}> {{ y = Relu(x) }}")
        )

    assert "int64[16] c = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}" in text(16)
    assert 'int64[17] c = ["digest": "' in text(17)


def lazy(name, array=None, shape=(2, 3)):
    """An initializer of a named source, or of an array."""
    file = SourceFile("/data/w", 10**6, 0, "")
    expression = Source(onnx_ir.DataType.FLOAT, shape, name, file, 0) if array is None else Literal.of(array)
    weight = LazyWeight(expression, name)
    return onnx_ir.Value(name=name, shape=weight.shape, type=onnx_ir.TensorType(weight.dtype), const_value=weight)


def test_a_lazy_weight_is_a_digest_however_small():
    model = parse_model(HEADER + "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.graph.register_initializer(lazy("w", np.ones((1, 1), np.float32)))
    assert 'float[1,1] w = ["digest": "' in print_model(model)


def test_metadata_names_of_nodes_and_doc_strings_are_left_out():
    model = parse_model(HEADER + "g (float[2] x) => (float[2] y) { [one] y = Relu(x) }")
    before = print_model(model)
    node = model.graph[0]
    node.name, node.doc_string = "other", "text"
    node.metadata_props["passopt.pass"] = "some"
    model.doc_string = "text"
    assert print_model(model) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not ONNX text"),
        ("<ir_version: 10> g () => (", "not ONNX text"),
        (HEADER + "g (float[2] x) => (float[2] y) { y = Relu(x) y = Neg(x) }", "not a model: .*'y' is redeclared"),
    ],
)
def test_what_is_no_text_of_a_model_is_refused(text, message):
    with pytest.raises(ModelError, match=message):
        parse_model(text)


def layers(count, *, permuted=None, kind=None, order=None, source=None, peek=None):
    """`count` layers of nine nodes with a cache each; they form a chain, or all start from the value `source`.

    From the second layer on, the Sigmoid reads `peek(index)` instead of the layer's own cache.
    """
    cache = "".join(f', float[batch,3] "past.{index}.key"' for index in range(count))
    present = "".join(f', float[batch,3] "present.{index}.key"' for index in range(count))
    lines = ["x0 = Relu(x)"]
    for index in range(count):
        w = f'"model.layers.{index}.w"'
        lines += [
            f"a{index} = MatMul({source or f'x{index}'}, {w})",
            f"b{index} = Neg(a{index})",
            f"c{index} = {kind if kind and index == 1 else 'Exp'}(b{index})",
            f"d{index} = Add(c{index}, x{index})",
            f'e{index} = MatMul(d{index}, "model.layers.{index}.v")',
            f'"present.{index}.key" = Add(e{index}, "past.{index}.key")',
            f'f{index} = Sigmoid("{peek(index) if peek and index else f"present.{index}.key"}")',
            f"g{index} = Tanh(f{index})",
            f"x{index + 1} = Add(g{index}, x{index})",
        ]
    lines.append(f"y = Neg(x{count})")
    names = [f"model.layers.{index}.{part}" for index in range(count) for part in "wv"]
    inputs = "".join(f', float[3,3] "{name}"' for name in names)
    body = " ".join(lines)
    model = parse_model(HEADER + f"g (float[batch,3] x{cache}{inputs}) => (float[batch,3] y{present}) {{ {body} }}")
    for name in names:
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        weight = lazy(order.get(name, name) if order else name, shape=(3, 3)).const_value.expression
        value.const_value = LazyWeight(weight.transpose() if name == permuted else weight, name)
        model.graph.register_initializer(value)
    return model


def folded(model):
    return [line for line in print_model(model).splitlines() if line.strip().startswith("#")]


def test_equal_layers_fold_to_one_and_say_what_is_carried():
    text = print_model(layers(4))
    assert folded(layers(4)) == [
        "   # layer: the next 9 nodes stand × 4; carried: x0 → x1",
        "   # × 4",
    ]
    assert "model.layers.0.w" in text
    assert "model.layers.1.w" not in text
    assert "past.0.key" in text
    assert "past.1.key" not in text
    assert "   y = Neg (x4)" in text


def test_text_grows_with_the_number_of_layers_only_without_folding():
    assert len(print_model(layers(40))) <= len(print_model(layers(3))) + 10
    assert len(print_model(layers(40), fold=False)) > 5 * len(print_model(layers(3)))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_whose_weight_is_permuted_is_not_folded(index):
    lines = folded(layers(3, permuted=f"model.layers.{index}.w"))
    count = 3 - 1 if index != 1 else 0
    assert lines == ([] if not count else [lines[0], "   # × 2"])
    assert f'"model.layers.{index}.w" = ["digest"' in print_model(layers(3, permuted=f"model.layers.{index}.w"))


def test_layers_whose_weights_are_exchanged_are_not_folded():
    """The names advance, but layer 1 holds the tensor of layer 2."""
    exchanged = {"model.layers.1.w": "model.layers.2.w", "model.layers.2.w": "model.layers.1.w"}
    assert folded(layers(3, order=exchanged)) == []


def test_layers_that_differ_inside_a_tensor_attribute_are_not_folded():
    """2,000 numbers, of which one in the middle differs: their text would not tell."""

    def text(odd):
        model = layers(3)
        for index, node in enumerate(node for node in list(model.graph) if node.op_type == "Sigmoid"):
            numbers = np.ones(2000, np.float32)
            numbers[1000] = 1 if index != odd else -1
            constant = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(numbers)}, name=f"constant{index}")
            constant.outputs[0].name = f"k{index}"
            least = onnx_ir.node("ReduceMin", [constant.outputs[0]], {"keepdims": 0}, name=f"least{index}")
            least.outputs[0].name = f"m{index}"
            total = onnx_ir.node("Add", [node.inputs[0], least.outputs[0]], name=f"total{index}")
            total.outputs[0].name = f"t{index}"
            node.replace_input_with(0, total.outputs[0])
            model.graph.insert_before(node, [constant, least, total])
        return folded(model)

    assert text(None)[-1] == "   # × 3"
    assert text(1) == []


def test_a_layer_with_another_operator_is_not_folded():
    assert folded(layers(3, kind="Abs")) == []


def test_different_models_have_different_folded_texts():
    texts = {
        print_model(model)
        for model in (
            layers(3),
            layers(4),
            layers(3, permuted="model.layers.1.w"),
            layers(3, permuted="model.layers.2.v"),
            layers(3, kind="Abs"),
            layers(3, order={"model.layers.2.w": "model.layers.2.v"}),
            layers(3, source="x0"),
            layers(3, source="x"),
            layers(3, peek=lambda _: "present.0.key"),
            layers(3, peek=lambda index: f"d{index}"),
            layers(3, peek=lambda index: f"d{index - 1}"),
            layers(3, peek=lambda index: f"x{min(index, 1)}"),
        )
    }
    assert len(texts) == 12


@pytest.mark.parametrize(
    "peek",
    [
        lambda _: "present.0.key",
        lambda index: f"present.{index - 1}.key",
        lambda index: f"d{index}",
        lambda index: f"d{index - 1}",
    ],
)
def test_layers_that_are_wired_differently_are_not_folded_with_the_first(peek):
    text = print_model(layers(3, peek=peek))
    assert all(f'"model.layers.{index}.w"' in text for index in (0, 1))


def test_canonical_names_do_not_depend_on_the_exporter():
    one = "g (float[3] x) => (float[3] y) <float c = {2}, float[3] w = {1,2,3}>"
    one += " { a = Mul(x, c) b = Add(a, w) y = Relu(b) }"
    other = "g (float[3] x) => (float[3] y) <float[3] w = {1,2,3}, float two = {2}>"
    other += " { m7 = Mul(x, two) q = Add(m7, w) y = Relu(q) }"
    texts = [print_model(parse_model(HEADER + text), canonical=True) for text in (one, other)]
    assert texts[0] == texts[1]
    assert "mul.0 = Mul (x, constant.0)" in texts[0].replace('"', "")


def test_canonical_order_is_that_of_the_structure():
    one = "g (float[3] x) => (float[3] y) { a = Neg(x) b = Exp(x) y = Add(a, b) }"
    other = "g (float[3] x) => (float[3] y) { b = Exp(x) a = Neg(x) y = Add(a, b) }"
    texts = [print_model(parse_model(HEADER + text), canonical=True) for text in (one, other)]
    assert texts[0] == texts[1]


def test_canonical_text_tells_structures_apart_and_leaves_the_model_alone():
    model = parse_model(HEADER + "g (float[3] x, float[3] z) => (float[3] y) { a = Neg(x) y = Sub(a, z) }")
    swapped = parse_model(HEADER + "g (float[3] x, float[3] z) => (float[3] y) { a = Neg(x) y = Sub(z, a) }")
    before = print_model(model)
    assert print_model(model, canonical=True) != print_model(swapped, canonical=True)
    assert print_model(model) == before


@pytest.mark.parametrize("dtype", ["float8e4m3fn", "float8e5m2", "float8e4m3fnuz", "float8e5m2fnuz", "float8e8m0"])
@pytest.mark.parametrize("in_node", [False, True])
def test_small_floats_parse_back_bit_by_bit(dtype, in_node):
    check_bytes(onnx_ir.DataType[dtype.upper()], [1, 2, 0.5], in_node)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2", "float4e2m1"])
@pytest.mark.parametrize("in_node", [False, True])
def test_packed_numbers_parse_back_bit_by_bit(dtype, in_node):
    check_bytes(onnx_ir.DataType[dtype.upper()], [1, 0, 1], in_node)


def check_bytes(dtype, numbers, in_node):
    """Print a model with a constant of a dtype, as an initializer or in a node, and read the same bytes back."""
    tensor = onnx_ir.tensor(np.array(numbers, np.float32).astype(dtype.numpy()), dtype=dtype, name="w")
    node = onnx_ir.Node("", "Constant", [], [onnx_ir.AttrTensor("value", tensor)])
    constant = node.outputs[0] if in_node else onnx_ir.Value(const_value=tensor)
    constant.name, constant.type, constant.shape = "w", onnx_ir.TensorType(dtype), onnx_ir.Shape([3])
    reader = onnx_ir.Node("", "Identity", [constant])
    reader.outputs[0].name, reader.outputs[0].type, reader.outputs[0].shape = "y", constant.type, constant.shape
    nodes, initializers = ([node, reader], []) if in_node else ([reader], [constant])
    graph = onnx_ir.Graph([], reader.outputs, nodes=nodes, initializers=initializers, opset_imports={"": 25}, name="g")
    text = print_model(onnx_ir.Model(graph, ir_version=13), fold=False)
    again = parse_model(text).graph
    found = again[0].attributes["value"].as_tensor() if in_node else again.initializers["w"].const_value
    assert (found.dtype, found.tobytes()) == (dtype, tensor.tobytes())
    assert print_model(parse_model(text), fold=False) == text


def test_a_digest_is_no_tensor():
    text = HEADER + 'g (float[3] x) => (float[3] y) <float[3] w = ["digest": "6c5a82b6ec70"]> { y = Add(x, w) }'
    with pytest.raises(ModelError, match=r"digests in place of the numbers of w, .* use the model\.onnx"):
        parse_model(text)


def test_names_with_quotes_and_backslashes_parse_back():
    names = ['a"b', "c\\d", 'n"m']
    text = """<ir_version: 10, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { y = Relu(x) }"""
    model = parse_model(text)
    model.graph.name = names[1]
    model.graph.inputs[0].name = names[0]
    model.graph.inputs[0].shape = onnx_ir.Shape([names[2]])
    again = parse_model(print_model(model))
    assert [again.graph.name, again.graph.inputs[0].name, again.graph.inputs[0].shape[0].value] == [
        *names[1::-1],
        names[2],
    ]
    assert again.graph[0].inputs[0] is again.graph.inputs[0]


@pytest.mark.parametrize("item", [b"\xff\xfe", b"a\0b"])
def test_bytes_that_are_no_text_are_shown_by_their_digest(item):
    """As text they would be others, so what parses is only what parses back."""
    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g () => (string[2] y) <string[2] s = {"a", "b"}> { y = Identity(s) }'
    )
    assert list(parse_model(print_model(model)).graph.initializers["s"].const_value.string_data()) == [b"a", b"b"]
    model.graph.initializers["s"].const_value = onnx_ir.StringTensor([item, b"b"], shape=onnx_ir.Shape([2]), name="s")
    assert '"digest"' in print_model(model)
    with pytest.raises(ModelError, match="digests in place of the numbers of s"):
        parse_model(print_model(model))


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "float6e2m3", "float6e3m2"])
def test_a_constant_of_a_dtype_without_literals_is_named(dtype):
    """Check the initializer, which is a digest, and the attribute of a node, which is three dots."""
    kind = onnx_ir.DataType[dtype.upper()]
    for in_node, reason in ((False, "digests in place of the numbers of w"), (True, f"three dots .* of a {dtype} con")):
        with pytest.raises(ModelError, match=rf"{reason}.* use the model\.onnx"):
            check_bytes(kind, [1, 2, 0.5], in_node)


def test_a_tensor_in_a_node_loses_a_name_that_must_be_quoted():
    """Check a node of the graph, of a body and of a function; the parser takes no quotes there."""
    text = """g (bool c) => (float[?] y) {
        a = Constant <value: tensor = float[2] kept {1, 2}> ()
        b = If (c) <then_branch = t () => (float[2] p) { p = Constant <value: tensor = float[2] one {3, 4}> () },
                    else_branch = e () => (float[2] q) { q = Constant <value: tensor = float[2] two {5, 6}> () }>
        y = Add(a, b) }"""
    model = parse_model(HEADER + text)
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "Constant":
                tensor = node.attributes["value"].as_tensor()
                tensor.name = tensor.name if tensor.name == "kept" else f"{tensor.name}/weight.0"
    printed = print_model(model, fold=False)
    assert "float[2] kept {1,2}" in printed
    assert "weight" not in printed
    again = parse_model(printed)
    assert print_model(again, fold=False) == printed
    found = {tuple(node.attributes["value"].as_tensor().numpy()) for node in again.graph.all_nodes() if not node.inputs}
    assert found == {(1, 2), (3, 4), (5, 6)}


@pytest.mark.parametrize("name", ["seq", "optional", "map", "float", "int64"])
def test_names_of_a_function_that_are_names_of_types_parse_back(name):
    text = f"""<ir_version: 10, opset_import: ["" : 18, "own" : 1]> g (float[2] x) => (float[2] y) {{ y = own.f(x) }}
        <domain: "own", opset_import: ["" : 18]> f ("{name}") => ("{name}_out") {{ "{name}_out" = Neg("{name}") }}"""
    model = parse_model(text)
    printed = print_model(model, fold=False)
    assert f'f ("{name}") => ({name}_out)' in printed
    assert print_model(parse_model(printed), fold=False) == printed
