# mypy: allow-untyped-defs
"""Temperature, min-p, top-k, top-p and the draw in one launch: samplers/steps.py and samplers/draw.py on a GPU.

A program takes a row and reads it three times; nothing is sorted and nothing read back to the host. It finds the
largest logit, then a bound that what top-k or top-p keep cannot lie below, gathers the tokens above the bound (mostly
a few thousand), and does the rest on those.

    threshold   the largest number that enough tokens reach: k of them, or so many that their probability is top_p. It
                is found among the integers whose order is that of the floats (the radix sort's image of a float), the
                interval being cut into nine at a time: at most eleven passes for all 2**32.
    draw        the exponential race of draw.py, with its hash and, in float32 as there, its logarithm.

Sums are taken in float32 in a fixed order, another than torch's cumsum: whether the token at the edge of top_p stays
can differ where the sum before it is within rounding of top_p. min_p, top_k and ties are exact.

Which rows come here is up to the caller (serve/tail.py); the torch twin is samplers.pipeline.sample itself, which this
folder may not import, so the operator has no path on a CPU. Left out: more than one program a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import ops
from .cases import Case, Target, Weight
from .lang import EXACT, HAVE_TRITON, interpreted, jit, need_triton, tl

# draw.py's numbers lie within 2^-54 and 17, so that no token less likely than the best by exp(-41) or more can win.
_HOPELESS = tl.constexpr(41.0)
# Of draw.py, as signed integers.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_SECOND = tl.constexpr(0x94D049BB133111EB - 2**64)
# Not tuned: no GPU was at hand.
_BLOCK = 4096
_OPTIONS = {"num_warps": 8, **EXACT}
_WAYS = 8


@jit
def _image(x):
    """float32 -> int32 of the same order; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _log1p_of_minus(u):
    """log(1 - u) of float32 0 < u < 1 within an ulp: FreeBSD's s_log1pf.c. Triton's own log is no better than 2^-22
    near 1, where the smallest numbers of a race are decided."""
    v = 1.0 - u
    lost = ((1.0 - v) - u) / v
    bits = v.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    r = w * (0.40000972152 + w * 0.24279078841) + z * (0.66666662693 + w * 0.28498786688)
    half = 0.5 * f * f
    return s * (half + r) + (exponent * 9.0580006145e-06 + lost) - half + f + exponent * 0.69313812256


@jit
def _exponential(key, token):
    """draw.exponential."""
    x = (token.to(tl.int64) + 1) * _GAMMA + key
    # The masks make the shifts unsigned.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = ((x >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) * 2.0**-53 + 2.0**-54
    return -_log1p_of_minus(tl.minimum(uniform, 1 - 2.0**-24))


@jit
def _argmax(values, N, BLOCK: tl.constexpr):
    """The largest of float32 values [N] and where it is, the first among equals."""
    most, place = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < N, other=float("-inf"))
        place = tl.where(value > most, at, place)
        most = tl.maximum(value, most)
    largest = tl.max(most, 0)
    return largest, tl.min(tl.where(most == largest, place, N), 0)


@jit
def _tails(values, N, temperature, best, probes, counting, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [WAYS]: of values [N] / temperature whose image is at least probes [WAYS], how many there are (counting)
    or the sum of exp(value - best)."""
    sums = tl.zeros([WAYS], tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(values + at, mask=at < N, other=float("-inf")), temperature)
        weight = tl.where(counting, 1.0, tl.exp(value - best))
        sums += tl.sum(tl.where(_image(value)[None, :] >= probes[:, None], weight[None, :], 0.0), 1)
    return sums


@jit
def _threshold(values, N, best, low, wanted, counting, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest image, `low` or more, whose tail (as of `_tails`) is at least `wanted` > 0, and the tail above it."""
    ways = tl.arange(0, WAYS)
    # The tail of lo is large enough (or lo is `low`), that of hi is not.
    lo, hi = low.to(tl.int64), _image(best).to(tl.int64) + 1
    above = 0.0
    while hi - lo > 1:
        step = (hi - lo + WAYS) // (WAYS + 1)
        probes = tl.minimum(lo + step * (ways + 1), hi).to(tl.int32)
        sums = _tails(values, N, 1.0, best, probes, counting, WAYS, BLOCK)
        reached = tl.sum((sums >= wanted).to(tl.int32), 0)
        above = tl.where(reached < WAYS, tl.sum(tl.where(ways == reached, sums, 0.0), 0), above)
        lo += step * reached
        hi = tl.minimum(lo + step, hi)
    return lo.to(tl.int32), above


@jit
def _gather(logits, V, temperature, bound, values, ids, BLOCK: tl.constexpr):
    """logits [V] / temperature whose image is at least `bound`, in order, into values and ids -> their number."""
    count = 0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(logits + at, mask=at < V, other=float("-inf")), temperature)
        kept = (at < V) & (_image(value) >= bound)
        to = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, value, mask=kept)
        tl.store(ids + to, at, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    return count


@jit
def _race(values, ids, N, best, threshold, ties, key, otherwise, BLOCK: tl.constexpr):
    """The token that wins among those above the threshold and the first `ties` at it; `otherwise` if there is none."""
    score, token = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32) + otherwise
    seen = 0
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < N, other=float("-inf"))
        name = tl.load(ids + at, mask=at < N, other=0)
        tie = (at < N) & (_image(value) == threshold)
        rank = seen + tl.cumsum(tie.to(tl.int32), 0)
        seen += tl.sum(tie.to(tl.int32), 0)
        kept = (_image(value) > threshold) | (tie & (rank <= ties))
        new = tl.where(kept, tl.exp(value - best) / _exponential(key, name), 0.0)
        token = tl.where(new > score, name, token)
        score = tl.maximum(new, score)
    return tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)


@jit
def _drawn(
    logits, largest, first, V, temperature, log_min_p, k, mass, key, values, ids,
    WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token drawn for one row, whose largest logit is that of token `first`."""
    best = tl.div_rn(largest, temperature)
    floor = tl.maximum(_image(best + log_min_p), _image(best - _HOPELESS))
    counting, sharing = (k > 0) & (k < V), mass < 1
    wanted, total, bound = k.to(tl.float32), 1.0, floor
    if counting | sharing:
        # 0.5, 1, 2 ... 64 below the best, the last of which is the floor.
        below = (1 << tl.arange(0, WAYS)).to(tl.float32) * (64.0 / (1 << (WAYS - 1)))
        probes = tl.maximum(_image(best - below), floor)
        sums = _tails(logits, V, temperature, best, probes, counting, WAYS, BLOCK)
        total = tl.max(sums, 0)
        bound = tl.max(tl.where(sums >= tl.where(counting, wanted, mass * total), probes, floor), 0)
    count = _gather(logits, V, temperature, bound, values, ids, BLOCK)
    # What one thread stored others read.
    tl.debug_barrier()
    threshold, ties = bound, count
    if counting:
        threshold, _ = _threshold(values, count, best, bound, wanted, counting, WAYS, BLOCK)
        if sharing:
            kept = tl.zeros([WAYS], tl.int32) + threshold
            total = tl.max(_tails(values, count, 1.0, best, kept, False, WAYS, BLOCK), 0)
    if sharing:
        # The best token has weight 1 and is kept whatever top_p is, even what float32 rounds to 0.
        wanted = tl.maximum(mass * total, 1.0)
        threshold, above = _threshold(values, count, best, threshold, wanted, False, WAYS, BLOCK)
        value = (threshold ^ ((threshold >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        needed = tl.ceil((wanted - above) / tl.exp(value - best))
        ties = tl.minimum(needed, count.to(tl.float32)).to(tl.int32)
    return _race(values, ids, count, best, threshold, ties, key, first, BLOCK)


@jit
def sample_kernel(
    logits, temperature, log_min_p, top_k, top_p, greedy, key, tokens, values, ids, V, row_stride,
    WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of logits begins at r * row_stride; values float32 [B, V] and ids int32 [B, V] are scratch. Grid (B,)."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    largest, token = _argmax(row, V, BLOCK)
    if tl.load(greedy + r) == 0:
        token = _drawn(
            row, largest, token, V, tl.load(temperature + r), tl.load(log_min_p + r), tl.load(top_k + r),
            tl.load(top_p + r), tl.load(key + r), values + r * V, ids + r * V, WAYS, BLOCK,
        )  # fmt: skip
    tl.store(tokens + r, token.to(tl.int64))


def runs_on(device: torch.device) -> bool:
    """Whether `sample_tail` takes tensors of this device."""
    return interpreted() or (HAVE_TRITON and device.type == "cuda")


def _sample_tail(
    logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, greedy: Tensor, key: Tensor
) -> Tensor:
    need_triton("sampling on a GPU")
    if not runs_on(logits.device):
        raise UserError(f"sample_tail runs on CUDA tensors, not on {logits.device}: use samplers.pipeline.sample there")
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    values = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, vocabulary, dtype=torch.int32, device=logits.device)
    # torch's logarithm, so that the threshold of min_p is that of samplers/steps.py to the last bit.
    sample_kernel[(rows,)](
        logits, temperature, min_p.log(), top_k, top_p, greedy, key, tokens, values, ids, vocabulary, logits.stride(0),
        WAYS=_WAYS, BLOCK=_BLOCK, **_OPTIONS,
    )  # fmt: skip
    return tokens


def _sample_tail_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


# logits float32 [B, V], rows at any stride, each with a finite maximum; temperature > 0, min_p and top_p float32 [B],
# top_k int64 [B] (0: all), greedy bool [B], key int64 [B] (draw.keys) -> tokens int64 [B]. A greedy row gets the first
# of its largest logits; so does one that its temperature makes infinite.
sample_tail = ops.define(
    "sample_tail(Tensor logits, Tensor temperature, Tensor min_p, Tensor top_k, Tensor top_p, Tensor greedy, "
    "Tensor key) -> Tensor",
    _sample_tail,
    _sample_tail_fake,
)


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """The one kernel, whatever the vocabulary."""
    pointers = dict.fromkeys(("logits", "temperature", "log_min_p", "top_p", "values"), "*fp32")
    pointers |= dict.fromkeys(("top_k", "key", "tokens"), "*i64") | {"greedy": "*i1", "ids": "*i32"}
    arguments = pointers | dict.fromkeys(("V", "row_stride"), "i32")
    tile = {"WAYS": _WAYS, "BLOCK": _BLOCK}
    yield Case("sample_tail", 1, "float32", "sample", sample_kernel, arguments, tile, _OPTIONS, "fp32")
