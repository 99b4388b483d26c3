"""Each kernel test that takes `cpu` runs once per level of instructions, where this machine has it."""

from __future__ import annotations

import pytest

from passopt.targets.tvm.features import Cpu, level, missing_features

#: Plain members of each level, so that LLVM is given nothing besides.
CPUS = {"avx512-vnni": "icelake-server", "avx2": "x86-64-v3", "plain": "x86-64"}


@pytest.fixture(params=CPUS, scope="module")
def cpu(request: pytest.FixtureRequest) -> Cpu:
    pytest.importorskip("tvm")
    isa = level(request.param)
    missing = missing_features(isa.features)
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    return Cpu(CPUS[isa.name], isa)
