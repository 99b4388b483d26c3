"""Models written by hand as text: seeded weights, lazy matrices, errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.cli import main
from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.ir.weights.lazy_weight import LazyWeight

TEXT = """# a comment
<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,5] y)
<float[3,5] w = random, float16[4] half = random, float[5] bias = {1, 2, 3, 4, 5}> {
    m = MatMul(x, w)
    y = Add(m, bias)
}
"""


def test_random_weights_are_seeded_by_name_and_distinct():
    one, other = read_model(TEXT), read_model(TEXT.replace("random", "random ", 1))
    first, second = (model.graph.initializers["w"].const_value.numpy() for model in (one, other))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) == 15
    renamed = read_model(TEXT.replace(" w", " v").replace(", w", ", v")).graph.initializers["v"].const_value.numpy()
    assert not np.array_equal(first, renamed)
    assert one.graph.initializers["half"].const_value.numpy().dtype == np.float16


def test_matrices_are_weights_of_a_checkpoint_and_vectors_are_not():
    model = read_model(TEXT)
    assert isinstance(model.graph.initializers["w"].const_value, LazyWeight)
    assert not isinstance(model.graph.initializers["bias"].const_value, LazyWeight)


def test_a_file_of_text_is_a_model_for_every_command(tmp_path, capsys):
    path = tmp_path / "graph.onnxtxt"
    path.write_text(TEXT)
    assert print_model(load_model(path)) == print_model(read_model(TEXT))
    assert main(["print", str(path)]) == 0
    assert capsys.readouterr().out == print_model(read_model(TEXT))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"g (", r"bad\.onnxtxt: not ONNX text: .*line: 1"), (b"\xff\xfe", r"bad\.onnxtxt: is not UTF-8 text")],
)
def test_bad_text_is_an_error_that_names_the_file(tmp_path, data, message):
    path = tmp_path / "bad.onnxtxt"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        load_model(tmp_path / "none.onnxtxt")


def test_emit_text_prints_the_result_alone_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "graph.onnxtxt"
    path.write_text(TEXT)
    assert main(["run", str(path), "--passes", "dead-code", "--emit", "text"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("<ir_version")
    assert shown.out.endswith("}\n")
    assert "half" not in shown.out
    assert "dead-code" in shown.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("more", [["-o", "out"], ["--json"], ["--stats=json"]])
def test_emit_text_takes_no_other_output(tmp_path, capsys, more):
    path = tmp_path / "graph.onnxtxt"
    path.write_text(TEXT)
    assert main(["run", str(path), "--passes", "dead-code", "--emit", "text", *more]) == 2
    assert "--emit=text prints the model on stdout and nothing else" in capsys.readouterr().err
