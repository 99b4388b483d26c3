"""Choose the instructions that kernels may use, by the features of this machine's CPU or of the CPU named by `mcpu`.

There is one instruction level for each family of CPUs. A library lists the features that it needs; `missing_features`
is called before a library is loaded, so that it never runs on a CPU without them.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from pathlib import Path
from typing import Any, TypeAlias

from passopt.ir.errors import ModelError, UsageError

CPU_INFO = Path("/proc/cpuinfo")
#: The names that `platform.machine` gives to x86-64, the only architecture that kernels and ranks are written for.
X86 = ("x86_64", "AMD64")
GPU_LEVEL = "cuda"


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction level: `lanes` fp32 numbers per vector register, and `registers` vector registers."""

    name: str
    lanes: int
    registers: int
    #: LLVM's names of the features that the kernels of this level use.
    features: tuple[str, ...]

    @property
    def has_byte_dot(self) -> bool:
        """Return whether there is an instruction for byte dot products (AVX512-VNNI).

        It adds the products of four pairs of an unsigned and a signed byte to an int32, without saturation.
        """
        return "avx512vnni" in self.features

    @property
    def is_gpu(self) -> bool:
        """Return whether this is the level for GPUs, where a work item is a thread of a grid and has no vectors."""
        return self.name == GPU_LEVEL


#: The levels for CPUs, the best one first; the last one runs on any x86-64 CPU.
LEVELS = (
    Isa("avx512-vnni", 16, 32, ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c")),
    Isa("avx2", 8, 16, ("avx2", "fma", "f16c")),
    Isa("plain", 4, 16, ()),
)

#: The spelling of features in /proc/cpuinfo, by LLVM's names, where the two differ.
_KERNEL_SPELLING = {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avxvnni": "avx_vnni",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
}


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A CPU to generate code for: LLVM's name of it, and the instruction level of the kernels.

    `without` lists features that CPUs of this name have but this one does not; virtual machines often hide some.
    """

    mcpu: str
    isa: Isa
    without: tuple[str, ...] = ()

    def target(self) -> Any:
        """Return the TVM target.

        It always names a CPU, because LLVM's code generator hangs on fp16 if the target is a bare `llvm`.
        """
        return _target(self.mcpu, self.without)

    def required_features(self) -> tuple[str, ...]:
        """Return the features (LLVM's names) that a machine must have to run code generated for this CPU."""
        found = llvm_features(self.mcpu, self.without)
        return tuple(name for name in _INSTRUCTIONS if name in found)


def _target(mcpu: str, without: tuple[str, ...] = ()) -> Any:
    from tvm.target import Target

    return Target({"kind": "llvm", "mcpu": mcpu, "mattr": [f"-{name}" for name in without]})


#: The level for one thread of a GPU. It has no vectors, and kernels keep few numbers in registers, so that many threads
#: can run at once.
GPU_ISA = Isa(GPU_LEVEL, 1, 16, ())


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU to generate code for: its CUDA architecture `arch` (such as sm_80), and the CPU `host` of its machine."""

    arch: str
    host: Cpu
    isa: Isa = GPU_ISA

    @property
    def mcpu(self) -> str:
        """Return LLVM's name of the host CPU, whose code launches the kernels."""
        return self.host.mcpu

    def required_features(self) -> tuple[str, ...]:
        """Return the features (LLVM's names) that the host CPU must have."""
        return self.host.required_features()

    def target(self) -> Any:
        """Return the TVM target."""
        from tvm.target import Target

        return Target({"kind": "cuda", "arch": self.arch}, host=self.host.target())


#: A machine to generate code for.
Machine: TypeAlias = Cpu | Gpu


def find_gpu(arch: str, host: Cpu) -> Gpu:
    """Return the GPU of architecture `arch`; raise UsageError if it is not spelled like one of CUDA, such as sm_80."""
    if re.fullmatch(r"sm_[1-9][0-9]{1,2}[a-z]?", arch) is None:
        raise UsageError(f"{arch!r} is no architecture of CUDA; expected one such as sm_80 or sm_90a")
    return Gpu(arch, host)


def level(name: str) -> Isa:
    """Return the instruction level called `name`; raise ModelError with a list of all names if there is none."""
    for isa in LEVELS:
        if isa.name == name:
            return isa
    raise ModelError(f"no instruction level {name!r}; there are {', '.join(isa.name for isa in LEVELS)}")


def find_cpu(mcpu: str = "native") -> Cpu:
    """Return the CPU that LLVM calls `mcpu`, with the best instruction level that it has.

    `native` is the CPU of this machine. Raises ModelError if LLVM does not know the name, and UsageError on a machine
    that is not x86-64, since there are no kernels for it.
    """
    if platform.machine() not in X86:
        raise UsageError(
            f"compiled libraries are for x86-64, this machine is {platform.machine()}: passes, export and verification "
            f"in onnxruntime run here, compile does not"
        )
    from tvm.target import Target, codegen

    name = str(codegen.llvm_get_system_cpu()) if mcpu == "native" else mcpu
    if name not in [str(item) for item in codegen.llvm_get_cpu_archlist(Target("llvm"))]:
        raise ModelError(f"LLVM knows no CPU {name!r}; `native` is this machine's, x86-64-v3 any with AVX2")
    # LLVM finds the name from the CPU's model, which has features that a hypervisor may hide: these are left out.
    without = missing_features(Cpu(name, LEVELS[-1]).required_features()) if mcpu == "native" else ()
    return Cpu(name, best_level(llvm_features(name, without)), without)


def best_level(features: frozenset[str]) -> Isa:
    """Return the best instruction level whose features are all among `features` (LLVM's names)."""
    return next(isa for isa in LEVELS if features.issuperset(isa.features))


def llvm_features(mcpu: str, without: tuple[str, ...] = ()) -> frozenset[str]:
    """Return the features that LLVM may use for `mcpu`, except those in `without`; all in LLVM's names."""
    from tvm.target import codegen

    return frozenset(str(item) for item in codegen.llvm_get_cpu_features(_target(mcpu, without)))


#: The features of LLVM that stand for instructions which its code generator may choose by itself.
_INSTRUCTIONS = (
    *("sse3", "ssse3", "sse4.1", "sse4.2", "sse4a", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt"),
    *("movbe", "gfni", "avxvnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"),
    *("avx512bf16", "avx512fp16", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq"),
    *("avx512vp2intersect", "avxifma", "avxneconvert", "avxvnniint8", "avxvnniint16", "xop", "fma4", "tbm"),
)


def missing_features(required: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the `required` features (LLVM's names) that this machine lacks, without loading TVM."""
    present = host_flags()
    return tuple(name for name in required if _KERNEL_SPELLING.get(name, name) not in present)


@functools.cache
def host_flags() -> frozenset[str]:
    """Return the CPU flags in /proc/cpuinfo; an empty set if there is no such file or the machine is not x86-64."""
    if platform.machine() not in X86 or not CPU_INFO.is_file():
        return frozenset()
    lines = CPU_INFO.read_text().splitlines()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())
