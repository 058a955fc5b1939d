"""Memory budgets: the machine's memory, and cgroup limits in simulated system folders."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from bigq.machine.budget import HOST_RESERVE, disk_budget, host_budget

MIB = 2**20


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000 * MIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def cgroup(root: Path, line: str, folder: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name).write_text(text + "\n")


def test_without_cgroups_it_is_free_memory_plus_that_of_the_process(tmp_path: Path) -> None:
    assert host_budget(100 * MIB, tmp_path) == 1100 * MIB - HOST_RESERVE


def test_a_limit_of_cgroup_v2_counts_without_the_page_cache(tmp_path: Path) -> None:
    files = {"memory.max": str(500 * MIB), "memory.current": str(300 * MIB), "memory.stat": f"anon 1\nfile {200 * MIB}"}
    cgroup(tmp_path, "0::/job", "sys/fs/cgroup/job", files)
    assert host_budget(100 * MIB, tmp_path) == (100 + 500 - 100) * MIB


def test_the_lowest_limit_of_all_ancestors_counts(tmp_path: Path) -> None:
    inner = {"memory.max": "max", "memory.current": "1", "memory.stat": "file 0"}
    outer = {"memory.max": str(400 * MIB), "memory.current": str(50 * MIB), "memory.stat": "file 0"}
    cgroup(tmp_path, "0::/a/b", "sys/fs/cgroup/a", outer)
    cgroup(tmp_path, "0::/a/b", "sys/fs/cgroup/a/b", inner)
    assert host_budget(0, tmp_path) == 350 * MIB


def test_a_limit_of_cgroup_v1_counts_without_the_page_cache(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(300 * MIB),
        "memory.usage_in_bytes": str(120 * MIB),
        "memory.stat": f"cache 7\ntotal_cache {20 * MIB}",
    }
    cgroup(tmp_path, "4:memory:/job", "sys/fs/cgroup/memory/job", files)
    assert host_budget(0, tmp_path) == 200 * MIB


def test_no_limit_does_not_count(tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "0", "memory.stat": "total_cache 0"}
    cgroup(tmp_path, "4:memory:/", "sys/fs/cgroup/memory", files)
    assert host_budget(0, tmp_path) == 1000 * MIB - HOST_RESERVE


def test_a_limit_that_is_used_up_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": str(100 * MIB), "memory.current": str(150 * MIB), "memory.stat": "file 0"}
    cgroup(tmp_path, "0::/", "sys/fs/cgroup", files)
    assert host_budget(10 * MIB, tmp_path) == 0


def test_free_disk_space_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    assert disk_budget(tmp_path / "not" / "there" / "yet") == pytest.approx(disk_budget(tmp_path), rel=0.01)
