"""What code is generated for, on machines that hide features of their CPU."""

from __future__ import annotations

import pytest

from passopt.ir.errors import UsageError
from passopt.targets.tvm import machines
from passopt.targets.tvm.machines import find_cpu, host_flags, missing_features


def test_this_machine_runs_what_is_compiled_for_it():
    cpu = find_cpu()
    assert missing_features(cpu.required_features()) == ()
    assert missing_features(cpu.isa.features) == ()


@pytest.mark.parametrize("hidden", ["f16c", "fma", "avx2"])
def test_what_a_hypervisor_hides_is_not_generated(monkeypatch: pytest.MonkeyPatch, hidden: str):
    if hidden not in host_flags():
        pytest.skip(f"this machine has no {hidden}")
    left = host_flags() - {hidden}
    monkeypatch.setattr(machines, "host_flags", lambda: left)
    cpu = find_cpu()
    assert hidden in cpu.without
    assert hidden not in cpu.required_features()
    assert cpu.isa.name == "plain"
    assert missing_features(cpu.required_features()) == ()
    assert f"-{hidden}" in [str(item) for item in cpu.target().attrs["mattr"]]


def test_a_named_cpu_is_taken_at_its_word():
    assert find_cpu("icelake-server").without == ()
    assert "avx512vnni" in find_cpu("icelake-server").required_features()


def test_a_machine_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines.platform, "machine", lambda: "aarch64")
    with pytest.raises(UsageError, match="compiled libraries are for x86-64, this machine is aarch64"):
        find_cpu()
