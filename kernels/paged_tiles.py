"""Tile sizes and splits of the paged-attention kernels, by head dims and GPU.

Estimates, chosen by compiling for every target and reading shared memory, registers and spills (results/aot.json); not
yet timed on a device.
"""

from bisect import bisect_left
from functools import cache
from typing import NamedTuple

import torch

from .cuda import power_of_two

# Programs that share the keys of one tile: kernels.combine reads all their sums at once.
MAX_SPLITS = 64


class Gpu(NamedTuple):
    """What the choice of tiles depends on. capability: 10 * major + minor, 80 of any AMD GPU."""

    capability: int
    processors: int
    amd: bool = False


class Heads(NamedTuple):
    """group: query heads per KV head."""

    group: int
    key_dim: int
    value_dim: int

    @property
    def constants(self) -> dict[str, int]:
        """Constexprs of kernels.attend."""
        (d0, d1), (v0, v1) = pieces(self.key_dim), pieces(self.value_dim)
        return {"G": self.group, "D": self.key_dim, "D0": d0, "D1": d1, "DV": self.value_dim, "V0": v0, "V1": v1}


class Tile(NamedTuple):
    """BM (query, head) rows and BN keys at a time."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


@cache
def gpu(device: torch.device) -> Gpu:
    """The device's `Gpu`; an A100's for the interpreter."""
    if device.type != "cuda":
        return Gpu(80, 108)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        return Gpu(80, processors, amd=True)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(10 * major + minor, processors)


def pieces(dim: int) -> tuple[int, int]:
    """Widths, powers of two of 16 and more, that `dim` is read in; the second may be 0."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, max(16, power_of_two(dim - first)) if dim > first else 0


# Tiles by head dim, up to 64, 128, 256 and beyond: (decode, prefill); BM of decode is its least, of prefill the most.
# Chosen by compiling: the largest that hardly spills registers and leaves room for two programs in shared memory (48
# KB up to sm_70, 64 KB on sm_75 and AMD, 99 KB on sm_86, sm_89 and sm_120).
_TENSOR_CORES = (
    (Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    (Tile(16, 64, 4, 3), Tile(128, 32, 8, 3)),
    (Tile(16, 32, 4, 3), Tile(64, 32, 8, 3)),
    (Tile(16, 32, 8, 3), Tile(32, 16, 8, 2)),
)
# wgmma reads its operands from shared memory, so registers suffice for twice the keys.
_HOPPER_128 = (_TENSOR_CORES[1][0], Tile(128, 64, 8, 3))
_AMD = (
    (Tile(16, 32, 4, 1), Tile(64, 32, 4, 1)),
    (Tile(16, 32, 4, 1), Tile(64, 32, 8, 1)),
    (Tile(16, 16, 4, 1), Tile(32, 16, 8, 1)),
    (Tile(16, 16, 8, 1), Tile(32, 16, 8, 1)),
)
# Multiply-adds, before sm_80 and in float32: no padding to 16 rows, but operands lie in shared memory as float32.
_MULTIPLY_ADD = (
    (Tile(1, 32, 4, 1), Tile(64, 32, 8, 1)),
    (Tile(1, 32, 4, 1), Tile(64, 16, 8, 1)),
    (Tile(1, 16, 4, 1), Tile(16, 16, 8, 1)),
    (Tile(1, 16, 8, 1), Tile(4, 16, 8, 1)),
)


def tile(heads: Heads, itemsize: int, decode: bool, on: Gpu) -> Tile:
    """Tile of a launch; itemsize: bytes of q's dtype."""
    size = bisect_left((64, 128, 256), max(sum(pieces(heads.key_dim)), sum(pieces(heads.value_dim))))
    if on.capability < 80 or itemsize == 4:
        small, large = _MULTIPLY_ADD[size]
    elif on.amd:
        small, large = _AMD[size]
    else:
        small, large = _HOPPER_128 if size == 1 and 90 <= on.capability < 120 else _TENSOR_CORES[size]
    rows = max(small.BM, power_of_two(heads.group))
    if not decode or rows > large.BM:
        return large
    return small._replace(BM=rows) if rows <= 16 else large._replace(BM=rows)


def splits(programs: int, steps: int, processors: int) -> int:
    """How many programs share the keys of a tile: enough to fill the GPU twice, two steps of keys each at least.

    programs: of the launch without a split; steps: tiles of keys of the longest context.
    """
    return max(1, min(2 * processors // programs, steps // 2, MAX_SPLITS))
