"""Scales from the extremes of a group alone, in one pass: bit for bit what llama.cpp writes without an importance
matrix (quantize_row_q4_0_ref and its like in ggml-quants.c, MIT), codes included. Those are chosen by the scale before
it is rounded to float16, which is why they are chosen here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .families import scale_dtype
from .grid import Params
from .search_levels import Found, by_pieces, group_major, held, params
from .spec import Spec

# numbers [group, B] -> (scale [B], min [B] or None, codes [group, B])
Rule = Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor]]


def symmetric(numbers: Tensor, half: int) -> tuple[Tensor, None, Tensor]:
    """Codes 0 .. 2 * half - 1 around `half`: the number of largest magnitude (the first of several) gets code 0, so
    that the scale is negative where it is positive. With 8 bits it gets 1 or 255."""
    if half == 128:
        scale = numbers.abs().amax(0) / (half - 1)
        return scale, None, _away(numbers * _inverse(scale)) + half
    extreme = numbers.gather(0, numbers.abs().argmax(0, keepdim=True))[0]
    scale = extreme / -half
    codes = (numbers * _inverse(scale)).add_(half + 0.5).clamp_(max=2 * half - 1)
    return scale, None, codes


def ranged(numbers: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. top from the smallest number, the min, to the largest."""
    low = numbers.amin(0)
    scale = (numbers.amax(0) - low) / top
    return scale, low, ((numbers - low) * _inverse(scale)).add_(0.5).clamp_(max=top)


def ternary(numbers: Tensor) -> tuple[Tensor, None, Tensor]:
    """Codes 0, 1, 2 for minus, none and plus the largest magnitude."""
    scale = numbers.abs().amax(0)
    return scale, None, _away(numbers * _inverse(scale)) + 1


def signs(numbers: Tensor) -> tuple[Tensor, None, Tensor]:
    """Code 1 for numbers that are not negative; the scale is the mean magnitude, added up in the order of a row."""
    total = torch.zeros_like(numbers[0])
    for row in numbers.abs():
        total += row
    return total / numbers.shape[0], None, numbers >= 0


def fit(w: Tensor, spec: Spec, rule: Rule) -> Params:
    """Params of w float32 [R, C], whole groups a row, with codes. Raises UserError for numbers that are not finite."""
    return params(spec, by_pieces(w, None, partial(_search, spec=spec, rule=rule)))


def _search(x: Tensor, weight: Tensor, spec: Spec, rule: Rule) -> Found:
    scale, low, codes = rule(group_major(x, spec.group))
    dtype = scale_dtype(spec.scale)
    found = {"scales": held(scale, dtype).float(), "codes": codes.to(torch.uint8).t()}
    if low is not None:
        found["mins"] = held(low, dtype).float()
    return {name: t.reshape(x.shape[0], -1) for name, t in found.items()}


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _away(numbers: Tensor) -> Tensor:
    """Rounded to integers, halves away from zero (C's roundf)."""
    whole = numbers.trunc()
    return whole + ((numbers - whole) * 2).trunc_()
