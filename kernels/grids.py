"""Named grids: tables of a few hundred small integer vectors, one code for 8 weights (GGUF's IQ1, IQ2 and IQ3 types).

A code holds, lowest bits first, one index of a vector of 8 or two of vectors of 4, then the signs:

    8 bits   bit i set: weight i of the vector is negative
    7 bits   the same of the first seven; the eighth makes the number of minus signs even
    shift    one bit: 1/8 is added to all weights, or subtracted where it is set; a bit of the vector's code (iq1m), or
             one for the whole group, the highest of its scale's code (iq1s)

The vectors are llama.cpp's (MIT), as the `gguf` package holds them; they were found there by search, so no rule gives
them. Scale codes of these tables stand for odd multiples of half a step: (code + 1/2) * factor.
"""

from functools import cache

import torch
from torch import Tensor

from .spec import GRIDS, Spec

SHIFT = 0.125
# Class of gguf.quants that holds the vectors.
SOURCES = {
    "iq2xxs": "IQ2_XXS",
    "iq2xs": "IQ2_XS",
    "iq2s": "IQ2_S",
    "iq3xxs": "IQ3_XXS",
    "iq3s": "IQ3_S",
    "iq1s": "IQ1_S",
    "iq1m": "IQ1_M",
}


def vectors(name: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [2**index_bits, 8 or 4]: the vectors of a named grid, magnitudes where signs are apart."""
    return _vectors(name).to(device)


@cache
def _vectors(name: str) -> Tensor:
    from gguf import quants

    source = getattr(quants, SOURCES[name])
    source.init_grid()
    return torch.from_numpy(source.grid).reshape(source.grid_shape).clone()


@cache
def signs(bits: int) -> Tensor:
    """float32 [2**bits, 8] of 1 and -1."""
    code = torch.arange(1 << bits)
    negative = torch.stack([code >> i & 1 for i in range(bits)], 1)
    if bits == 7:
        negative = torch.cat([negative, negative.sum(1, keepdim=True) & 1], 1)
    return (1 - 2 * negative).float()


def value(name: str, codes: Tensor) -> Tensor:
    """codes int32 [R, V] -> float32 [R, V, 8], without the shift of a group."""
    table, entries = GRIDS[name], vectors(name, codes.device)
    mask = (1 << table.index_bits) - 1
    found = torch.cat([entries[codes >> (i * table.index_bits) & mask] for i in range(table.indices)], -1)
    rest = codes >> (table.index_bits * table.indices)
    if table.signs:
        return found.mul_(signs(table.signs).to(codes.device)[rest & ((1 << table.signs) - 1)])
    return found if table.group_shift else found.add_(shifts(rest & 1)[..., None])


def shifts(bits: Tensor) -> Tensor:
    """What a shift bit, 0 or 1, adds to a weight: float32."""
    return SHIFT - 2 * SHIFT * bits


def scale_numbers(spec: Spec, codes: Tensor) -> Tensor:
    """What the codes of a grid's two-level scales stand for, float32, exact."""
    return ((codes & (spec.scale_levels - 1)).float() + 0.5) * GRIDS[spec.table].factor
