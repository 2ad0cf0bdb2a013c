# mypy: allow-untyped-defs
"""What a KV codec gives the kernels: two device functions, passed to them as one constexpr.

A vector is one token's key or value of one head. Its number in the cache is `slot * heads + head`, so every part of a
codec is an array `[slots * heads, width]`; `parts` is the tuple of their pointers. A codec's file defines

    decode(parts, at, inside, START, WIDTH, DIM) -> numbers START ... START + WIDTH - 1 of the vectors `at`
            [N] int64, as a tile [N, WIDTH] of any float dtype. Vectors not `inside` and numbers past DIM are 0:
            nothing a cache slot holds may be read for them, since 0 * NaN is NaN.
    encode(x, parts, at, inside, DIM, WIDTH) writes whole vectors: x [N, WIDTH] in the model's dtype, 0 past DIM,
            WIDTH the power of two from DIM on.

START, WIDTH and DIM are constexprs. Both must give, bit for bit, what the codec's torch functions give. A head
dimension that is no power of two is read in two pieces (80 = 64 + 16, 576 = 512 + 64), hence START.
"""

from typing import Any, NamedTuple

from .lang import jit, tl


class KVDevice(NamedTuple):
    """Device functions of one codec. Device code indexes it: `.decode` of a constexpr is the constexpr's own."""

    decode: Any
    encode: Any

    @property
    def cache_key(self) -> str:
        """Source digest; see tiles.Triple.cache_key."""
        return "-".join(fn.cache_key for fn in self)


@jit
def load_tile(pointer, at, inside, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns START ... START + WIDTH - 1 of rows `at` of an array [.., DIM], 0 outside."""
    d = START + tl.arange(0, WIDTH)
    where = pointer + at[:, None] * DIM + d[None, :]
    if START + WIDTH <= DIM:
        return tl.load(where, mask=inside[:, None], other=0)
    else:
        return tl.load(where, mask=inside[:, None] & (d < DIM)[None, :], other=0)


@jit
def store_tile(pointer, x, at, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows `at` of an array [.., DIM] from x [N, WIDTH], rounded to its dtype."""
    d = tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < DIM)[None, :]
    tl.store(pointer + at[:, None] * DIM + d[None, :], x.to(pointer.dtype.element_ty), mask=mask)
