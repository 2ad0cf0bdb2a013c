# mypy: allow-untyped-defs
"""Trellis on a device: state -> value, as in trellis.py, in the tiles the tensor has.

The 32 weights of a tile in columns c and c + 8 are 32 neighbours in its ring: `bits` whole words, plus the last one of
the columns before for the history of the first. `unpack` loads those bits + 1 words once for the pair of columns and
cuts the 32 windows out by selects and shifts whose amounts depend on the place alone; one permutation then puts them
where the weights belong. Counted at 4 bits on sm_86 (gemv | gemm | dequant, loads of a thread for 32 weights):
6 | 18 | 5; two loads for each weight, the obvious way, are 64.
"""

from . import tiles
from .lang import jit, tl


@jit
def unpack(parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    """States int32 [BK, BN]; rn is whole tiles of 16 neighbours, k0 a multiple of BK."""
    BITS: tl.constexpr = SPEC.bits
    TK: tl.constexpr = BK // 16
    TN: tl.constexpr = rn.shape[0] // 16
    # The left column of each pair, [TN * 8], and of each pair in each tile along K, [TK * TN * 8].
    left = tl.min(rn.reshape(TN, 2, 8), 1).reshape(TN * 8)
    tile = k0 // 16 + tl.arange(0, TK)
    inside = ((tile < K // 16)[:, None] & (left < N)[None, :]).reshape(TK * TN * 8)
    base = ((left // 16)[None, :] * (K // 16) + tile[:, None]) * (8 * BITS)
    pair = tl.broadcast_to((left % 8)[None, :], (TK, TN * 8)).reshape(TK * TN * 8)
    words = parts.codes + base.reshape(TK * TN * 8)
    # Windows of 16 bits, most significant bit first, ending at `end` of the BITS words.
    end = (tl.arange(0, 32) + 1) * BITS
    last = (end - 1) // 32
    low = tl.zeros((32, TK * TN * 8), tl.uint32)
    high = tl.zeros((32, TK * TN * 8), tl.uint32)
    for word in tl.static_range(-1, BITS):
        at = (pair * BITS + word + 8 * BITS) % (8 * BITS)
        found = tl.load(words + at, mask=inside, other=0).to(tl.uint32, bitcast=True)[None, :]
        low = tl.where((last == word)[:, None], found, low)
        high = tl.where((last == word + 1)[:, None], found, high)
    shift = ((last + 1) * 32 - end).to(tl.uint32)[:, None]
    # (high << 1) << 31 is 0 where shift is 0: no shift by 32, which has no meaning.
    states = ((low >> shift) | ((high << 1) << (31 - shift))) & 0xFFFF
    places = states.to(tl.int32).reshape(4, 2, 2, 2, TK, TN, 8)
    return places.permute(4, 2, 0, 3, 5, 1, 6).reshape(BK, rn.shape[0])


@jit
def value(codes, parts, SPEC: tl.constexpr):
    state = codes.to(tl.uint32)
    if SPEC.table == "mul1":
        x = state * 0x83DCD12D
        pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
        total = (pairs & 0xFFFF) + (pairs >> 16)
        # float16 0x1EEE and 0xC931; exact but for the one rounding to float16.
        number = (total + 1024).to(tl.float32) * 0.006767272949218750 - 10.3828125
        return number.to(tl.float16).to(tl.float32)
    else:
        x = state * 0xCBAC1FED if SPEC.table == "mcg" else state * 89226354 + 64248484
        x = (x & 0x8FFF8FFF) ^ 0x3B603B60
        low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return (low + high).to(tl.float16).to(tl.float32)


@jit
def scale(values, parts, k0, rn, N, K, BK: tl.constexpr, SPEC: tl.constexpr):
    return values


TRIPLE = tiles.Triple(unpack, value, scale)
