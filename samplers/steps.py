"""The samplers: each one pure function from logits [B, V] to logits [B, V], its definition and source in its docstring.

A parameter is a tensor [B, 1] with one value per row; a row with the neutral value comes back bit for bit. Removing a
token means -inf. Sparse inputs name logits by `at = (rows[N], tokens[N])`. Nothing here knows SamplingParams or the
other steps: which of them run, for which rows and in which order is up to pipeline.py.

Ties are kept by value, never cut by position (top_k, min_p), so that the result does not depend on the order of a sort;
top_p, whose definition needs an order, breaks ties by the lower token id.
"""

import torch
from torch import Tensor

At = tuple[Tensor, Tensor]

# top_p looks at this many best tokens and sorts a row only if its set is larger: 1 ms against 23 ms for a row of 128 k
# logits on one core.
HEAD = 1024


def logit_bias(logits: Tensor, at: At, bias: Tensor) -> Tensor:
    """Add bias[N] to the logits at `at`, which holds no pair twice (OpenAI API reference, `logit_bias`)."""
    return logits.index_put(at, logits[at] + bias)


def ban(logits: Tensor, at: At) -> Tensor:
    """Remove the tokens at `at`: end-of-sequence and stop tokens before `min_tokens`, as in vLLM."""
    return logits.index_put(at, logits.new_tensor(-torch.inf))


def repetition_penalty(logits: Tensor, penalty: Tensor, at: At) -> Tensor:
    """l -> l / penalty if l > 0 else l * penalty, once for each token at `at` (of prompt and output).

    CTRL (https://arxiv.org/abs/1909.05858, section 4.1), with the rule for negative logits of its implementation: the
    paper's plain division would make unlikely tokens likelier. Pairs may repeat: each is computed from the input.
    """
    seen, factor = logits[at], penalty[at[0], 0]
    return logits.index_put(at, torch.where(seen > 0, seen / factor, seen * factor))


def presence_frequency_penalty(logits: Tensor, presence: Tensor, frequency: Tensor, at: At, counts: Tensor) -> Tensor:
    """l -> l - counts * frequency - presence for the tokens at `at`, no pair twice, counts[N] >= 1 times in the output.

    OpenAI API reference, `frequency_penalty`; the prompt does not count, as there and in vLLM.
    """
    rows = at[0]
    return logits.index_put(at, logits[at] - counts * frequency[rows, 0] - presence[rows, 0])


def temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """l -> l / temperature, temperature > 0 (Ackley, Hinton, Sejnowski 1985)."""
    return logits / temperature


def min_p(logits: Tensor, fraction: Tensor) -> Tensor:
    """Keep tokens with p >= fraction * max p, compared as l >= max l + ln fraction (https://arxiv.org/abs/2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + fraction.log(), -torch.inf)


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k largest logits and those equal to the k-th; k int64, 0 keeps all (https://arxiv.org/abs/1805.04833)."""
    k = torch.where((k == 0) | (k > logits.shape[-1]), logits.shape[-1], k)
    largest = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < largest.gather(-1, k - 1), -torch.inf)


def top_p(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least `mass`; 1 keeps all.

    Nucleus sampling (https://arxiv.org/abs/1904.09751): a token stays while those before it hold less than `mass`, so
    the one that crosses it stays, and the most likely one always does.
    """
    probs = logits.softmax(-1)
    index = _best(logits, min(HEAD, logits.shape[-1]))
    inside = _inside(probs.gather(-1, index), mass)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, inside)
    # Rows whose set may reach beyond the head: the last token kept ties with the last of the head.
    ranked = logits.gather(-1, index)
    beyond = ranked.gather(-1, inside.sum(-1, keepdim=True) - 1) <= ranked[:, -1:]
    rows = beyond.nonzero()[:, 0]
    if logits.shape[-1] > HEAD and len(rows):
        index = logits[rows].sort(dim=-1, descending=True, stable=True).indices
        kept[rows] = torch.zeros_like(kept[rows]).scatter(-1, index, _inside(probs[rows].gather(-1, index), mass[rows]))
    return logits.masked_fill(~kept, -torch.inf)


def _inside(probs: Tensor, mass: Tensor) -> Tensor:
    """Whether each token of rows sorted by falling probability belongs to the smallest set that holds `mass`."""
    inside = probs.cumsum(-1) - probs < mass
    inside[:, 0] = True
    # The sum reaches 1.0 early when the rest is below float32's precision.
    return inside | (mass >= 1)


def _best(logits: Tensor, count: int) -> Tensor:
    """int64 [B, count]: the tokens with the largest logits, best first, lower id first among equals."""
    index = logits.topk(count, dim=-1).indices.sort(-1).values
    return index.gather(-1, logits.gather(-1, index).sort(dim=-1, descending=True, stable=True).indices)
