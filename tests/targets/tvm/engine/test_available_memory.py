"""Memory that is available, of a machine and of a container, against files as Linux writes them."""

from pathlib import Path

import pytest

from passopt.ir.errors import UsageError
from passopt.targets.tvm.compiled_folder import CacheLayout
from passopt.targets.tvm.engine import available_memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Path:
    """4000 kB of the machine are available; its control group has no limit yet."""
    monkeypatch.setattr(available_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory, "GROUP", tmp_path)
    (tmp_path / "meminfo").write_text(
        "MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  4000 kB\nHugePages_Total: 0\n"
    )
    return tmp_path


def limit(group: Path, most: str, used: int, cache: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file {cache}\ninactive_file 600\nslab_reclaimable 400\n")


def test_of_the_machine(machine: Path):
    assert available_memory.available_memory() == 4_096_000


@pytest.mark.parametrize(
    ("most", "used", "cache", "expected"),
    [
        ("max", 10, 0, 4_096_000),
        ("3000000", 1_000_000, 500_000, 2_501_000),
        ("9000000", 1_000_000, 0, 4_096_000),
        ("3000000", 3_500_000, 0, 0),
    ],
    ids=["no limit", "less than the machine", "more than the machine", "beyond the limit"],
)
def test_of_a_container(machine: Path, most: str, used: int, cache: int, expected: int):
    limit(machine, most, used, cache)
    assert available_memory.available_memory() == expected


def test_what_is_not_known_refuses_nothing(machine: Path):
    (machine / "meminfo").unlink()
    assert available_memory.available_memory() is None
    available_memory.check_copy(machine, 1 << 60)


def test_what_does_not_fit_is_refused(machine: Path):
    available_memory.check_copy(machine, 4_096_000)
    with pytest.raises(UsageError, match="no memory for a copy of 4,096,001 bytes, 4,096,000 are available"):
        available_memory.check_copy(machine, 4_096_001)


def test_caches_that_do_not_fit_are_refused(machine: Path):
    rank = CacheLayout(layers=10, kv_heads=4, head_dim=64, dtype="fp16")  # 10,240 bytes per column
    available_memory.check_caches([rank], 1, 400)
    for ranks, batch, columns in ([rank], 1, 401), ([rank], 2, 208), ([rank, rank], 1, 208):
        nbytes = len(ranks) * batch * 10_240 * (416 if columns == 401 else 208)
        with pytest.raises(UsageError, match=f"no memory for caches of {nbytes:,} bytes .*: 4,096,000 are available"):
            available_memory.check_caches(ranks, batch, columns)
        available_memory.check_caches(ranks, batch, columns, held=nbytes - 4_096_000)
    available_memory.check_caches([rank], 1, 208, copied=4_096_000 - 2_129_920)
    with pytest.raises(UsageError, match="2,129,919 are available beside a copy of the weights of 1,966,081 bytes"):
        available_memory.check_caches([rank], 1, 208, copied=4_096_000 - 2_129_920 + 1)


def test_of_this_machine():
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    total = next(1024 * int(row[1]) for row in rows if row[0] == "MemTotal:")
    assert total // 1000 < available_memory.available_memory() < total
