"""Each kernel test that takes `cpu` runs once per level of instructions, where this machine has it.

The first level that it has is the one of its models; the others are marked slow.
"""

from __future__ import annotations

import pytest

from passopt.targets.tvm.compiler.kernels.standalone import member_of
from passopt.targets.tvm.machines import LEVELS, Cpu, missing_features

BEST = next(isa for isa in LEVELS if not missing_features(isa.features))
PARAMS = [pytest.param(isa.name, marks=[] if isa == BEST else [pytest.mark.slow]) for isa in LEVELS]


@pytest.fixture(params=PARAMS, scope="module")
def cpu(request: pytest.FixtureRequest) -> Cpu:
    pytest.importorskip("tvm")
    found = member_of(request.param)
    missing = missing_features(found.isa.features)
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    return found
