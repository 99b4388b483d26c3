"""Tensors that are not plain floats in model.onnx: in other files, sparse, of few bits, of strings, or defaults."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from passopt.ir.errors import ModelError
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.model_files import MODEL_NAME, WEIGHTS_NAME, load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.passes.cleanup.cse import MergeCommonSubexpressions
from passopt.passes.cleanup.dead_code import RemoveDeadCode
from passopt.passes.cleanup.fold_constants import FoldConstants

PASSES = (RemoveDeadCode(), FoldConstants(), MergeCommonSubexpressions())
RNG = np.random.default_rng(3)


def declared(name, shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def floats(name, *shape):
    return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)


def made(nodes, inputs, outputs, initializers=(), functions=(), opset=21, ir_version=10, **graph):
    """A model of a few nodes."""
    content = helper.make_graph(nodes, "g", inputs, outputs, list(initializers), **graph)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    return helper.make_model(content, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def outside(tensor, folder, location="w.bin", *, offset=None, length=None, checksum=None):
    """Move the numbers of a tensor to the end of a file, and return the tensor that refers to them."""
    data = tensor.raw_data
    with (folder / location).open("ab") as file:
        start = file.tell()
        file.write(data)
    onnx.external_data_helper.set_external_data(
        tensor, location, start if offset is None else offset, length or len(data), checksum
    )
    tensor.ClearField("raw_data")
    return tensor


def session(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options)


def written_again(model, tmp_path, feeds=None, passes=PASSES):
    """The model as passopt loads it, runs passes and writes it; onnxruntime must give the same numbers for both."""
    source = tmp_path / "in"
    source.mkdir(exist_ok=True)
    onnx.save(model, source / MODEL_NAME)
    loaded = load_model(source / MODEL_NAME)
    verify_model(loaded)
    assert print_model(loaded)
    for item in passes:
        item.run(loaded)
        verify_model(loaded)
    target = tmp_path / "out"
    target.mkdir()
    save_materialized(loaded, target)
    if feeds is not None:
        expected, found = (session(folder / MODEL_NAME).run(None, feeds) for folder in (source, target))
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))
    return target


def locations(folder):
    """The files that the tensors of a written model lie in."""
    proto = onnx.load(folder / MODEL_NAME, load_external_data=False)
    return {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(proto)
        for entry in tensor.external_data
        if entry.key == "location"
    }


# External data

X = {"x": RNG.standard_normal((3, 40)).astype(np.float32)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def constant(name, tensor):
    return helper.make_node("Constant", [], [name], value=tensor)


def test_a_constant_outside_is_written_once_beside_the_model(folder, tmp_path):
    nodes = [constant("w", outside(floats("w", 40, 40), folder)), helper.make_node("MatMul", ["x", "w"], ["y"])]
    target = written_again(made(nodes, [declared("x", ["b", 40])], [declared("y", ["b", 40])]), tmp_path, X)
    assert locations(target) == {WEIGHTS_NAME}
    assert 6400 <= (target / WEIGHTS_NAME).stat().st_size < 6400 + 512
    assert (target / MODEL_NAME).stat().st_size < 1000


def test_a_constant_outside_may_be_a_graph_output(folder, tmp_path):
    nodes = [constant("w", outside(floats("w", 40, 40), folder)), helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = made(nodes, [declared("x", ["b", 40])], [declared("y", ["b", 40]), declared("w", [40, 40])])
    assert locations(written_again(model, tmp_path, X)) == {WEIGHTS_NAME}


def branches(then, otherwise, *, initializers=((), ())):
    """An If over two bodies of nodes that make `r`."""
    result = declared("r", ["b", 40])
    bodies = [
        helper.make_graph(list(nodes), name, [], [result], list(data))
        for name, nodes, data in zip(("then", "else"), (then, otherwise), initializers, strict=True)
    ]
    return helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])


@pytest.mark.parametrize("as_constant", [True, False])
def test_weights_of_bodies_are_written_beside_the_model(as_constant, folder, tmp_path):
    """Both bodies call their weight w, and the main graph has another w."""
    weights = [outside(floats("w", 40, 40), folder) for _ in range(2)]
    nodes = [[helper.make_node("MatMul", ["x", "w"], ["r"])] for _ in range(2)]
    data = [[], []]
    for index, weight in enumerate(weights):
        if as_constant:
            nodes[index].insert(0, constant("w", weight))
        else:
            data[index].append(weight)
    steps = [branches(*nodes, initializers=data), helper.make_node("MatMul", ["y", "v"], ["z"])]
    model = made(steps, [declared("x", ["b", 40]), declared("c", [], TensorProto.BOOL)], [declared("z", ["b", 40])])
    model.graph.initializer.append(outside(floats("v", 40, 40), folder))
    for taken in (True, False):
        target = written_again(model, tmp_path, {**X, "c": np.array(taken)})
        assert locations(target) == {WEIGHTS_NAME}
        assert (target / WEIGHTS_NAME).stat().st_size < 3 * 6400 + 1024
        for path in target.iterdir():
            path.unlink()
        target.rmdir()


def test_two_bodies_that_read_the_same_bytes_share_them(folder, tmp_path):
    weight = outside(floats("w", 40, 40), folder)
    nodes = [[constant("w", weight), helper.make_node("MatMul", ["x", "w"], ["r"])] for _ in range(2)]
    model = made(
        [branches(*nodes)], [declared("x", ["b", 40]), declared("c", [], TensorProto.BOOL)], [declared("y", ["b", 40])]
    )
    target = written_again(model, tmp_path, {**X, "c": np.array(True)})
    assert (target / WEIGHTS_NAME).stat().st_size < 6400 + 512


def test_a_body_may_give_a_constant_from_outside(folder, tmp_path):
    other = [helper.make_node("Identity", ["x"], ["r"])]
    model = made(
        [branches([constant("r", outside(floats("r", 3, 40), folder))], other)],
        [declared("x", ["b", 40]), declared("c", [], TensorProto.BOOL)],
        [declared("y", ["b", 40])],
    )
    written_again(model, tmp_path, {**X, "c": np.array(True)})


def test_a_function_holds_its_constants_itself(folder, tmp_path):
    nodes = [constant("w", outside(floats("w", 40, 40), folder)), helper.make_node("MatMul", ["a", "w"], ["r"])]
    product = helper.make_function("own", "Product", ["a"], ["r"], nodes, [helper.make_opsetid("", 21)])
    call = helper.make_node("Product", ["x"], ["y"], domain="own")
    model = made([call], [declared("x", ["b", 40])], [declared("y", ["b", 40])], functions=[product])
    target = written_again(model, tmp_path)
    assert locations(target) == set()
    # onnxruntime does not read such data of functions, but onnx does.
    onnx.save(onnx.load(tmp_path / "in" / MODEL_NAME), tmp_path / "whole.onnx")
    expected, found = (session(path).run(None, X) for path in (tmp_path / "whole.onnx", target / MODEL_NAME))
    assert np.array_equal(expected[0], found[0])


def test_small_whole_numbers_outside_are_read(folder, tmp_path):
    shape = outside(numpy_helper.from_array(np.array([7, 0, 39], np.int64), "s"), folder, "s.bin")
    model = made(
        [helper.make_node("Gather", ["x", "s"], ["y"], axis=1)], [declared("x", ["b", 40])], [declared("y", ["b", 3])]
    )
    model.graph.initializer.append(shape)
    target = written_again(model, tmp_path, X)
    assert locations(target) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "gone.bin"}, "weight 'w'.*gone.bin: external data is missing"),
        ({"offset": 64}, "weight 'w'.*truncated: tensor 'w' ends at byte 6464, the file at 6400"),
        ({"length": 6396}, "weight 'w': 6396 bytes of data, shape .40, 40. needs 6400"),
        ({"location": "../w.bin"}, "weight 'w': data at ../w.bin, outside of the model's folder"),
    ],
)
@pytest.mark.parametrize("as_constant", [True, False])
def test_data_that_does_not_fit_is_refused_with_tensor_and_file(change, message, as_constant, folder):
    weight = outside(floats("w", 40, 40), folder)
    entries = {entry.key: entry.value for entry in weight.external_data} | {k: str(v) for k, v in change.items()}
    del weight.external_data[:]
    for key, text in entries.items():
        weight.external_data.add(key=key, value=text)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = made(
        [constant("w", weight), *nodes] if as_constant else nodes,
        [declared("x", ["b", 40])],
        [declared("y", ["b", 40])],
        [] if as_constant else [weight],
    )
    (folder / MODEL_NAME).write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=message):
        load_model(folder / MODEL_NAME)


def test_a_checksum_is_not_carried_over(folder, tmp_path):
    weight = outside(floats("w", 40, 40), folder, checksum="0" * 40)
    model = made(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [declared("x", ["b", 40])], [declared("y", ["b", 40])]
    )
    model.graph.initializer.append(weight)
    target = written_again(model, tmp_path, X)
    assert b"checksum" not in (target / MODEL_NAME).read_bytes()


# Sparse tensors


def sparse(name, values, indices, shape):
    values = helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values)
    indices = np.array(indices, np.int64)
    return helper.make_sparse_tensor(
        values, helper.make_tensor("i", TensorProto.INT64, indices.shape, indices.reshape(-1)), shape
    )


SPARSE = {"flat": [1, 6, 17], "by axis": [[0, 1], [1, 1], [3, 2]]}


def sparse_model(kind, where, values=(1.5, -2.0, 0.25)):
    tensor = sparse("w", values, SPARSE[kind], [4, 5])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = {"sparse_initializer": [tensor]} if where == "initializer" else {}
    if where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=tensor))
    return made(nodes, [declared("x", ["b", 4])], [declared("y", ["b", 5])], **graph)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_sparse_tensors_become_dense(kind, where, tmp_path):
    feeds = {"x": RNG.standard_normal((3, 4)).astype(np.float32)}
    written_again(sparse_model(kind, where), tmp_path, feeds)


def test_sparse_tensors_of_bodies_become_dense(tmp_path):
    tensor = sparse("w", [1.5, -2.0], [1, 6], [40, 40])
    bodies = [
        [helper.make_node("Constant", [], ["w"], sparse_value=tensor), helper.make_node("MatMul", ["x", "w"], ["r"])],
        [helper.make_node("Identity", ["x"], ["r"])],
    ]
    model = made(
        [branches(*bodies)], [declared("x", ["b", 40]), declared("c", [], TensorProto.BOOL)], [declared("y", ["b", 40])]
    )
    written_again(model, tmp_path, {**X, "c": np.array(True)})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (sparse("w", [1.5], [99], [4, 5]), "sparse initializer 'w': sparse indices lie outside, .* within .4, 5."),
        (sparse("w", [1.5], [[0, 5]], [4, 5]), "sparse initializer 'w': sparse indices lie outside"),
        (sparse("w", [1.5, 2], [1], [4, 5]), "sparse indices of shape .1., expected 2 numbers"),
        (sparse("w", [1.5], [1], [1 << 20, 1 << 12]), "takes more than 1 GiB once it is dense"),
    ],
)
def test_sparse_tensors_that_do_not_fit_are_refused(tensor, message, tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = made(nodes, [declared("x", ["b", 4])], [declared("y", ["b", 5])], sparse_initializer=[tensor])
    path = tmp_path / MODEL_NAME
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=message):
        load_model(path)


# Elements of few bits

FEW_BITS = [
    "FLOAT8E4M3FN",
    "FLOAT8E4M3FNUZ",
    "FLOAT8E5M2",
    "FLOAT8E5M2FNUZ",
    "FLOAT8E8M0",
    "FLOAT4E2M1",
    "INT4",
    "UINT4",
    "INT2",
    "UINT2",
    "BFLOAT16",
]
#: An odd and a large number of elements: below and above what stays inside of model.onnx.
SHAPES = [(3, 5), (67, 127)]


def bits(name, dtype, shape):
    """A tensor of random bytes, which stand for all numbers of the dtype, NaN included."""
    kind = getattr(TensorProto, dtype)
    width = {"2": 2, "4": 4, "8": 8, "1": 16}[next(c for c in dtype if c.isdigit())]
    count = -(-int(np.prod(shape)) * width // 8)
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=RNG.bytes(count))


def tensors(folder):
    """Every initializer of a written model, with its bytes."""
    proto = onnx.load(folder / MODEL_NAME)
    return {item.name: (item.data_type, tuple(item.dims), item.raw_data) for item in proto.graph.initializer}


@pytest.mark.parametrize("dtype", FEW_BITS)
@pytest.mark.parametrize("external", [False, True])
def test_few_bits_stay_as_they_are(dtype, external, folder, tmp_path):
    kind = getattr(TensorProto, dtype)
    values = [bits(f"w{index}", dtype, shape) for index, shape in enumerate(SHAPES)]
    expected = {item.name: (kind, tuple(item.dims), _masked(item)) for item in values}
    if external:
        values = [outside(item, folder) for item in values]
    outputs = [declared(item.name, item.dims, kind) for item in values]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = made(nodes, [declared("x", [2])], [declared("y", [2]), *outputs], values, opset=25, ir_version=13)
    target = written_again(model, tmp_path)
    assert {name: (a, b, _masked_bytes(a, b, c)) for name, (a, b, c) in tensors(target).items()} == expected


def _masked(tensor):
    return _masked_bytes(tensor.data_type, tuple(tensor.dims), tensor.raw_data)


def _masked_bytes(kind, shape, data):
    """The bytes without the bits behind the last element, which have no meaning."""
    count = int(np.prod(shape)) * {TensorProto.INT2: 2, TensorProto.UINT2: 2}.get(kind, 4)
    few = {TensorProto.INT2, TensorProto.UINT2, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}
    if kind not in few or not count % 8:
        return data
    return data[:-1] + bytes([data[-1] & ((1 << count % 8) - 1)])


# Strings, sequences, optional values


def test_strings_stay_as_they_are(tmp_path):
    words = np.array(["one", "two", "déjà", 'quoted "word"', ""], object)
    many = np.array([f"word {index} of many" for index in range(200)], object)
    table = [numpy_helper.from_array(words, "words"), numpy_helper.from_array(many, "many")]
    nodes = [
        helper.make_node("Gather", ["words", "i"], ["y"]),
        helper.make_node("Gather", ["many", "i"], ["z"]),
        helper.make_node("Constant", [], ["s"], value_strings=["a", "b"]),
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(words, "t")),
        helper.make_node("Gather", ["t", "i"], ["u"]),
    ]
    outputs = [declared(name, ["n"], TensorProto.STRING) for name in ("y", "z", "u")]
    model = made(
        nodes, [declared("i", ["n"], TensorProto.INT64)], [*outputs, declared("s", [2], TensorProto.STRING)], table
    )
    passes = (RemoveDeadCode(), MergeCommonSubexpressions())
    target = written_again(model, tmp_path, {"i": np.array([4, 0, 3])}, passes)
    assert 'words = {"one","two","déjà","quoted \\"word\\"",""}' in print_model(load_model(target))


def sequence_of(name, dtype=TensorProto.FLOAT, shape=("n", 2)):
    return helper.make_tensor_sequence_value_info(name, dtype, list(shape))


def test_sequences_stay_as_they_are(tmp_path):
    nodes = [
        helper.make_node("Identity", ["q"], ["kept"]),
        helper.make_node("SequenceInsert", ["kept", "x"], ["longer"]),
        helper.make_node("ConcatFromSequence", ["longer"], ["y"], axis=0),
        helper.make_node("SequenceLength", ["longer"], ["count"]),
    ]
    outputs = [declared("y", ["m", 2]), declared("count", [], TensorProto.INT64), sequence_of("kept")]
    model = made(nodes, [sequence_of("q"), declared("x", ["n", 2])], outputs)
    feeds = {"q": [np.ones((3, 2), np.float32)], "x": np.full((2, 2), 7, np.float32)}
    target = written_again(model, tmp_path, feeds)
    text = print_model(load_model(target))
    assert "seq(float[n,2]) q" in text
    assert "seq(float[n,2]) kept" in text


def test_optional_values_stay_as_they_are(tmp_path):
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 2]))
    given = helper.make_value_info("o", kind)
    nodes = [
        helper.make_node("OptionalHasElement", ["o"], ["has"]),
        helper.make_node("OptionalGetElement", ["o"], ["v"]),
        helper.make_node("Relu", ["v"], ["y"]),
        helper.make_node("Optional", ["y"], ["p"]),
    ]
    outputs = [declared("has", [], TensorProto.BOOL), declared("y", ["n", 2]), helper.make_value_info("p", kind)]
    target = written_again(made(nodes, [given], outputs), tmp_path)
    assert "optional(float[n,2]) o" in print_model(load_model(target))
    session(target / MODEL_NAME)


# Initializers that are graph inputs or outputs


@pytest.mark.parametrize("ir_version", [3, 8])
def test_a_default_may_have_a_symbolic_length(ir_version, tmp_path):
    """As adapters have it: without one, the rank is 0; the caller may feed another."""
    empty = numpy_helper.from_array(np.zeros((4, 0), np.float32), "a")
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    other = numpy_helper.from_array(np.zeros((0, 4), np.float32), "b")
    inputs = [declared("x", ["n", 4]), declared("a", [4, "rank"]), declared("b", ["rank", 4])]
    model = made(nodes, inputs, [declared("y", ["n", 4])], [empty, other], opset=8, ir_version=ir_version)
    feeds = {"x": RNG.standard_normal((3, 4)).astype(np.float32)}
    target = written_again(model, tmp_path, feeds)
    if ir_version == 3:  # onnxruntime takes such defaults as constants
        return
    feeds |= {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 4), np.float32)}
    one, other = (session(path / MODEL_NAME).run(None, feeds)[0] for path in (tmp_path / "in", target))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, feeds["x"])


def test_an_initializer_may_be_a_graph_output(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    for name, shape in (("w", (30, 40)), ("v", (2,))):
        model = made(nodes, [declared("x", [2])], [declared("y", [2]), declared(name, shape)], [floats(name, *shape)])
        folder = tmp_path / name
        folder.mkdir()
        written_again(model, folder, {"x": np.ones(2, np.float32)})
