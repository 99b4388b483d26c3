"""The passes that code generation leaves out for CPUs would change no kernel and no small operator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Fill
from passopt.targets.tvm.compiler.kernels.attention.attention import attention
from passopt.targets.tvm.compiler.kernels.attention.cache import append_cache
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import mask_extents
from passopt.targets.tvm.compiler.kernels.code_generation import COMPACTION, HOISTING, code_generation
from passopt.targets.tvm.compiler.kernels.computed_rows import rows_kernel
from passopt.targets.tvm.compiler.kernels.linear.choose import float_kernel, int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.int8_int8 import int8_int8_kernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import quantize_rows
from passopt.targets.tvm.compiler.kernels.rms_norm import RmsNorm
from passopt.targets.tvm.compiler.kernels.rotary import rotary
from passopt.targets.tvm.compiler.kernels.standalone import assembly, member_of
from passopt.targets.tvm.compiler.kernels.swiglu import Swiglu
from passopt.targets.tvm.compiler.relax_steps import run_steps
from passopt.targets.tvm.machines import Isa, find_cpu, find_gpu

pytest.importorskip("tvm")

CPU = member_of("avx2")
SHAPE = (24, 140)
CODES, SCALES = Fill(DataType.INT8, SHAPE, 1), Fill(DataType.FLOAT, SHAPE[:1], 1)
KERNELS: dict[str, Callable[[Isa], Any]] = {
    "append_cache": lambda isa: append_cache(3, 10, "float16", isa),
    "attention": lambda isa: attention(4, 2, 12, 0.3, "float16", isa, True, 3.0),
    "mask_extents": mask_extents,
    "linear_fp32": lambda isa: float_kernel(Fill(DataType.FLOAT, SHAPE, 1), isa).function(residual=True),
    "linear_int8": lambda isa: int8_kernel(CODES, SCALES, isa).function(),
    "linear_w8a8": lambda isa: int8_int8_kernel(CODES, SCALES, isa).function(),
    "quantize_rows": lambda isa: quantize_rows(12, isa),
    "rms_norm": lambda isa: rows_kernel(RmsNorm(11, "float16", 1e-5, isa)),
    "rotary": lambda isa: rotary(3, 10, 8, False, isa),
    "swiglu": lambda isa: rows_kernel(Swiglu(11, isa)),
}
OPERATORS = """
    a = Softmax <axis = 1> (y)
    b = ReduceMean <keepdims = 1> (a, last)
    c = Slice (x, from, to, last, step)
    d = Concat <axis = 2> (c, b, c)
    e = Transpose <perm = [0, 2, 1]> (d)
    f = Erf (e)
    logits = CumSum (f, axis)"""
CONSTANTS = (
    "int64[1] last = {2}, int64[1] from = {1}, int64[1] to = {9223372036854775807}, int64[1] step = {2}, "
    "int64 axis = {1}"
)


def allocations(module: Any) -> dict[str, Counter[str]]:
    """The buffers that each function of a module allocates, by dtype and shape; lengths of any width are alike."""
    import tvm_ffi
    from tvm import s_tir, tirx

    found: dict[str, Counter[str]] = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            buffers = found[str(variable.name_hint)] = Counter()

            def count(*allocated: Any, buffers: Counter[str] = buffers) -> None:
                shapes = [re.sub(r"T\.int64\((\d+)\)", r"\1", ", ".join(map(str, item.shape))) for item in allocated]
                buffers.update(f"{item.dtype}[{shape}]" for item, shape in zip(allocated, shapes, strict=True))

            callbacks = (
                (tirx.AllocBuffer, lambda statement, count=count: count(statement.buffer)),
                (s_tir.SBlock, lambda block, count=count: count(*block.alloc_buffers)),
            )
            tvm_ffi.structural_walk(function.body, callbacks)
    return found


@pytest.fixture
def compaction() -> Any:
    """An instrument of TVM that keeps what is allocated before and after the pass, as `before` and `after`."""
    import tvm

    @tvm.instrument.pass_instrument
    class Compaction:
        def run_before_pass(self, module: Any, info: Any) -> None:
            if info.name == COMPACTION:
                self.before = allocations(module)

        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name == COMPACTION:
                self.after = allocations(module)

    return Compaction()


def compiled(function: Any, **context: Any) -> str:
    """The assembly of a kernel in a context of TVM's."""
    import tvm

    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with tvm.transform.PassContext(**context):
        return str(tvm.compile(module, target=CPU.target()).mod.inspect_source("s"))


def llvm(module: Any) -> list[str]:
    """The LLVM code of a built module and of all that it imports, without the addresses that name its types."""
    own = [re.sub(r'"0x[0-9a-f]+"', "", str(module.inspect_source("ll")))] if module.kind == "llvm" else []
    return own + [text for item in module.imports for text in llvm(item)]


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_the_same_with_the_passes_that_are_left_out(name, compaction):
    function = KERNELS[name](CPU.isa)
    assert compiled(function, instruments=[compaction]) == assembly(function, CPU)
    assert compaction.after == compaction.before


def test_small_operators_are_the_same_with_the_passes_that_are_left_out(lowered_text, compaction):
    import tvm
    from tvm import relax

    target = find_cpu().target()
    module = run_steps(lowered_text(OPERATORS, CONSTANTS).module, target)
    with code_generation(target):
        found = relax.build(module, target, relax_pipeline=None)
    with tvm.transform.PassContext(instruments=[compaction]):
        expected = relax.build(module, target, relax_pipeline=None)
    assert any(compaction.before.values())
    assert compaction.after == compaction.before
    assert llvm(found.mod) == llvm(expected.mod)


def test_code_for_a_gpu_is_made_by_the_whole_pipeline():
    host = find_cpu()
    assert not code_generation(find_gpu("sm_80", host).target()).disabled_pass
    assert list(code_generation(host.target()).disabled_pass) == [COMPACTION, HOISTING]
