"""The searches of search.py for a whole matrix, and what is stored of their results: scales and mins of one level or of
two, and codes.

With two levels a super block of a row is `per` groups with a small integer each and one float16 that all of them are
multiplied by. K-quants of GGUF files are made this way. Scales and mins are not rounded independently, as llama.cpp's
ggml-quants.c (MIT), the reference implementation, does: the min is solved again for the scale as it will be decoded,
which costs nothing and takes 0.5 to 2 % off the error (Q4_K, Q5_K, Q2_K on Gaussian and real weights).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import bits
from .families import scale_dtype
from .grid import Params
from .search import Levels, integers, ranged, scaled
from .spec import Spec

# Numbers of a piece: ten float32 arrays of it fit a core's L2 cache. A device has no such reason.
_PIECE, _DEVICE_PIECE = 32768, 1 << 23
# Part of the mean square in the weight of an error, see `spread_weight`.
_SPREAD = 2.0

Found = dict[str, Tensor]
# (x [r, C], weight [r, C]) -> tensors whose first dimension is rows
Search = Callable[[Tensor, Tensor], Found]
Nearest = Callable[[Tensor, Spec, Params], tuple[Tensor, Tensor]]


def check_groups(spec: Spec, columns: int) -> None:
    """UserError unless rows of `columns` weights are whole super blocks."""
    whole = spec.group * spec.two_level[1] if spec.two_level else spec.group
    if columns % whole:
        raise UserError(
            f"{spec} has blocks of {whole} weights, and a row of {columns} is not whole blocks; "
            "accepted: a type whose block divides the row, as affine4.g32.sym (32)"
        )


def fit(w: Tensor, spec: Spec, weight: Tensor | None, levels: Levels | None, nearest: Nearest) -> Params:
    """Scales, mins and codes of w float32 [R, C] of least weighted squared error.

    `levels` are what codes stand for; None where there are mins to find beside the scales, codes being 0 .. 2**bits-1.
    `weight` [C] or [R, C] is the importance of each squared error, None: all are alike. Raises UserError where rows are
    not whole super blocks, and for numbers that are not finite.
    """
    check_groups(spec, w.shape[1])
    found = by_pieces(w, weight, partial(_search, spec=spec, levels=levels, nearest=nearest))
    return params(spec, found)


def params(spec: Spec, found: Found) -> Params:
    """What a search found -> params with the parts of two levels, and codes."""
    codes, mins = found["codes"], found.get("mins")
    if spec.two_level is None:
        return Params(found["scales"], mins, codes=codes)
    width = spec.scale_code[0]
    parts = {"super_scales": found["supers"].flatten()}
    names = {"scales": "scale_codes"} | ({"mins": "min_codes"} if mins is not None else {})
    for name, key in names.items():
        parts[name] = found[key] if width == 8 else bits.pack(found[key], width)
    if mins is not None:
        parts["super_mins"] = found["super_mins"].flatten()
    return Params(found["scales"], mins, parts, codes)


def by_pieces(w: Tensor, weight: Tensor | None, search: Search) -> Found:
    """`search` of a few rows at a time, as many at once as torch has threads; what it found, joined."""
    weight = check_finite(w, weight)
    rows = max(1, (_PIECE if w.device.type == "cpu" else _DEVICE_PIECE) // w.shape[1])

    def one(start: int) -> Found:
        x = w[start : start + rows]
        return search(x, (weight[start : start + rows] if weight.shape[0] > 1 else weight).expand_as(x))

    starts = range(0, w.shape[0], rows)
    # Torch runs an operation on so few numbers in the thread that called it.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        pieces = list(pool.map(one, starts))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def check_finite(w: Tensor, weight: Tensor | None) -> Tensor:
    """The importance divided by its mean, float32 [1, C] or [R, C], none of it 0: a search needs something to minimise.

    Raises UserError for weights or importances that are not finite, or importances below 0.
    """
    # A sum of products with 0 is 0 or NaN: cheaper than a mask of everything.
    if not torch.equal(sum((row * 0).sum() for row in w.split(max(1, (1 << 20) // w.shape[1]))), w.new_zeros(())):
        raise UserError(
            f"a weight of shape {tuple(w.shape)} holds NaN or infinity and cannot be quantized; "
            "fix: repair or re-download the checkpoint, or leave this tensor unquantized"
        )
    if weight is None:
        return w.new_ones(1, w.shape[1])
    # One importance for all rows may come spread over them.
    weight = weight.reshape(1, -1) if weight.dim() == 1 else weight[:1] if weight.stride(0) == 0 else weight
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise UserError(
            "the importance of a weight's columns holds NaN, infinity or negative numbers; accepted: mean squares of "
            "inputs, 0 or more. Fix: calibrate again (--calib), or quantize without importance"
        )
    mean = weight.mean()
    return torch.ones_like(weight) if float(mean) == 0 else (weight / mean).clamp_(min=1e-10)


def group_major(t: Tensor, group: int) -> Tensor:
    """[r, C] -> [group, r * C / group]"""
    return t.reshape(-1, group).t().contiguous()


def spread_weight(x: Tensor, weight: Tensor, span: int) -> Tensor:
    """weight * sqrt(2 * mean of x**2 over `span` columns + x**2), [r, C]: an input that is large where the weight is
    large does more harm than its mean square says (llama.cpp's rule, found by trying)."""
    squares = (x * x).view(x.shape[0], -1, span)
    mean = squares.mean(-1, keepdim=True).mul_(_SPREAD)
    return squares.add_(mean).sqrt_().view(x.shape).mul_(weight)


def _search(x: Tensor, weight: Tensor, spec: Spec, levels: Levels | None, nearest: Nearest) -> Found:
    rows, group = x.shape[0], spec.group
    # As llama.cpp has it: IQ4_NL's blocks are super blocks of one.
    span = group * spec.two_level[1] if spec.two_level else group if spec.table else x.shape[1]
    numbers, importance = group_major(x, group), group_major(spread_weight(x, weight, span), group)
    if levels:
        scales, found = _store(spec, *scaled(numbers, importance, levels), signed=True)
        known = Params(scales[None])
    else:
        scale, minimum, mean, total = ranged(numbers, importance, (1 << spec.bits) - 1)
        scales, found = _store(spec, scale, total, signed=False)
        moved = mean + (minimum - mean) * (scales / scale.masked_fill(scale == 0, 1.0))
        depth = -torch.where(scale == 0, minimum, moved).clamp_(max=0)
        below, second = _store(spec, depth, total, signed=False)
        found["mins"] = -below
        if second:
            found |= {"min_codes": second["scale_codes"], "super_mins": -second["supers"]}
        known = Params(scales[None], -below[None])
    codes = nearest(numbers, spec, known)[0]
    found |= {"scales": scales, "codes": codes.t()}
    return {name: t.reshape(rows, -1) for name, t in found.items()}


def _store(spec: Spec, values: Tensor, sharp: Tensor, signed: bool) -> tuple[Tensor, Found]:
    """Scales (or mins) [B] as they will be decoded, and the integers and float16 they are decoded from if there are two
    levels. `sharp` [B] is the weight of their squared errors."""
    if spec.two_level is None:
        return held(values, scale_dtype(spec.scale)).float(), {}
    dtype, per = scale_dtype(spec.two_level[0]), spec.two_level[1]
    width = spec.scale_code[0]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    small = values.view(-1, per).t().contiguous()
    supers = held(scaled(small, sharp.view(-1, per).t().contiguous(), integers(low, high))[0], dtype)
    step = supers.float()
    numbers = (small / step).nan_to_num_(0.0).round_().clamp_(low, high)
    return (numbers * step).t().reshape(-1), {"supers": supers, "scale_codes": (numbers - low).to(torch.uint8).t()}


def held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, the largest number of which is not exceeded."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)
