"""Each kernel test that takes `cpu` runs once per level of instructions, where this machine has it."""

from __future__ import annotations

import pytest

from passopt.targets.tvm.compiler.kernels.standalone import member_of
from passopt.targets.tvm.machines import LEVELS, Cpu, missing_features


@pytest.fixture(params=[isa.name for isa in LEVELS], scope="module")
def cpu(request: pytest.FixtureRequest) -> Cpu:
    pytest.importorskip("tvm")
    found = member_of(request.param)
    missing = missing_features(found.isa.features)
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    return found
