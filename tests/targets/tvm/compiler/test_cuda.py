"""A whole model for cuda: it is built and its source written; whatever would run it refuses it."""

from __future__ import annotations

import re

import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.targets.folders.output import Origin
from passopt.targets.tvm.compiled_folder import Library, read_library
from passopt.targets.tvm.compiler.compile_models import compile_models
from passopt.targets.tvm.compiler.relax_steps import steps
from passopt.targets.tvm.engine.engine import Engine
from passopt.targets.tvm.machines import find_cpu, find_gpu

pytest.importorskip("tvm")

MODEL = """
<ir_version: 10, opset_import: ["" : 23]>
model (
   int64[batch,seq] input_ids, int64[batch,"past+seq"] attention_mask,
   float[batch,2,past,3] "past.0.key", float[batch,2,past,3] "past.0.value"
) => (float[batch,seq,7] logits, float[batch,2,"past+seq",3] "present.0.key",
      float[batch,2,"past+seq",3] "present.0.value")
<float[7,6] table = {TABLE}, float[6] scale = {1, 2, 3, 4, 5, 6}, int64[4] split = {0, 0, 2, 3},
 int64[3] join = {0, 0, 6}, float zero = {0}, float low = {-1e30}, int64[2] axes = {1, 2}> {
   x = Gather (table, input_ids)
   n = RMSNormalization <epsilon = 1e-5> (x, scale)
   heads = Reshape (n, split)
   q = Transpose <perm = [0, 2, 1, 3]> (heads)
   seen = Cast <to = 9> (attention_mask)
   bias = Where (seen, zero, low)
   mask = Unsqueeze (bias, axes)
   y, "present.0.key", "present.0.value" = Attention <is_causal = 1> (q, q, q, mask, "past.0.key", "past.0.value")
   t = Transpose <perm = [0, 2, 1, 3]> (y)
   j = Reshape (t, join)
   s = Add (x, j)
   turned = Transpose <perm = [1, 0]> (table)
   logits = MatMul (s, turned)
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "model.onnxtxt"
    path.write_text(MODEL.replace("TABLE", ", ".join(f"{n % 5 - 2}" for n in range(42))))
    output = path.with_name("compiled")
    compile_models([load_model(path)], output, find_gpu("sm_80", find_cpu()), Origin("0.1.0", "", {}))
    return output


@pytest.mark.slow
def test_a_model_is_built_with_its_source(folder):
    library = read_library(folder)
    assert isinstance(library, Library)
    assert (library.target, library.isa) == ("cuda", "sm_80")
    assert (folder / "lib.so").stat().st_size > 0
    source = (folder / "lib.cu").read_text()
    for kernel in ("attention_2_2_3", "append_cache_2_3", "rms_norm_6", "linear_float32_7_6", "mask_extents"):
        assert re.search(rf"__global__ void .*{kernel}\w*_kernel", source), kernel


@pytest.mark.slow
def test_a_library_for_cuda_is_not_loaded(folder):
    with pytest.raises(ModelError, match=r"compiled for cuda \(sm_80\), which was never run on a GPU"):
        Engine.load(folder, capacity=16)


def test_only_cuda_has_the_steps_of_a_gpu():
    extra = [step.name for step in steps("cuda") if step.name not in {item.name for item in steps()}]
    assert extra == ["bind-threads", "schedule-small"]
