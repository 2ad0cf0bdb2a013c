# mypy: allow-untyped-defs
"""Codebook on a device: table[code] * scale, as in codebook.py; two-level scales are the business of tiles.scales.

A table of up to 256 values is looked up by a one-dimensional tl.gather, which reads it from shared memory: 16 float32
entries are 16 banks, so no two lanes ever collide. Counted for NF4 g64 on sm_86 (gemv | gemm): gather 5 | 10 global
loads; a load per code 36 | 71, of which Triton stages 64 through cp.async; a gather from registers 258 | 128 shuffles;
a tree of selects 20 | 25 loads and 2.5 times the instructions.

Vectors and longer tables are loaded from global memory, where caches hold them (AQLM 1x16: 1 MB): a vector of 8
float16 is one load of 16 bytes. A named grid is bytes, 1 to 16 KB: a vector of 8 is one load of 8 bytes or two of 4,
and its signs are arithmetic. A table for each row is metadata of the row, hence looked up by `scale`.
"""

from . import grids, tiles
from .lang import jit, tl


@jit
def value(codes, parts, SPEC: tl.constexpr):
    if SPEC.table == "rowtable":
        return codes
    elif SPEC.grid_code is not None:
        return _grid(codes, parts.table, SPEC).reshape(codes.shape[0] * SPEC.vec, codes.shape[1])
    elif SPEC.vec > 1:
        BOOKS: tl.constexpr = SPEC.books
        total = _vectors(codes, parts.table, SPEC)
        for book in tl.static_range(1, BOOKS):
            total += _vectors(codes >> (book * SPEC.bits), parts.table + (book << SPEC.bits) * SPEC.vec, SPEC)
        return total.reshape(codes.shape[0] * SPEC.vec, codes.shape[1])
    elif SPEC.bits > 8:
        return tl.load(parts.table + codes).to(tl.float32)
    else:
        table = tl.load(parts.table + tl.arange(0, 1 << SPEC.bits)).to(tl.float32)
        flat = codes.reshape(codes.shape[0] * codes.shape[1])
        return tl.gather(table, flat, 0).reshape(codes.shape[0], codes.shape[1])


@jit
def _vectors(codes, table, SPEC: tl.constexpr):
    """float32 [codes, vec, BN] of one book, whose codes are the low bits."""
    entry = (codes & ((1 << SPEC.bits) - 1)) * SPEC.vec
    return tl.load(table + entry[:, None, :] + tl.arange(0, SPEC.vec)[None, :, None]).to(tl.float32)


@jit
def _grid(codes, table, SPEC: tl.constexpr):
    """float32 [codes, 8, BN] of a named grid, as `grids.value` has them: without the shift of a group."""
    GRID: tl.constexpr = SPEC.grid_code
    WIDE: tl.constexpr = 8 // GRID.indices
    wide, lane = codes[:, None, :], tl.arange(0, 8)[None, :, None]
    index = (wide >> (lane // WIDE * GRID.index_bits)) & ((1 << GRID.index_bits) - 1)
    found = tl.load(table + index * WIDE + lane % WIDE).to(tl.float32)
    rest = codes >> (GRID.index_bits * GRID.indices)
    if GRID.group_shift:
        return found
    elif GRID.signs == 0:
        return found + (grids.SHIFT - 2 * grids.SHIFT * (rest & 1).to(tl.float32))[:, None, :]
    else:
        if GRID.signs == 7:
            parity = rest ^ (rest >> 4)
            parity ^= parity >> 2
            rest |= ((parity ^ (parity >> 1)) & 1) << 7
        return found * (1 - 2 * ((rest[:, None, :] >> lane) & 1)).to(tl.float32)


@jit
def scale(values, parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    numbers = values
    if SPEC.table == "rowtable":
        inside = tl.broadcast_to((rn < N)[None, :], values.shape)
        numbers = tl.load(parts.table + (rn << SPEC.bits)[None, :] + values, mask=inside, other=0).to(tl.float32)
    g = tiles.groups(k0, BK, SPEC)
    if SPEC.group_shift:
        shifted = tiles.level_codes(parts.scales, g, rn, N, K, SPEC) >= SPEC.scale_levels
        numbers += tiles.expand(tl.where(shifted, -grids.SHIFT, grids.SHIFT), BK)
    return numbers * tiles.expand(tiles.scales(parts, g, rn, N, K, SPEC), BK)


TRIPLE = tiles.Triple(tiles.unpack, value, scale)
