"""Two-level scales: the searches of search.py for a whole matrix, and the integers that stand for their results.

A super block is 256 columns of a row: `per` groups with a small integer each, and one float16 that all of them are
multiplied by. K-quants of GGUF files are made this way. Scales and mins are not rounded independently, as llama.cpp's
ggml-quants.c (MIT), the reference implementation, does: the min is solved again for the scale as it will be decoded,
which costs nothing and takes 0.5 to 2 % off the error (Q4_K, Q5_K, Q2_K on Gaussian and real weights).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .search import ranged, scaled, tries

# Columns that share a super scale, and over which the mean square of the importance is taken.
SUPER = 256
# Numbers of a piece: ten float32 arrays of it fit a core's L2 cache.
_PIECE = 32768


@dataclass(frozen=True)
class Levels:
    """Scales of a matrix [R, C] in groups, as they will be decoded and as they are stored."""

    # float32 [R, G]: super scale * small integer.
    scale: Tensor
    # uint8 [R, G]: the small integer; signed ones plus 2**(bits - 1).
    codes: Tensor
    # float16 [R * G / per]
    supers: Tensor


def row_pieces(w: Tensor) -> Iterator[slice]:
    """Slices of rows, some 32 thousand numbers each."""
    rows = max(1, _PIECE // w.shape[1])
    for start in range(0, w.shape[0], rows):
        yield slice(start, min(start + rows, w.shape[0]))


def check_finite(w: Tensor, weight: Tensor | None) -> Tensor | None:
    """The importance divided by its mean, float32, none of it 0: a search needs something to minimise.

    Raises UserError for weights or importances that are not finite, or importances below 0.
    """
    # A sum of products with 0 is 0 or NaN: cheaper than a mask of everything.
    if not torch.equal((w.reshape(-1) * 0).sum(), w.new_zeros(())):
        raise UserError(
            f"a weight of shape {tuple(w.shape)} holds NaN or infinity and cannot be quantized; "
            "fix: repair or re-download the checkpoint, or leave this tensor unquantized"
        )
    if weight is None:
        return None
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise UserError(
            "the importance of a weight's columns holds NaN, infinity or negative numbers; accepted: mean squares of "
            "inputs, 0 or more. Fix: calibrate again (--calib), or quantize without importance"
        )
    mean = weight.mean()
    if float(mean) == 0:
        return torch.ones_like(weight)
    return (weight / mean).clamp_(min=1e-10)


def group_major(t: Tensor, group: int) -> Tensor:
    """[r, C] -> [group, r * C / group]"""
    return t.reshape(-1, group).t().contiguous()


def spread_squares(x: Tensor, factor: float, span: int = SUPER) -> Tensor:
    """factor * mean of x**2 over each `span` columns, shaped to broadcast with x.view(r, -1, span)."""
    return (x * x).view(x.shape[0], -1, span).mean(-1, keepdim=True).mul_(factor)


def with_spread(x: Tensor, weight: Tensor, factor: float, span: int = SUPER) -> Tensor:
    """weight * sqrt(factor * mean(x**2) + x**2): large numbers matter more than their importance says, for they are
    rounded with the larger steps of outliers' groups."""
    shape = (x.shape[0], -1, span)
    scale = (x * x).view(shape).add_(spread_squares(x, factor, span)).sqrt_()
    return scale.view(x.shape).mul_(weight)
