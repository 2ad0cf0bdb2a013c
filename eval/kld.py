"""KL divergence of a quantized model from its base, token by token: the most sensitive measure of what quantization
cost.

Per scored position, with b the base's and p the model's distribution over the vocabulary:

  KLD = sum_v b_v (ln b_v - ln p_v)          dp = p(correct token) - b(correct token)          top-1 agreement = same
  argmax

These are llama-perplexity's statistics (`--kl-divergence`), with one difference: it stores the base's log-probabilities
in 16 bits, cut off at e^-16, so that a model against itself gives about 5e-4 there; here both models run side by side,
window by window, on exact logits in float64, so that a model against itself gives exactly 0 and nothing large is kept.
Fractions are not multiplied by 100. The default protocol is llama.cpp's too (second half of every window; see ppl.py).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .ppl import batches, check_positions, cut, logits_of, mean_error, row_slices, token_nll

PERCENTILES = {"min": 0.0, "p01": 0.01, "p05": 0.05, "p10": 0.1, "median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
PERCENTILES |= {"p999": 0.999, "max": 1.0}


def check_same_tokens(tokenizer: Any, base: Any) -> None:
    """UserError unless both tokenizers map every token to the same id: else the models would read different text."""
    ours, theirs = tokenizer.get_vocab(), base.get_vocab()
    if ours == theirs:
        return
    token = next(t for t in sorted({*ours, *theirs}) if ours.get(t) != theirs.get(t))
    raise UserError(
        f"the two models have different tokenizers ({len(ours)} and {len(theirs)} tokens; {token!r} is "
        f"{ours.get(token)} in the model and {theirs.get(token)} in --base): "
        "pass the unquantized form of the same model as --base"
    )


def token_kld(logits: Tensor, base: Tensor) -> Tensor:
    """sum_v b_v (ln b_v - ln p_v) of two logits [T, V], float64 [T] on the CPU; exactly 0 for equal logits."""
    parts = []
    for rows in row_slices(*logits.shape):
        ln_p, ln_b = logits[rows].double().log_softmax(-1), base[rows].to(logits.device).double().log_softmax(-1)
        parts.append((ln_b.exp() * (ln_b - ln_p)).sum(-1))
    return torch.cat(parts).cpu()


def statistics(nll: Tensor, nll_base: Tensor, kld: Tensor, same: Tensor) -> dict[str, float]:
    """Every figure llama-perplexity prints, from float64 [n] vectors and bool [n] `same` (equal argmax).

    Standard errors are `<name>_stderr`; ln_ratio = ln(ppl / ppl_base), whose error uses the covariance of the two.
    """
    (mean, error), (mean_base, error_base) = mean_error(nll), mean_error(nll_base)
    ppl, ppl_base, n = math.exp(mean), math.exp(mean_base), len(nll)
    covariance = float(((nll * nll_base).mean() - mean * mean_base) / max(1, n - 1))
    ln_error = math.sqrt(max(0.0, error**2 + error_base**2 - 2 * covariance))
    correlation = covariance / (error * error_base) if error > 0 and error_base > 0 else 1.0
    change = torch.exp(-nll) - torch.exp(-nll_base)
    square, square_error = mean_error(change**2)
    rms = math.sqrt(square)
    agreement, kld_mean = float(same.double().mean()), mean_error(kld)
    found = {
        "kld_mean": kld_mean[0],
        "kld_stderr": kld_mean[1],
        "top1_agreement": agreement,
        "top1_stderr": math.sqrt(agreement * (1 - agreement) / max(1, n - 1)),
        "ppl": ppl,
        "ppl_stderr": ppl * error,
        "ppl_base": ppl_base,
        "ppl_base_stderr": ppl_base * error_base,
        "ln_ratio": mean - mean_base,
        "ln_ratio_stderr": ln_error,
        "cor": correlation,
        "dp_mean": mean_error(change)[0],
        "dp_stderr": mean_error(change)[1],
        "dp_rms": rms,
        "dp_rms_stderr": square_error / (2 * rms) if rms > 0 else 0.0,
    }
    values = np.quantile(kld.numpy(), list(PERCENTILES.values()))
    return found | {f"kld_{name}": float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def kl_divergence(
    model: Any,
    base: Any,
    ids: Tensor,
    ctx: int,
    protocol: str = "llamacpp",
    max_tokens: int | None = None,
    batch: int = 1,
    bos: int | None = None,
) -> dict[str, Any]:
    """KLD(base || model) and its companions on token ids int64 [T]; arguments and errors as `ppl.perplexity`.

    Returns the keys of `statistics` with tokens (scored positions), ctx and protocol. Raises UserError also where the
    two models predict over vocabularies of different sizes.
    """
    check_positions(model, ctx)
    check_positions(base, ctx)
    chunks = cut(ids, ctx, protocol, bos, max_tokens)
    columns: list[tuple[Tensor, ...]] = []
    for inputs, targets in batches(chunks, batch, f"kld {protocol} {ctx}"):
        logits, logits_base = (logits_of(m, inputs, chunks.scored) for m in (model, base))
        if logits.shape != logits_base.shape:
            raise UserError(
                f"the model predicts over {logits.shape[1]} tokens and --base over {logits_base.shape[1]}: "
                "pass the unquantized form of the same model as --base"
            )
        same = (logits.argmax(-1).cpu() == logits_base.argmax(-1).cpu()).reshape(-1)
        nlls = (token_nll(logits, targets), token_nll(logits_base, targets))
        columns.append((*nlls, token_kld(logits, logits_base), same))
    return statistics(*(torch.cat(column) for column in zip(*columns, strict=True))) | {
        "tokens": chunks.tokens,
        "ctx": ctx,
        "protocol": protocol,
    }
