"""Which instructions the kernels may use: a level per family of CPUs, chosen by the features of the host or of `mcpu`.

A library says what it needs; `missing_features` is asked before it is loaded, so that it never runs on a CPU that lacks
them.
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
#: What `platform.machine` calls the only architecture that kernels and ranks are written for.
X86 = ("x86_64", "AMD64")
GPU_LEVEL = "cuda"


@dataclasses.dataclass(frozen=True)
class Isa:
    """A level of instructions. `lanes` counts fp32 numbers per vector register."""

    name: str
    lanes: int
    registers: int
    #: What LLVM calls the features that the kernels of this level use.
    features: tuple[str, ...]

    @property
    def has_byte_dot(self) -> bool:
        """u8 · s8 dot products of four, summed in int32 without saturation (AVX512-VNNI)."""
        return "avx512vnni" in self.features

    @property
    def is_gpu(self) -> bool:
        """Work items are threads of a grid; there are no vectors."""
        return self.name == GPU_LEVEL


#: Best first; the last one runs everywhere.
LEVELS = (
    Isa("avx512-vnni", 16, 32, ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c")),
    Isa("avx2", 8, 16, ("avx2", "fma", "f16c")),
    Isa("plain", 4, 16, ()),
)

#: LLVM's names that /proc/cpuinfo spells in another way.
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
    """What code is generated for: LLVM's name of the CPU, and the level of the kernels.

    `without` are features that CPUs of this name have and this one does not, as virtual machines often hide some.
    """

    mcpu: str
    isa: Isa
    without: tuple[str, ...] = ()

    def target(self) -> Any:
        """The TVM target. A name is always given: fp16 with a bare `llvm` hangs LLVM's code generator."""
        return _target(self.mcpu, self.without)

    def required_features(self) -> tuple[str, ...]:
        """What a machine must have to run code that was generated for this CPU, in LLVM's names."""
        found = llvm_features(self.mcpu, self.without)
        return tuple(name for name in _INSTRUCTIONS if name in found)


def _target(mcpu: str, without: tuple[str, ...] = ()) -> Any:
    from tvm.target import Target

    return Target({"kind": "llvm", "mcpu": mcpu, "mattr": [f"-{name}" for name in without]})


#: What a thread of a GPU does: numbers one by one, few of them, so that many threads fit.
GPU_ISA = Isa(GPU_LEVEL, 1, 16, ())


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As `Cpu`, for a GPU of CUDA's architecture `arch` (such as sm_80) in a machine with the CPU `host`."""

    arch: str
    host: Cpu
    isa: Isa = GPU_ISA

    @property
    def mcpu(self) -> str:
        """Of the host, whose code launches the kernels."""
        return self.host.mcpu

    def required_features(self) -> tuple[str, ...]:
        """Of the host."""
        return self.host.required_features()

    def target(self) -> Any:
        from tvm.target import Target

        return Target({"kind": "cuda", "arch": self.arch}, host=self.host.target())


#: What code is generated for.
Machine: TypeAlias = Cpu | Gpu


def find_gpu(arch: str, host: Cpu) -> Gpu:
    """A GPU. Raises UsageError if `arch` is not how CUDA spells one."""
    if re.fullmatch(r"sm_[1-9][0-9]{1,2}[a-z]?", arch) is None:
        raise UsageError(f"{arch!r} is no architecture of CUDA; expected one such as sm_80 or sm_90a")
    return Gpu(arch, host)


def level(name: str) -> Isa:
    """The level called `name`. Raises ModelError with the names there are."""
    for isa in LEVELS:
        if isa.name == name:
            return isa
    raise ModelError(f"no instruction level {name!r}; there are {', '.join(isa.name for isa in LEVELS)}")


def find_cpu(mcpu: str = "native") -> Cpu:
    """The CPU called `mcpu`, or this machine's, with the best level that it has.

    Raises ModelError if LLVM has none of that name, UsageError on a machine for which there are no kernels.
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
    # LLVM names a machine by its model, whatever a hypervisor hides of it.
    without = missing_features(Cpu(name, LEVELS[-1]).required_features()) if mcpu == "native" else ()
    return Cpu(name, best_level(llvm_features(name, without)), without)


def best_level(features: frozenset[str]) -> Isa:
    return next(isa for isa in LEVELS if features.issuperset(isa.features))


def llvm_features(mcpu: str, without: tuple[str, ...] = ()) -> frozenset[str]:
    """The features that LLVM may use for `mcpu` but for `without`, in LLVM's names."""
    from tvm.target import codegen

    return frozenset(str(item) for item in codegen.llvm_get_cpu_features(_target(mcpu, without)))


#: Features of LLVM that mean instructions which its code generator may choose by itself.
_INSTRUCTIONS = (
    *("sse3", "ssse3", "sse4.1", "sse4.2", "sse4a", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt"),
    *("movbe", "gfni", "avxvnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"),
    *("avx512bf16", "avx512fp16", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq"),
    *("avx512vp2intersect", "avxifma", "avxneconvert", "avxvnniint8", "avxvnniint16", "xop", "fma4", "tbm"),
)


def missing_features(required: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `required` (LLVM's names) that this machine lacks; nothing of TVM is loaded to find out."""
    present = host_flags()
    return tuple(name for name in required if _KERNEL_SPELLING.get(name, name) not in present)


@functools.cache
def host_flags() -> frozenset[str]:
    """The flags of /proc/cpuinfo; none where there is no such file."""
    if platform.machine() not in X86 or not CPU_INFO.is_file():
        return frozenset()
    lines = CPU_INFO.read_text().splitlines()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())
