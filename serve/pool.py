"""How many KV blocks fit: what the largest possible batch can use, within a fraction of the memory that is there."""

import os
from pathlib import Path

import torch

from ..errors import UserError


def free_memory(device: torch.device, fraction: float) -> int:
    """Bytes the cache may take on `device`.

    CUDA: `fraction` of the whole device less what is in use. CPU: `fraction` of what the kernel calls available,
    within the cgroup's limit; pages are only taken when a block is first written.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * fraction) - (total - free)
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        bounds.append(int(text) - int(used.read_text()))
    return int(min(bounds) * fraction)


def pool_blocks(wanted: int, block_bytes: int, memory: int, block_size: int, max_model_len: int) -> int:
    """`wanted` blocks or as many as `memory` bytes hold.

    UserError if one sequence of `max_model_len` tokens does not fit.
    """
    blocks = min(wanted, max(0, memory) // block_bytes)
    if blocks * block_size < max_model_len:
        raise UserError(
            f"the KV cache has room for {blocks * block_size} tokens ({memory / 2**20:.0f} MiB at "
            f"{block_bytes // block_size} bytes per token), less than max_model_len {max_model_len}; lower it, "
            "raise gpu_memory_utilization or num_blocks, or choose a smaller kv_cache_dtype"
        )
    return blocks
