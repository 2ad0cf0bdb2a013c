"""Perplexity under the two protocols that published figures use. They are not comparable with each other.

  windows   GPTQ, AWQ and most papers: consecutive windows of ctx tokens, each scored on all of its ctx - 1 predictions.
            If the tokenizer adds a BOS the text begins with one; later windows begin wherever the text is. Window
            borders are not predicted and the ragged tail is dropped.
  llamacpp  llama-perplexity: the same windows, but where the tokenizer adds a BOS every window's first token is
            overwritten by it, and only the second half is scored: positions ctx/2 .. ctx-2, each predicting the next
            token, so 255 predictions a window at ctx 512.

ppl = exp(mean nll), with the standard error llama.cpp prints: ppl * sqrt((E[nll^2] - E[nll]^2) / (n - 1)), which treats
tokens as independent. Log-probabilities are exact: the model's logits, normalised and summed in float64. The strided
protocol (every token with at least half a window of history) is left out: it costs several times as much and few
figures use it.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from .text import PROTOCOLS, windows

# Rows of logits are normalised in float64 this many values at a time: 32 MiB, where a whole window of a large
# vocabulary would be gigabytes.
_SLICE = 1 << 22


@dataclass(frozen=True)
class Chunks:
    """The windows of one evaluation and which of their positions count."""

    # int64 [n, ctx], what the model reads.
    inputs: Tensor
    # int64 [n, scored], the tokens to predict.
    targets: Tensor
    # Positions of `inputs` whose next token is scored.
    scored: slice

    @property
    def tokens(self) -> int:
        """Predictions scored in all."""
        return self.targets.numel()


def cut(ids: Tensor, ctx: int, protocol: str, bos: int | None, max_tokens: int | None) -> Chunks:
    """The windows of `ids` [T] under a protocol; `bos` (see text.bos_of) is only used by llamacpp.

    Raises UserError for an unknown protocol and for a window or text too short to score one token.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; accepted: {', '.join(PROTOCOLS)}")
    first = 0 if protocol == "windows" else ctx // 2
    if first >= ctx - 1:
        raise UserError(f"--ctx {ctx} scores no token under the {protocol} protocol: pass --ctx 3 or more")
    rows = windows(ids, ctx, max_tokens)
    inputs = rows.clone()
    if protocol == "llamacpp" and bos is not None:
        inputs[:, 0] = bos
    return Chunks(inputs, rows[:, first + 1 :], slice(first, ctx - 1))


def positions_of(model: Any) -> int | None:
    """How many positions the model was built for; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def default_ctx(model: Any, ids: Tensor, longest: int, max_tokens: int | None) -> int:
    """The window where none is asked for: `longest`, cut down to the model's positions, the text and `max_tokens`."""
    return min(longest, positions_of(model) or longest, len(ids), max_tokens or longest)


def check_positions(model: Any, ctx: int) -> None:
    """UserError where the model was not built for windows of `ctx` tokens."""
    longest = positions_of(model)
    if longest is not None and ctx > longest:
        raise UserError(f"--ctx {ctx} exceeds the {longest} positions of the model: pass --ctx {longest} or less")


def batches(chunks: Chunks, batch: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs [b, ctx], targets [b, scored]) in order, with a progress bar on stderr where that is a terminal."""
    with tqdm(
        total=chunks.inputs.numel(), desc=label, unit="tok", unit_scale=True, file=sys.stderr, disable=None
    ) as bar:
        for start in range(0, len(chunks.inputs), batch):
            inputs = chunks.inputs[start : start + batch]
            yield inputs, chunks.targets[start : start + batch]
            bar.update(inputs.numel())


def logits_of(model: Any, inputs: Tensor, scored: slice) -> Tensor:
    """The model's logits [b * scored, V] at the scored positions, as it computed them."""
    with torch.inference_mode():
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits[:, scored]
    return logits.reshape(-1, logits.shape[-1])


def row_slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `rows` small enough to hold in float64."""
    step = max(1, _SLICE // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of logits [T, V] and targets int64 [T], float64 [T] on the CPU.

    Raises UserError unless all are finite.
    """
    targets = targets.reshape(-1).to(logits.device)
    parts = []
    for rows in row_slices(*logits.shape):
        exact = logits[rows].double()
        parts.append(exact.logsumexp(-1) - exact.gather(1, targets[rows, None])[:, 0])
    nll = torch.cat(parts).cpu()
    if not bool(torch.isfinite(nll).all()):
        bad = int((~torch.isfinite(nll)).nonzero()[0])
        raise UserError(
            f"the model's logits are not finite (scored token {bad} of a window): its weights or its dtype "
            "are at fault; load it in float32, or quantize it again"
        )
    return nll


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean of float64 [n] and its standard error sqrt((E[x^2] - E[x]^2) / (n - 1)); the error of one value is 0."""
    error = math.sqrt(float(values.var(correction=0)) / (len(values) - 1)) if len(values) > 1 else 0.0
    return float(values.mean()), error


def perplexity(
    model: Any,
    ids: Tensor,
    ctx: int,
    protocol: str = "windows",
    max_tokens: int | None = None,
    batch: int = 1,
    bos: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a causal transformers model on token ids int64 [T] (see text.tokenize).

    Returns ppl, its stderr, nll (mean, nats) and nll_stderr, tokens (scored predictions), ctx and protocol.
    `max_tokens` is how many tokens of text are read at most, `batch` how many windows go through the model at once;
    neither changes a window. Raises UserError for a ctx the model has no positions for, text shorter than a window, or
    logits that are not finite.
    """
    check_positions(model, ctx)
    chunks = cut(ids, ctx, protocol, bos, max_tokens)
    nll = torch.cat(
        [
            token_nll(logits_of(model, inputs, chunks.scored), targets)
            for inputs, targets in batches(chunks, batch, f"ppl {protocol} {ctx}")
        ]
    )
    mean, error = mean_error(nll)
    ppl = math.exp(mean)
    return {
        "ppl": ppl,
        "stderr": ppl * error,
        "nll": mean,
        "nll_stderr": error,
        "tokens": chunks.tokens,
        "ctx": ctx,
        "protocol": protocol,
    }
