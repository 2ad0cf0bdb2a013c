"""How many threads torch should use on the CPU: one per physical core this process may run on.

Two hyperthreads of a core share one set of vector units, and more OpenMP threads than free cores makes every parallel
region wait for a descheduled thread (measured 10 to 30 times slower), so the default counts cores, within the
affinity mask and the container's CPU quota. `OMP_NUM_THREADS` and an explicit number win. Pinning threads to cores is
left to the operating system.
"""

import os
from pathlib import Path

import torch

from ..errors import UserError


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores in the affinity mask, at most the whole cores of the cgroup's CPU quota, at least 1.

    `root` holds `sys` and `proc`. Where the topology is not published (macOS, Windows) every logical CPU counts as a
    core.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(root, cpu) for cpu in allowed}
    return max(1, min([len(cores), *_quotas(root)]))


def set_threads(count: int | None = None) -> int:
    """Set torch's intra-op threads and return the number; None = OMP_NUM_THREADS if set, else `physical_cores()`.

    Raises UserError where the number is below 1 or the variable is not a number.
    """
    if count is None:
        text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if text and not text.isdecimal():
            raise UserError(f"OMP_NUM_THREADS is {text!r}; accepted: a whole number of threads, 1 or more, or unset")
        count = int(text) if text else physical_cores()
    if count < 1:
        raise UserError(f"threads is {count}; accepted: 1 or more (leave it out for one per physical core)")
    torch.set_num_threads(count)
    return count


def _core(root: Path, cpu: int) -> tuple[str, str]:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    package, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
    return (package, core) if core else ("logical", str(cpu))


def _quotas(root: Path) -> list[int]:
    """Whole cores granted by each cgroup limit found: version 2 from this process's group up to the root, then
    version 1."""
    found = []
    base = root / "sys/fs/cgroup"
    own = next((line[3:] for line in _read(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    group = base / own.lstrip("/")
    for folder in (group, *group.parents):
        if base in (folder, *folder.parents):
            found.append(_read(folder / "cpu.max").split())
    found.append([_read(base / "cpu/cpu.cfs_quota_us"), _read(base / "cpu/cpu.cfs_period_us")])
    return [max(1, int(q[0]) // int(q[1])) for q in found if len(q) == 2 and all(v.isdecimal() for v in q)]


def _read(path: Path) -> str:
    """A kernel file's text, or "" where this system does not have it."""
    return path.read_text().strip() if path.is_file() else ""
