"""Steps that remove tokens by their probability, and XTC and skew, which work on the ranking.

Each is one pure function from logits [B, V] to logits [B, V] with -inf for what it removes; parameters are [B, 1]. The
most likely token always stays, except for XTC, whose purpose is to remove it, and typical_p, which begins with the
most typical one. Tokens already at -inf have probability 0. Ties are kept by value, never cut by position (top_k,
min_p, top_a, cutoffs), so that the result does not depend on the order of a sort; those whose definition needs an
order (top_p, typical_p, tfs, xtc, skew) rank the lower token id first among equals.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

from .steps import entropy, total

# top_p looks at this many best tokens and sorts a row only if its set is larger.
HEAD = 1024
# Of float32: beyond the first is infinity, below the second nothing but 0.
LARGEST, _SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
# Lines that a row is laid in to pass over most of its tokens at once; see `above`.
_FOLD = 16


def min_p(logits: Tensor, fraction: Tensor) -> Tensor:
    """Keep tokens with p >= fraction * max p, compared as l >= max l + ln fraction (https://arxiv.org/abs/2407.01082)."""
    return cut(logits, logits, logits.amax(-1, keepdim=True) + fraction.log())


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k largest logits and those equal to the k-th; k int64, 0 keeps all (https://arxiv.org/abs/1805.04833)."""
    k = torch.where((k == 0) | (k > logits.shape[-1]), logits.shape[-1], k)
    most = int(k.max())
    largest = _candidates(logits, most)[0].topk(most, dim=-1).values
    return cut(logits, logits, largest.gather(-1, k - 1))


def top_p(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least `mass`; 1 keeps all.

    Nucleus sampling (https://arxiv.org/abs/1904.09751): a token stays while those before it hold less than `mass`, so
    the one that crosses it stays, and the most likely one always does.
    """
    probs = logits.softmax(-1)
    index = _best(logits, min(HEAD, logits.shape[-1]))
    inside = _inside(probs.gather(-1, index), mass)
    # The most counts: where few tokens are left the best end in several that stand for none, all with id 0.
    kept = torch.zeros_like(logits).scatter_reduce(-1, index, inside.float(), "amax")
    # Rows whose set may reach beyond the head: the last token kept ties with the last of the head.
    ranked = logits.gather(-1, index)
    beyond = ranked.gather(-1, inside.sum(-1, keepdim=True) - 1) <= ranked[:, -1:]
    rows = beyond.nonzero()[:, 0]
    if logits.shape[-1] > HEAD and len(rows):
        index = _ranked(logits[rows])
        inside = _inside(probs[rows].gather(-1, index), mass[rows])
        kept[rows] = torch.zeros_like(kept[rows]).scatter(-1, index, inside.float())
    return cut(logits, kept, logits.new_ones(1, 1))


def top_a(logits: Tensor, factor: Tensor) -> Tensor:
    """Keep tokens with p >= factor * (max p)^2 (https://github.com/BlinkDL/RWKV-LM#the-top-a-sampling-method)."""
    probs = logits.softmax(-1)
    best = probs.amax(-1, keepdim=True)
    return cut(logits, probs, best.minimum(factor * best * best))


def epsilon_cutoff(logits: Tensor, epsilon: Tensor) -> Tensor:
    """Keep tokens with p >= epsilon (https://arxiv.org/abs/2210.15191, epsilon sampling)."""
    probs = logits.softmax(-1)
    return cut(logits, probs, epsilon.minimum(probs.amax(-1, keepdim=True)))


def eta_cutoff(logits: Tensor, eta: Tensor) -> Tensor:
    """Keep tokens with p >= min(eta, sqrt(eta) * exp(-H)) (https://arxiv.org/abs/2210.15191, eta sampling)."""
    return epsilon_cutoff(logits, eta.minimum(eta.sqrt() * (-entropy(logits)).exp()))


def top_n_sigma(logits: Tensor, n: Tensor) -> Tensor:
    """Keep l >= max l - n * sigma, sigma the standard deviation of the row's finite logits; n 0 keeps all.

    https://arxiv.org/abs/2411.07641; over finite logits as in llama.cpp, so that a banned token does not switch it off.
    """
    count = alive(logits)
    mean = total(threshold(logits, -LARGEST, 0.0)) / count
    variance = total(threshold(logits - mean, -LARGEST, 0.0).square()) / count
    limit = logits.amax(-1, keepdim=True) - n * variance.sqrt()
    return cut(logits, logits, torch.where(n > 0, limit, -torch.inf))


def typical_p(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the smallest set of tokens nearest to the entropy, by |-ln p - H|, that holds at least `mass`.

    Locally typical sampling (https://arxiv.org/abs/2202.00666, equation 9). As in top_p the token that crosses `mass`
    stays; vLLM's descendants drop it.
    """
    logprobs = logits.log_softmax(-1)
    distance = (-logprobs - entropy(logits)).abs()
    index = distance.sort(dim=-1, stable=True).indices
    inside = _inside(logprobs.exp().gather(-1, index), mass)
    return cut(logits, torch.zeros_like(logits).scatter(-1, index, inside.float()), logits.new_ones(1, 1))


def tfs(logits: Tensor, z: Tensor) -> Tensor:
    """Tail-free sampling: cut the ranked probabilities where the curvature before holds more than `z` of all of it.

    https://www.trentonbricken.com/Tail-Free-Sampling/: d = |second difference of p|, normalised to sum 1; position
    i + 1 goes where the running sum of d up to i exceeds z. As published, the first always stays and the last of a row
    never does (if it is not the only one); z 1 keeps all.
    """
    index = _ranked(logits)
    probs = logits.softmax(-1).gather(-1, index)
    curvature = probs.diff(n=2, dim=-1).abs()
    share = curvature.cumsum(-1) / total(curvature) if curvature.shape[-1] else curvature
    kept = torch.ones_like(logits, dtype=torch.bool)
    # No curvature at all makes the share NaN, which exceeds nothing.
    kept[:, 1:-1] = ~(share > z)
    kept[:, 1:][:, -1:] = False
    kept |= z >= 1
    return cut(logits, torch.zeros_like(logits).scatter(-1, index, kept.float()), logits.new_ones(1, 1))


def xtc(logits: Tensor, threshold: Tensor, on: Tensor, protected: Tensor) -> Tensor:
    """Exclude top choices: of the tokens with p >= threshold remove all but the least likely, in rows where `on`.

    By its author (https://github.com/oobabooga/text-generation-webui/pull/6335): a row that would lose a token in
    `protected` (bool, [B, V] or [1, V]: end of sequence, newline) is left alone, or texts would never end. `on`: bool
    [B, 1], the coin of `xtc_probability`. Among equally likely tokens the highest id is the least likely.
    """
    probs = logits.softmax(-1)
    top = (probs >= threshold) & (probs > 0)
    least = torch.where(top, probs, torch.inf).amin(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(top & (probs == least), ids, -1).amax(-1, keepdim=True)
    gone = top & (ids != last) & on
    gone &= ~(gone & protected).any(-1, keepdim=True)
    return logits.masked_fill(gone, -torch.inf)


def skew(logits: Tensor, skew: Tensor) -> Tensor:
    """Bend the ranking: with C the running sum of the ranked p, p_i -> C_i^e - C_(i-1)^e, e = exp(skew); 0 is neutral.

    ExLlamaV2's skew, on the ranked tokens as there (Aphrodite's follows token ids, which have no meaning). Above 0 the
    tail gains, below 0 the top.
    """
    index = _ranked(logits)
    probs = logits.double().softmax(-1).gather(-1, index)
    running = probs.cumsum(-1).clamp(max=1) ** skew.double().exp()
    bent = running.diff(dim=-1, prepend=running.new_zeros(len(running), 1)).log()
    # Beyond what float64 tells from 1 a token would vanish; the least that is left keeps the order.
    bent = torch.where((probs > 0) & (bent == -torch.inf), -700.0, bent).to(logits.dtype)
    moved = torch.empty_like(logits).scatter(-1, index, bent)
    return torch.where((skew == 0) | (logits == -torch.inf), logits, moved)


def cut(logits: Tensor, measure: Tensor, least: Tensor) -> Tensor:
    """logits where measure >= least, -inf elsewhere; measure [B, V] and least [B, 1] float32. NaN stays NaN.

    Sums instead of a mask, whose kernels run on the CPU one element at a time: 30 against 270 us a row of 128 k.
    """
    short = (least.clamp(min=-LARGEST) - measure).clamp_(min=0)
    return torch.threshold_(short.neg_(), -_SMALLEST, -torch.inf).add_(logits)


def alive(logits: Tensor) -> Tensor:
    """float32 [B, 1]: how many tokens of a row are left, NaN among them."""
    # As numbers, which add up exactly below 2^24: adding up a mask takes 80 instead of 11 us a row of 128 k.
    return torch.ne(logits, -torch.inf, out=torch.empty_like(logits)).sum(-1, keepdim=True)


def _inside(probs: Tensor, mass: Tensor) -> Tensor:
    """Whether each token of rows in order of preference belongs to the smallest set that holds `mass`."""
    # What stands before a token, as the sum up to its predecessor: the difference from its own sum may round below that
    # of a less preferred token, and leave a gap.
    inside = torch.ones_like(probs, dtype=torch.bool)
    inside[:, 1:] = probs.cumsum(-1)[:, :-1] < mass
    # The sum reaches 1.0 early when the rest is below float32's precision.
    return inside | (mass >= 1)


def _ranked(logits: Tensor) -> Tensor:
    """int64 [B, V]: all tokens, the largest logit first, lower id first among equals."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def _best(logits: Tensor, count: int) -> Tensor:
    """int64 [B, count]: the tokens with the largest logits, best first, lower id first among equals."""
    values, ids = _candidates(logits, count)
    return ids.gather(-1, _ranked(values)[:, :count])


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits and ids [B, N], N >= count, in order of id, among which are the `count` largest of each row.

    The count-th largest of the maxima of columns (`_folded`) is at most the count-th largest logit, and few logits
    exceed it. A topk of the row itself takes four times as long (1,024 of 128 k: 1.0 against 0.25 ms a row on a core).
    """
    folded = _folded(logits)
    if folded.shape[-1] < 4 * count:
        return logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    found, ids = above(logits, folded.topk(count, dim=-1).values[:, -1:])
    missing = max(0, count - found.shape[-1])
    return pad(found, (0, missing), value=-torch.inf), pad(ids, (0, missing))


def above(logits: Tensor, bound: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and ids [B, N] of the tokens that are not below bound [B, 1], in order of id, then -inf and id 0.

    N is `width`, or what the fullest row needs. NaN is not below anything: it must reach the report of broken rows.
    Columns without such a token are passed over: looking at every token of a mask takes 0.15 ms a row of 128 k.
    """
    folded = _folded(logits)
    high, columns = folded.shape[-1], _placed(folded, ~(folded < bound))
    beside = torch.arange(high * _FOLD, logits.shape[-1], device=logits.device)
    rows = torch.arange(_FOLD, device=logits.device)[:, None] * high
    ids = (rows + columns[1][:, None]).flatten(1)
    ids = torch.cat([ids, beside.expand(len(ids), -1)], dim=-1)
    values = logits.gather(-1, ids)
    # What stands for no column is no token either.
    empty = (columns[0] == -torch.inf).repeat(1, _FOLD)
    mask = ~(values < bound)
    mask[:, : empty.shape[-1]] &= ~empty
    found, place = _placed(values, mask, width)
    return found, ids.gather(-1, place)


def _folded(logits: Tensor) -> Tensor:
    """[B, V // 16]: the maxima of columns, where a row is laid in _FOLD lines, one below the other."""
    width = logits.shape[-1] // _FOLD
    return logits[:, : width * _FOLD].reshape(len(logits), _FOLD, width).amax(1)


def _placed(values: Tensor, mask: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
    """What of values [B, V] is in `mask` and where it stands, [B, N] in the same order, then -inf and 0."""
    rows, at = mask.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(values))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(values), width or int(counts.max()))
    found = values.new_full(shape, -torch.inf).index_put((rows, place), values[rows, at])
    return found, at.new_zeros(shape).index_put((rows, place), at)
