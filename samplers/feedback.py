"""Samplers that steer by what they drew: mirostat and adaptive-p.

Both hold a number per sequence that the next step depends on. `state` is what a History keeps (samplers/history.py);
`update` is pure, so that drafted tokens can be tried and taken back.
"""

import math

import torch
from torch import Tensor

from .params import SamplingParams
from .truncation import cut, top_k

# Probabilities whose ratios mirostat 1 fits Zipf's exponent to.
_ZIPF = 101
# Adaptive-p's bell: width, height, and steepness of its flanks.
_WIDTH, _PEAK, _SHARPNESS = 0.3, 5.0, 10.0

State = tuple[float, ...]


def initial(params: SamplingParams) -> State:
    """The state before the first token: mirostat's mu (bits), or adaptive-p's weighted sum and weight of past p."""
    if params.mirostat_mode:
        return (2 * params.mirostat_tau,)
    if params.adaptive_target >= 0:
        # As if every token so far had had the target probability.
        weight = 1 / (1 - params.adaptive_decay)
        return (params.adaptive_target * weight, weight)
    return ()


def update(params: SamplingParams, state: State, logprob: float) -> State:
    """The state after a token whose natural log-probability was `logprob`, before these samplers changed it."""
    if params.mirostat_mode:
        return (state[0] - params.mirostat_eta * (-logprob / math.log(2) - params.mirostat_tau),)
    if params.adaptive_target >= 0:
        return (math.exp(logprob) + params.adaptive_decay * state[0], 1 + params.adaptive_decay * state[1])
    return state


def adaptive_goal(params: SamplingParams, state: State) -> float:
    """The probability adaptive-p aims at now: the target, moved against the mean of what was drawn."""
    return min(1.0, max(0.0, 2 * params.adaptive_target - state[0] / state[1]))


def mirostat_v2(logits: Tensor, mu: Tensor) -> Tensor:
    """Keep tokens whose surprise -log2 p is at most mu [B, 1] bits, and the most likely one.

    https://arxiv.org/abs/2007.14966, as its authors' mirostat 2. What was drawn is fed back by its probability here,
    before the cut, as in their code (llama.cpp takes the one after it).
    """
    logprobs = logits.log_softmax(-1)
    return cut(logits, logprobs, logprobs.amax(-1, keepdim=True).minimum(-mu * math.log(2)))


def mirostat_v1(logits: Tensor, mu: Tensor) -> Tensor:
    """Keep the k most likely tokens, k from Zipf's law fitted to the 101 best for a surprise of mu [B, 1] bits.

    https://arxiv.org/abs/2007.14966, algorithm 1: s = sum t b / sum t^2 with t = ln (i + 1) / i, b = ln p_i / p_(i+1);
    k = (e 2^mu / (1 - N^-e))^(1/s), e = s - 1, N the vocabulary. Rounded and one more, as in the authors' code.
    """
    best = logits.log_softmax(-1).double()
    best = best.topk(min(_ZIPF, best.shape[-1]), dim=-1).values
    rank = torch.arange(1, best.shape[-1], device=logits.device, dtype=torch.float64)
    b = -best.diff(dim=-1)
    t = torch.where(b.isfinite(), ((rank + 1) / rank).log(), 0.0)
    s = (t * b.nan_to_num(0.0, 0.0)).sum(-1, keepdim=True) / t.square().sum(-1, keepdim=True)
    e, size = s - 1, logits.shape[-1]
    # e / (1 - N^-e), and its limit 1 / ln N where the exponent is 1.
    spread = torch.where(e.abs() < 1e-9, 1 / math.log(max(size, 2)), e / (1 - float(size) ** -e))
    k = (spread * 2.0 ** mu.double()) ** (1 / s)
    k = k.nan_to_num(1.0, size, 1.0).clamp(0, size).round() + 1
    return top_k(logits, k.clamp(max=size).long())


def adaptive_p(logits: Tensor, goal: Tensor) -> Tensor:
    """l -> 5 - 10 d^2 / (1 + d), d = |p - goal| / 0.3: tokens about as likely as goal [B, 1] are drawn most.

    MrJackSpade's sampler as in llama.cpp (https://github.com/ggml-org/llama.cpp/pull/17927).
    """
    distance = (logits.softmax(-1) - goal).abs() / _WIDTH
    moved = _PEAK - _SHARPNESS * distance.square() / (1 + distance)
    return torch.where(logits == -torch.inf, logits, moved)
