"""Scale searches for integer codes (what K-quants and Q4_0 to Q5_1 of GGUF files are made with).

A search fits  x ~ scale * code (+ min)  for groups of n neighbours, weighing each squared error. It tries a few ranges
for the codes, solves the weighted least-squares problem that each assignment of codes leaves, keeps the best try of
each group, and then lets codes and solution improve each other. The reference implementation is llama.cpp's
ggml-quants.c (MIT): make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants. It takes 19 to
37 tries, one group at a time, and does not alternate; alternating once needs a quarter of the tries for the same error.

Arrays are group-major, [n, groups] float32: sums over a group are then sums of whole vectors (measured: 5 G elements/s
an operation while the arrays of a piece stay in a core's L2 cache, a fifth of that beyond).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Groups whose weights are all smaller count as zeros: no float16 scale could hold theirs.
TINY = 1e-15
_LEAST = 1e-38
# Tries a group. Error of 5, 7, 9 and 19 relative to llama.cpp's (Q4_K, Gaussian weights): 1.009, 0.994, 0.990, 0.987.
_TRIES = 7


@dataclass(frozen=True)
class Levels:
    """The numbers that codes stand for before scaling; made by `integers` and `entries`."""

    # numbers of any shape -> the level nearest to each; may overwrite its argument.
    nearest: Callable[[Tensor], Tensor]
    # What the number of a group with the largest magnitude is taken for, in each try.
    attempts: Sequence[float]


def tries(top: float) -> list[float]:
    """How many codes beyond `top` the extreme weight of a group is given in each try: shrinking the step below the one
    that just covers the group pays the more, the more codes there are (measured for 2 to 32 codes a side)."""
    low, high = -0.6 * math.log2(top), 1.0
    return [low + (high - low) * i / (_TRIES - 1) for i in range(_TRIES)]


def integers(low: int, high: int) -> Levels:
    """The integers from low to high; the extreme of a group takes the side that reaches further, `low` if equal."""
    reach = low if -low >= high else high
    attempts = [math.copysign(abs(reach) + more, reach) for more in tries(abs(reach))]
    return Levels(lambda numbers: numbers.round_().clamp_(low, high), attempts)


def entries(table: Tensor) -> Levels:
    """The entries of a table, float32 [L], ascending, the first of largest magnitude."""
    edges, first = (table[1:] + table[:-1]) / 2, float(table[0])
    # Error of 7 tries within 5 %, 13 within 30 % and 21 within 50 %, relative to llama.cpp's (IQ4_NL, importance of
    # very unlike columns): 1.040, 1.002, 1.000.
    attempts = [first * (1.05 - 0.4 * i / 14) for i in range(15)] + [float(table[-1]) * (1 - 0.1 * i) for i in range(3)]
    return Levels(lambda numbers: table[torch.bucketize(numbers, edges)], attempts)


def scaled(x: Tensor, w: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """The scales of x ~ scale * level, and how sharp each optimum is.

    x [n, B], w [n, B] >= 0 -> (scale [B], sum(w * level**2) [B]), both 0 for a group of zeros. A scale is negative
    where the extreme of its group has the other sign than the level that reaches furthest.
    """
    n, count = x.shape
    ones = x.new_ones(1, n)
    wx = w * x
    level, product = torch.empty_like(x), torch.empty_like(x)
    top, bottom = x.amax(0), x.amin(0)
    extreme = torch.where(top >= -bottom, top, bottom)
    empty = extreme.abs() <= TINY
    extreme.masked_fill_(empty, 1.0)
    sxl, sll = x.new_empty(len(levels.attempts), count), x.new_empty(len(levels.attempts), count)

    def add(inverse: Tensor, i: int) -> None:
        found = levels.nearest(torch.mul(x, inverse, out=level))
        torch.mm(ones, torch.mul(wx, found, out=product), out=sxl[i : i + 1])
        torch.mm(ones, torch.mul(w, found, out=product).mul_(found), out=sll[i : i + 1])

    for i, most in enumerate(levels.attempts):
        add(most / extreme, i)
    scales = sxl / sll.clamp_(min=_LEAST)
    best, index = (scales * sxl).max(0, keepdim=True)
    scale, sharp = scales.gather(0, index), sll.gather(0, index)
    add((1 / scale.masked_fill(scale == 0, 1.0))[0], 0)
    fresh = sxl[:1] / sll[:1].clamp_(min=_LEAST)
    better = fresh * sxl[:1] > best
    scale, sharp = torch.where(better, fresh, scale), torch.where(better, sll[:1], sharp)
    return scale[0].masked_fill_(empty, 0.0), sharp[0].masked_fill_(empty, 0.0)


def ranged(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, ...]:
    """The scales and mins of x ~ scale * code + min, code in 0 .. top, min <= 0.

    x [n, B], w [n, B] >= 0 -> (scale [B], min [B], weighted mean of x [B], sum of w [B]). Raises nothing; a group of
    equal numbers <= 0 is its min, scale 0.
    """
    n, count = x.shape
    attempts = tries(top)
    ones = x.new_ones(1, n)
    least = x.amin(0).clamp_(max=0)
    span = x.amax(0) - least
    flat = span <= TINY
    span.masked_fill_(flat, 1.0)
    # y = x - least is of one size, so little cancels in the error.
    y = x - least
    wy = w * y
    sums = x.new_empty(3, len(attempts), count)
    code, product = torch.empty_like(x), torch.empty_like(x)
    sw, sy, syy = torch.mm(ones, w), torch.mm(ones, wy), torch.mm(ones, torch.mul(wy, y, out=product))

    def add(i: int) -> None:
        code.round_().clamp_(0, top)
        torch.mm(ones, torch.mul(wy, code, out=product), out=sums[0, i : i + 1])
        torch.mm(ones, torch.mul(w, code, out=product), out=sums[1, i : i + 1])
        torch.mm(ones, product.mul_(code), out=sums[2, i : i + 1])

    for i, t in enumerate(attempts):
        torch.mul(y, (top + t) / span, out=code)
        add(i)
    errors, scales, shifts = _solve(sums, sw, sy, syy, -least)
    best, index = errors.min(0, keepdim=True)
    unsolved = best == torch.inf
    scale = torch.where(unsolved, span / top, scales.gather(0, index))
    shift = shifts.gather(0, index).masked_fill_(unsolved, 0.0)
    inverse = 1 / scale
    torch.mul(y, inverse, out=code).sub_(shift * inverse)
    add(0)
    error, fresh, moved = _solve(sums[:, :1], sw, sy, syy, -least)
    better = error < best
    scale, shift = torch.where(better, fresh, scale), torch.where(better, moved, shift)
    mean = sy / sw.clamp(min=_LEAST)
    minimum = (shift.masked_fill_(flat, 0.0) + least).clamp_(max=0)
    return scale[0].masked_fill_(flat, 0.0), minimum[0], (mean + least)[0], sw[0]


def _solve(sums: Tensor, sw: Tensor, sy: Tensor, syy: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of y ~ scale * code + shift with shift <= most.

    sums [3, k, B] of w*y*code, w*code, w*code**2; the others [1, B] -> (error, scale, shift), each [k, B]; error is
    infinite where the codes leave no scale to find.
    """
    syl, sl, sll = sums
    determinant = sw * sll - sl * sl
    # Codes that are all alike leave rounding errors here (1e-7), ones that are hardly alike 3e-5 and more.
    usable = determinant > 1e-6 * sw * sll
    determinant = torch.where(usable, determinant, 1.0)
    scale = (sw * syl - sy * sl) / determinant
    shift = (sll * sy - sl * syl) / determinant
    over = shift > most
    shift = torch.where(over, most, shift)
    scale = torch.where(over, (syl - shift * sl) / sll.clamp(min=_LEAST), scale)
    error = scale * (scale * sll + 2 * (shift * sl - syl)) + shift * (shift * sw - 2 * sy) + syy
    return torch.where(usable & (scale > 0), error, torch.inf), scale, shift
