# mypy: allow-untyped-defs
"""Codebook on a device: table[code] * scale, as in codebook.py; two-level scales are the business of tiles.scales.

The table is looked up by a one-dimensional tl.gather, which reads it from shared memory: 16 float32 entries are 16
banks, so no two lanes ever collide. Counted for NF4 g64 on sm_86 (gemv | gemm): gather 5 | 10 global loads; a load
per code 36 | 71, of which Triton stages 64 through cp.async; a gather from registers 258 | 128 shuffles; a tree of
selects 20 | 25 loads and 2.5 times the instructions.
"""

from . import tiles
from .lang import jit, tl
from .minifloat_device import scale


@jit
def value(codes, parts, SPEC: tl.constexpr):
    table = tl.load(parts.table + tl.arange(0, 1 << SPEC.bits))
    flat = codes.reshape(codes.shape[0] * codes.shape[1])
    return tl.gather(table, flat, 0).reshape(codes.shape[0], codes.shape[1])


TRIPLE = tiles.Triple(tiles.unpack, value, scale)
