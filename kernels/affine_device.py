# mypy: allow-untyped-defs
"""Affine on a device: (code - zero) * scale or code * scale + min in float32, as in affine.py; a zero stored, fixed
(`sym`, `one`) or absent."""

from . import tiles
from .lang import jit, tl


@jit
def value(codes, parts, SPEC: tl.constexpr):
    return codes.to(tl.float32)


@jit
def scale(values, parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    g = tiles.groups(k0, BK, SPEC)
    if parts.zeros is not None:
        values -= tiles.expand(tiles.metadata(parts.zeros, g, rn, N, K, SPEC).to(tl.float32), BK)
    elif SPEC.zero == "sym":
        values -= 1 << (SPEC.bits - 1)
    elif SPEC.zero == "one":
        values -= 1
    values *= tiles.expand(tiles.scales(parts, g, rn, N, K, SPEC), BK)
    if parts.mins is not None:
        values += tiles.expand(tiles.mins(parts, g, rn, N, K, SPEC), BK)
    return values


TRIPLE = tiles.Triple(tiles.unpack, value, scale)
