"""onnxsim's process: one serves all models, and its death is an error of one model."""

import os
import signal

import pytest

from passopt.ir.errors import PassError
from passopt.ir.serialization.text import print_model
from passopt.passes.cleanup.simplify import Simplify
from passopt.passes.guests import onnxsim_process
from passopt.testing.checking import read_model

TEXT = """<ir_version: 10, opset_import: ["" : 18]> g (float[2,3] x) => (float[2,3] y) {
    a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(a) y = Neg(b) }"""


def _number():
    return onnxsim_process._RUNNING[0]._process.pid


def test_the_death_of_the_process_is_an_error_of_one_model():
    assert Simplify().run(read_model(TEXT)).modified
    first = _number()
    assert Simplify().run(read_model(TEXT)).modified
    assert _number() == first
    os.kill(first, signal.SIGKILL)
    model = read_model(TEXT)
    before = print_model(model)
    died = r"^simplify: onnxsim failed with the death of its process \(exit code -9\): it printed nothing\. Leave out"
    with pytest.raises(PassError, match=died):
        Simplify().run(model)
    assert print_model(model) == before
    assert Simplify().run(model).modified
    assert _number() != first


def test_what_onnxsim_raises_crosses_with_its_class():
    with pytest.raises(onnxsim_process.OnnxsimError, match="^TypeError: .*no_such_option"):
        onnxsim_process.simplified(onnxsim_process.onnx.ModelProto(), no_such_option=1)
