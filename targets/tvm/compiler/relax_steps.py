"""Run the Relax passes between lowering and code generation, as named steps that can be printed one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.ir.errors import ModelError, PassoptError, UsageError

Tvm = Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A named Relax pass, which `make` returns; `summary` is what error messages say about it."""

    name: str
    summary: str
    make: Callable[[], Tvm]


def steps(kind: str = "llvm") -> tuple[Step, ...]:
    """Return all steps for a kind of target (llvm or cuda), in the order in which they run."""
    from tvm.relax import backend, transform

    gpu = kind == "cuda"
    return (
        *((Step("bind-threads", "turn kernels into grids of threads", _bind_threads),) if gpu else ()),
        Step("dispatch-scan", "lower cumulative sums to TIR", backend.DispatchSortScan),
        Step("legalize", "lower small operators to TIR; kernels are TIR already", transform.LegalizeOps),
        Step("annotate-patterns", "mark which TIR functions may be fused", transform.AnnotateTIROpPattern),
        Step(
            "fold-constants",
            "compute what is constant; weights are parameters, so only small ones are",
            transform.FoldConstant,
        ),
        Step("fuse-ops", "group small operators", transform.FuseOps),
        Step("fuse-tir", "make one TIR function of each group; all layers share equal ones", transform.FuseTIR),
        *((Step("schedule-small", "give small operators TVM's own grids", _schedule_small),) if gpu else ()),
        Step("dead-code", "remove functions and values that nothing reads", transform.DeadCodeElimination),
        Step("view-reshapes", "turn reshapes into views", transform.RewriteDataflowReshape),
        Step("leave-dataflow", "use plain bindings from here on", transform.ToNonDataflow),
        Step("drop-purity", "let calls write from here on", transform.RemovePurityChecking),
        Step("allocate", "turn call_tir into calls on allocated memory", transform.CallTIRRewrite),
        Step("plan-memory", "reuse memory between values", transform.StaticPlanBlockMemory),
        Step("lower-allocations", "turn allocations into calls of the runtime", transform.LowerAllocTensor),
        Step("free-early", "release memory after its last use", transform.KillAfterLastUse),
        Step("lower-builtins", "turn built-in operators into calls of the runtime", transform.LowerRuntimeBuiltin),
        Step("compute-lengths", "turn arithmetic over lengths into functions", transform.ComputePrimValue),
        Step("lower-shapes", "read lengths off the inputs, and check them", transform.VMShapeLower),
        Step("name-symbols", "give every function its name in the library", transform.AttachGlobalSymbol),
    )


def _bind_threads() -> Tvm:
    """Return a pass that turns all kernels into grids of threads.

    It must run before operators are lowered to TIR, while the only TIR functions are the kernels.
    """
    import tvm
    from tvm import tirx

    from passopt.targets.tvm.compiler.gpu_grid import bind_threads

    def bind(module: Tvm, _: Tvm) -> Tvm:
        changed = {
            name: bind_threads(function, str(name.name_hint))
            for name, function in module.functions_items()
            if isinstance(function, tirx.PrimFunc)
        }
        module.update(tvm.IRModule(changed))
        return module

    return tvm.transform.module_pass(bind, opt_level=0, name="bind-threads")


def _schedule_small() -> Tvm:
    from tvm.s_tir import dlight

    return dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())


#: The steps that fuse small operators. They only make the code faster, and TVM 0.27 fails on some groups (such as Gemma
#: 2's masks). If it does, the small operators are left unfused.
FUSING = ("fuse-ops", "fuse-tir")
SKIPPED = "fusing skipped"


def run_steps(module: Tvm, target: Tvm, on_step: Callable[[str, Tvm], None] | None = None) -> Tvm:
    """Return the module after all steps.

    `on_step` is called after each step with its name and the module. If TVM cannot fuse the module, it goes on without
    fusion, and the name given is `SKIPPED`. Raises ModelError with the name of the step if TVM fails in another step.
    """
    unfused = module
    with target:
        for step in steps(str(target.kind.name)):
            unfused = module if step.name == FUSING[0] else unfused
            name = step.name
            try:
                module = step.make()(module)
            except PassoptError:
                raise
            except Exception as error:  # TVM's errors have no common base
                if step.name not in FUSING:
                    last = str(error).strip().splitlines()[-1:]
                    raise ModelError(f"TVM fails in step {step.name!r}: {' '.join(last)}") from error
                module, name = unfused, SKIPPED
            if on_step is not None:
                on_step(name, module)
    return module


def check_step_names(names: list[str], kind: str = "llvm") -> None:
    """Raise UsageError, which lists all steps, if one of `names` is not the name of a step."""
    known = steps(kind)
    for name in names:
        if name not in {step.name for step in known}:
            width = max(len(step.name) for step in known)
            table = "\n".join(f"  {step.name:{width}}  {step.summary}" for step in known)
            raise UsageError(f"no step {name!r}; the steps are, in their order:\n{table}")
