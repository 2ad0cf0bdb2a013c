"""Physical cores within affinity and quota."""

import os
from pathlib import Path

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import threads


def _machine(root: Path, cores: list[tuple[int, int]], files: dict[str, str]) -> Path:
    for cpu_id, (package, core) in enumerate(cores):
        folder = root / f"sys/devices/system/cpu/cpu{cpu_id}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CORES = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
LIMITS: dict[str, tuple[dict[str, str], set[int], int]] = {
    "two hyperthreads a core": ({}, set(range(8)), 4),
    "affinity": ({}, {0, 4, 5}, 2),
    "quota of the root group": ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, set(range(8)), 2),
    "no quota": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, set(range(8)), 4),
    "quota of a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "max 1",
        },
        set(range(8)),
        3,
    ),
    "less than a core": ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, set(range(8)), 1),
    "version 1": (
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        set(range(8)),
        2,
    ),
    "version 1, no quota": (
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        set(range(8)),
        4,
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_physical_cores(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, affinity, expected = LIMITS[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    assert threads.physical_cores(_machine(tmp_path, CORES, files)) == expected


def test_unpublished_topology_counts_logical_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.physical_cores(tmp_path) == 6


def test_set_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "physical_cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads.set_threads(), threads.set_threads(3)) == (5, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert threads.set_threads() == 2 and chosen == [5, 3, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS is 'many'; accepted: a whole number of threads, 1 or more"):
        threads.set_threads()
    with pytest.raises(UserError, match="threads is 0; accepted: 1 or more"):
        threads.set_threads(0)
