# mypy: allow-untyped-defs
"""Device code all families share: words of a tile -> codes, and group metadata -> the numbers of a tile.

A tile is BK inputs by BN outputs of W [K, N], N being contiguous. `parts` is a `Parts`, absent ones None:

    codes   int32 [bits * ceil(K / 32), N]: bit planes of 8, 4, 2 or 1 bits, widest (= lowest bits) first, each of
            ceil(K / 32) * width rows. Row j of a plane holds its bits of inputs j * 32 / width ..., low bits first.
            A power-of-two width is one plane; 3 is 2 + 1, 5 is 4 + 1, 6 is 4 + 2, 7 is 4 + 2 + 1. So no code straddles
            a word, every tile is whole words whatever the width, and each is loaded once. (A dense stream of 3 or 7
            bits has tiles of 3 or 7 words per 32 codes, and Triton's tensors are powers of two.)
            Where a code stands for `Spec.vec` inputs and holds the bits of all books, planes are up to 32 bits wide,
            12 is 8 + 4, 24 is 16 + 8, and a plane has ceil(ceil(K / 32) * width / vec) rows.
            The trellis keeps tiles of its own (trellis_device.py).
    scales, zeros, mins   [G, R'] (`Spec.rows` outputs and `Spec.group` inputs each), any dtype; the trellis has none.
                    Codes of two levels that are narrower than bytes: int32 [ceil(G / per), R'], per = `a_word(bits)`
                    groups a word, low bits first. (6 bits: 5 groups in 30 of 32 bits. Planes of 4 + 2 bits would waste
                    nothing, which is 0.6 % of Q4_K, and be read by twice the loads.)
    table           [2**bits], [N, 2**bits] or [books, 2**bits, vec], any float dtype; of a named grid int8
                    [2**index_bits, 8 / indices], one for all weights of a device
    super_scales, scale_table, scale_offset   second level of the scales, by the row-major order of [R', G]
    super_mins      that of the mins
    global_scale    [1], multiplies one-level scales

K and N are masked: words, scales and zero points beyond them read as 0, and whoever multiplies masks its input.
"""

from typing import Any, NamedTuple

from .lang import jit, tl


class Parts(NamedTuple):
    """The pointers of one weight. A kernel argument: None is known when the kernel is compiled."""

    codes: Any
    scales: Any = None
    zeros: Any = None
    table: Any = None
    super_scales: Any = None
    scale_table: Any = None
    scale_offset: Any = None
    mins: Any = None
    super_mins: Any = None
    global_scale: Any = None


class Triple(NamedTuple):
    """Device functions of one family. Device code indexes it: `.value` of a constexpr is the constexpr's own.

    unpack(parts, k0, rn, N, K, BK, SPEC) -> codes int32 [BK / vec, BN]
    value(codes, parts, SPEC) -> float32 [BK, BN] (or codes, where `scale` needs them)
    scale(values, parts, k0, rn, N, K, BK, SPEC) -> float32 [BK, BN]
    """

    unpack: Any
    value: Any
    scale: Any

    @property
    def cache_key(self) -> str:
        """Source digest. Triton prints a constexpr tuple into its disk cache key, and a function prints as its name:
        without this an edited decode would run as its old self."""
        return "-".join(fn.cache_key for fn in self)


def widths(bits: int) -> list[int]:
    """Widths of the planes of a code, lowest bits first."""
    return [w for w in (32, 16, 8, 4, 2, 1) if bits & w]


def plane_rows(k: int, width: int, vec: int) -> int:
    """Rows of words of the plane of `width` bits."""
    return -(-(-(-k // 32) * width) // vec)


def a_word(bits: int) -> int:
    """Codes of two-level scales that share an int32, none of them in two."""
    return 32 // bits


@jit
def unpack(parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    """Codes int32 [BK / vec, BN] of inputs k0 .. k0 + BK - 1 and outputs rn; k0 a multiple of BK."""
    codes = tl.zeros((BK // SPEC.vec, rn.shape[0]), tl.int32)
    first = 0
    for bit in tl.static_range(6):
        if SPEC.width & (32 >> bit):
            rows = tl.cdiv(tl.cdiv(K, 32) * (32 >> bit), SPEC.vec)
            codes |= _plane(parts.codes + first * N, rows, k0, rn, N, BK // SPEC.vec, SPEC.vec, SPEC.width, 32 >> bit)
            first += rows
    return codes


@jit
def _plane(planes, rows, k0, rn, N, CODES: tl.constexpr, VEC: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """[CODES, BN] of the plane of WIDTH bits and `rows` rows, in its place in the code."""
    LANES: tl.constexpr = 32 // WIDTH
    # Bits of the planes before this one: the wider ones.
    BELOW: tl.constexpr = BITS & ~(2 * WIDTH - 1)
    if CODES % LANES == 0:
        at = k0 // VEC // LANES + tl.arange(0, CODES // LANES)
        words = _words(planes, rows, at, rn, N)
        if WIDTH == 32:
            return words
        shifts = tl.arange(0, LANES) * WIDTH
        codes = (words[:, None, :] >> shifts[None, :, None]).reshape(CODES, rn.shape[0])
    else:
        # A tile that is part of a word, as 4 codes of v8 are in a plane of 4 bits.
        index = k0 // VEC + tl.arange(0, CODES)
        codes = _words(planes, rows, index // LANES, rn, N) >> (index % LANES * WIDTH)[:, None]
    return (codes & ((1 << WIDTH) - 1)) << BELOW


@jit
def _words(planes, rows, at, rn, N):
    inside = (at < rows)[:, None] & (rn < N)[None, :]
    return tl.load(planes + at[:, None] * N + rn[None, :], mask=inside, other=0)


@jit
def groups(k0, BK: tl.constexpr, SPEC: tl.constexpr):
    """Indices [GT] of the groups a tile reads: one, BK / group, or (where neither divides the other) one per input."""
    if SPEC.group == -1:
        return tl.arange(0, 1)
    elif SPEC.group % BK == 0:
        return k0 // SPEC.group + tl.arange(0, 1)
    elif BK % SPEC.group == 0:
        return k0 // SPEC.group + tl.arange(0, BK // SPEC.group)
    else:
        return (k0 + tl.arange(0, BK)) // SPEC.group


@jit
def _count(K, SPEC: tl.constexpr):
    if SPEC.group == -1:
        return 1
    else:
        return tl.cdiv(K, SPEC.group)


@jit
def metadata(pointer, g, rn, N, K, SPEC: tl.constexpr, PER: tl.constexpr = 1):
    """[GT, BN] of a [G, R'] array, in its own dtype; PER: the words [ceil(G / PER), R'] that hold groups g."""
    if SPEC.rows == -1:
        width = 1
        columns = rn * 0
    else:
        width = tl.cdiv(N, SPEC.rows)
        columns = rn // SPEC.rows
    inside = (g < _count(K, SPEC))[:, None] & (rn < N)[None, :]
    return tl.load(pointer + (g // PER)[:, None] * width + columns[None, :], mask=inside, other=0)


@jit
def level_codes(pointer, g, rn, N, K, SPEC: tl.constexpr):
    """Codes of two-level scales or mins, int [GT, BN]."""
    BITS: tl.constexpr = SPEC.scale_code[0]
    if BITS == 8:
        return metadata(pointer, g, rn, N, K, SPEC)
    else:
        PER: tl.constexpr = 32 // BITS
        words = metadata(pointer, g, rn, N, K, SPEC, PER)
        return (words >> (g % PER * BITS)[:, None]) & ((1 << BITS) - 1)


@jit
def scales(parts, g, rn, N, K, SPEC: tl.constexpr):
    """Effective scales float32 [GT, BN], in the steps of `families.scales`."""
    if parts.super_scales is None:
        one = _one_level(metadata(parts.scales, g, rn, N, K, SPEC), SPEC)
        if parts.global_scale is not None:
            one *= tl.load(parts.global_scale).to(tl.float32)
        return one
    else:
        code = level_codes(parts.scales, g, rn, N, K, SPEC)
        if parts.scale_table is not None:
            number = tl.load(parts.scale_table + code.to(tl.int32))
        elif SPEC.grid_code is not None:
            number = ((code & (SPEC.scale_levels - 1)).to(tl.float32) + 0.5) * SPEC.grid_code.factor
        else:
            number = code.to(tl.float32) - SPEC.scale_code[1]
        effective = number * _supers(parts.super_scales, g, rn, N, K, SPEC)
        if parts.scale_offset is not None:
            effective += tl.load(parts.scale_offset).to(tl.float32)
        return effective


@jit
def mins(parts, g, rn, N, K, SPEC: tl.constexpr):
    """Effective mins float32 [GT, BN], in the steps of `families.mins`."""
    if parts.super_mins is None:
        return _one_level(metadata(parts.mins, g, rn, N, K, SPEC), SPEC)
    else:
        return level_codes(parts.mins, g, rn, N, K, SPEC).to(tl.float32) * _supers(parts.super_mins, g, rn, N, K, SPEC)


@jit
def _one_level(stored, SPEC: tl.constexpr):
    if SPEC.scale == "e8m0":
        # 2**(byte - 127) as float32 bits; byte 0 is the subnormal 2**-127.
        byte = stored.to(tl.int32)
        return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
    elif SPEC.scale == "ue4m3":
        return e4m3(stored.to(tl.int32))
    else:
        return stored.to(tl.float32)


@jit
def e4m3(codes):
    """int32 -> float32, by the layout of float16: its exponent is one bit longer and biased by 15 instead of 7."""
    half = ((codes & 0x7F) << 7) | ((codes & 0x80) << 8)
    number = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), number)


@jit
def _supers(pointer, g, rn, N, K, SPEC: tl.constexpr):
    """float32 [GT, BN] of a second level."""
    inside = (g < _count(K, SPEC))[:, None] & (rn < N)[None, :]
    place = (rn // SPEC.rows if SPEC.rows != -1 else rn * 0)[None, :] * _count(K, SPEC) + g[:, None]
    return tl.load(pointer + place // SPEC.two_level[1], mask=inside, other=0).to(tl.float32)


@jit
def expand(per_group, BK: tl.constexpr):
    """[GT, BN] -> [BK, BN], or as it is where one row serves the whole tile."""
    GT: tl.constexpr = per_group.shape[0]
    BN: tl.constexpr = per_group.shape[1]
    if GT == 1 or GT == BK:
        return per_group
    else:
        return tl.broadcast_to(per_group[:, None, :], (GT, BK // GT, BN)).reshape(BK, BN)
