# mypy: allow-untyped-defs
"""Minifloat on a device: float(code) * scale, as in minifloat.py.

Codes are turned into floats with integer operations, so FP8 weights run on GPUs from before FP8 (below sm_89). Both
layouts line up with float16: an E5M2 byte is the high half of one, E4M3 has the exponent one bit shorter and biased
by 7 instead of 15 (factor 2**8), E2M1's is biased by 1 (factor 2**14). Subnormals come out right because float16 has
them at the same place; only E4M3's NaN (all ones) is not float16's.
"""

from . import tiles
from .lang import jit, tl


@jit
def value(codes, parts, SPEC: tl.constexpr):
    if SPEC.table == "e5m2":
        return (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif SPEC.table == "e2m1":
        half = ((codes & 7) << 9) | ((codes & 8) << 12)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        return tiles.e4m3(codes)


@jit
def scale(values, parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    g = tiles.groups(k0, BK, SPEC)
    return values * tiles.expand(tiles.scales(parts, g, rn, N, K, SPEC), BK)


TRIPLE = tiles.Triple(tiles.unpack, value, scale)
