"""Steps that move logits: biases, bans, penalties, temperature, smoothing. Those that remove tokens: truncation.py.

Each is one pure function from logits [B, V] to logits [B, V], its definition and source in its docstring. A parameter
is a tensor [B, 1] with one value per row; a row with the neutral value comes back bit for bit. Removing a token means
-inf. Sparse inputs name logits by `at = (rows[N], tokens[N])`. Nothing here knows SamplingParams or the other steps:
which of them run, for which rows and in which order is up to pipeline.py.
"""

import torch
from torch import Tensor

At = tuple[Tensor, Tensor]


def guidance(logits: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """n + scale (l - n) on the log-softmax of logits [B, V] and of `negative` [B, V], those after a negative prompt.

    Classifier-free guidance (https://arxiv.org/abs/2306.17806, equation 7). A token that either rules out stays as it
    is in `logits`.
    """
    wanted, other = logits.log_softmax(-1), negative.log_softmax(-1)
    ruled_out = (wanted == -torch.inf) | (other == -torch.inf)
    return torch.where(ruled_out, wanted, other + scale * (wanted - other))


def logit_bias(logits: Tensor, at: At, bias: Tensor) -> Tensor:
    """Add bias[N] to the logits at `at`, which holds no pair twice (OpenAI API reference, `logit_bias`)."""
    return logits.index_put(at, logits[at] + bias)


def ban(logits: Tensor, at: At) -> Tensor:
    """Remove the tokens at `at`."""
    return logits.index_put(at, logits.new_tensor(-torch.inf))


def allow(logits: Tensor, at: At, free: Tensor) -> Tensor:
    """Remove every token but those at `at`, in rows that are not `free` (bool [B, 1])."""
    return torch.where(free, logits, torch.full_like(logits, -torch.inf).index_put(at, logits[at]))


def repetition_penalty(logits: Tensor, at: At, factor: Tensor, weight: Tensor) -> Tensor:
    """l -> l / factor if l > 0 else l * factor for the tokens at `at` (of prompt and output), weight[N] of the way.

    CTRL (https://arxiv.org/abs/1909.05858, section 4.1), with the rule for negative logits of its implementation: the
    paper's plain division would make unlikely tokens likelier. A weight below 1 stands for a token further back than
    the range, where the penalty fades: (1 - w) l + w l' (ExLlamaV3).
    """
    seen = logits[at]
    moved = torch.where(seen > 0, seen / factor, seen * factor)
    # Only what fades takes a sum: whole and neutral penalties keep their bits, and -inf - -inf is no number.
    whole = (weight == 1) | (factor == 1) | (seen == -torch.inf)
    faded = torch.where(whole, moved, seen + (moved - seen) * weight)
    return logits.index_put(at, faded)


def presence_frequency_penalty(
    logits: Tensor, presence: Tensor, frequency: Tensor, at: At, counts: Tensor, present: Tensor
) -> Tensor:
    """l -> l - counts * frequency - present * presence for the tokens at `at`, no pair twice.

    counts[N]: how often the token is in the output; present[N]: 1. Both are less where the penalty fades with distance.
    OpenAI API reference, `frequency_penalty`; the prompt does not count, as there and in vLLM.
    """
    rows = at[0]
    return logits.index_put(at, logits[at] - counts * frequency[rows, 0] - present * presence[rows, 0])


def dry(logits: Tensor, at: At, length: Tensor, multiplier: Tensor, base: Tensor, allowed: Tensor) -> Tensor:
    """l -> l - multiplier * base^(length - allowed) for the tokens at `at`, which would prolong a repetition.

    length[N] >= allowed: how many tokens at the end of the text, the last one included, stand before an earlier
    occurrence of the token too. DRY by its author (https://github.com/oobabooga/text-generation-webui/pull/5677). The
    exponent stops short of float32's end, as in llama.cpp: -inf would leave a text that can only repeat without tokens.
    """
    rows = at[0]
    exponent = length - allowed[rows, 0]
    most = 80.0 / base[rows, 0].clamp(min=1.000001).log()
    return logits.index_put(at, logits[at] - multiplier[rows, 0] * base[rows, 0] ** exponent.minimum(most))


def temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """l -> l / temperature, temperature > 0 (Ackley, Hinton, Sejnowski 1985)."""
    return logits / temperature


def dynamic_temperature(logits: Tensor, low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
    """l -> l / T, T = low + (high - low) * (H / ln n)^exponent, H the entropy of the n tokens that are left.

    Kalomaze's entropy sampling (https://github.com/ggml-org/llama.cpp/pull/4972). A single token keeps its logit.
    """
    share = entropy(logits) / (logits > -torch.inf).sum(-1, keepdim=True).log()
    share = torch.where(share.isfinite(), share, 0.0).clamp(0, 1)
    return logits / (low + (high - low) * share**exponent).clamp(min=1e-5)


def smoothing(logits: Tensor, factor: Tensor, curve: Tensor) -> Tensor:
    """Quadratic and cubic smoothing: l -> max - k d^2 + s d^3, d = l - max, k = f (3 - c) / 2, s = f (c - 1) / 2.

    Kalomaze; the curve c is the cubic extension of text-generation-webui (PR 5551), 1 leaves the parabola. Factor 0 is
    neutral.
    """
    best = logits.amax(-1, keepdim=True)
    d = logits - best
    moved = best + d * d * (factor * (curve - 1) / 2 * d - factor * (3 - curve) / 2)
    return torch.where((factor == 0) | (d == -torch.inf), logits, moved)


def entropy(logits: Tensor) -> Tensor:
    """float32 [B, 1]: -sum p ln p in nats."""
    logprobs = logits.log_softmax(-1)
    return -total(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min))


def total(values: Tensor) -> Tensor:
    """[B, 1]: the sum of each row, the same whatever stands in the other rows.

    torch splits the sum of a single row among threads and that of several by row, so their last bits differ; a running
    sum has one order (and is kept in float64 on the CPU).
    """
    return values.cumsum(-1)[:, -1:]
