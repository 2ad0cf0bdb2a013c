"""Trellis family: a weight is a function of a 16-bit window over a stream of bits. EXL3 (a form of QTIP,
arXiv 2406.11235) lands here.

    codes   int32 [N / 16, K / 16, 8 * bits]: tiles of 16 x 16 weights, those of one output row side by side along K.
            (EXL3's file has them as [K / 16, N / 16]: transposed, nothing else.)

A tile is a ring of 256 symbols of `bits` bits, most significant bit first in each word. Weight t has the state formed
by the 16 bits of the ring that end with symbol t, and lies, in the order tensor cores hold a B operand, at

    input  2 * (lane % 4) + j % 2 + 8 * (j // 2 % 2)     with lane, j = divmod(t, 8)
    output lane // 4 + 8 * (j // 4)

The value of a state is computed (`table`: 3inst, mcg or mul1) and always a float16. There are no scales: sizes are in
the vectors before and after the product. Left out: choosing states (a Viterbi search, a calibration method's work) and
multipliers other than the three, which only experimental files carry.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ..errors import UserError
from .families import Family
from .grid import Params
from .spec import Spec

TILE = 16
_SIZE = TILE * TILE
# Weights whose states are formed at a time: int64 intermediates of 8 MB.
_PIECE = 1 << 20


def unpack(spec: Spec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """States int32 [R, C], 0 to 65535."""
    codes = parts["codes"]
    out = torch.empty(shape, dtype=torch.int32, device=codes.device)
    step = max(1, _PIECE // (TILE * shape[1]))
    for start in range(0, codes.shape[0], step):
        out[start * TILE : (start + step) * TILE] = _states(codes[start : start + step], spec.bits)
    return out


def _states(codes: Tensor, width: int) -> Tensor:
    """int32 [rows, columns, 8 * width] -> int32 [16 * rows, 16 * columns]."""
    words = codes.to(torch.int64) & 0xFFFFFFFF
    # Each word below its predecessor in the ring: a window of 16 bits spans at most these two.
    pairs = (words.roll(1, -1) << 32) | words
    end = (torch.arange(_SIZE, device=codes.device) + 1) * width
    last = (end - 1) // 32
    states = ((pairs[..., last] >> ((last + 1) * 32 - end)) & 0xFFFF).int()
    # t = (output 3 bits, input bits 1-2, output bit 3, input bit 3, input bit 0), highest first.
    places = states.unflatten(-1, (8, 4, 2, 2, 2))
    return places.permute(0, 4, 2, 1, 5, 3, 6).reshape(codes.shape[0] * TILE, codes.shape[1] * TILE)


@cache
def table(name: str) -> Tensor:
    """float16 [65536]: the value of every state. Arithmetic modulo 2**32, one rounding to float16."""
    state = torch.arange(1 << 16)
    if name == "mul1":
        x = state * 0x83DCD12D
        total = sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24))
        factor, offset = torch.tensor([0x1EEE, 0xC931 - 0x10000], dtype=torch.int16).view(torch.float16).float()
        # Exact in float32: a product of 11 by 11 bits, and a sum of 20.
        return ((1024 + total) * factor + offset).half()
    x = state * 89226354 + 64248484 if name == "3inst" else state * 0xCBAC1FED
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = ((x >> shift).to(torch.int16).view(torch.float16).float() for shift in (0, 16))
    return (low + high).half()


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return table(spec.table).to(codes.device).float()[codes]


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    raise AssertionError("a trellis has no scales")


def fixed_zero(spec: Spec) -> float | None:
    return None


class TrellisGrid:
    """Stands where a family has its offline half: states are not chosen weight by weight."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        raise _read_only(spec)

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        raise _read_only(spec)

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        raise _read_only(spec)


def _read_only(spec: Spec) -> UserError:
    return UserError(
        f"{spec}: trellis weights are read but not made yet; "
        "to quantize, take the affine, minifloat or codebook family, for example affine4.g128.asym"
    )


FAMILY = Family(
    "trellis", value, scale, fixed_zero, TrellisGrid(), TILE, min_capability=60, unpack=unpack, code_tile=(TILE, TILE)
)
