"""Which rows of a step the fused sampler of a GPU takes (kernels/sample.py), and what it needs of them.

A row whose parameters are neutral but for temperature, min_p, top_k and top_p goes to the operator, with any seed, stop
rule or limit; every other one, and one whose log-probabilities are wanted, goes through the samplers' pipeline. Both
draw the same token. `BITSMITH_KERNELS` (kernels/paths.py) set to anything but `triton` sends all rows there.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..kernels.paths import forced
from ..kernels.sample import runs_on, sample_tail
from ..samplers.draw import keys
from ..samplers.params import SamplingParams
from ..samplers.pipeline import Sampled
from .scheduler import Seq

# What the operator applies, in its order.
TAIL = ("temperature", "min_p", "top_k", "top_p")
# What only the engine reads. A field that is in neither keeps its rows out, also one that is yet to come.
_ENGINE = {"seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "skip_special_tokens"}
_ENGINE |= {"include_stop_str_in_output"}
_OTHERS = tuple(each.name for each in fields(SamplingParams) if each.name not in {*TAIL, *_ENGINE})


def sample(
    logits: Tensor, seqs: Sequence[Seq], pipeline: Callable[[Tensor, list[Seq]], list[Sampled | None]]
) -> list[Sampled | None]:
    """One token per sequence from logits float32 [len(seqs), V], whose rows have a finite maximum; `pipeline` does so
    for the rows that the operator cannot take, and gives None where all tokens are banned."""
    usable = forced() in ("", "triton") and runs_on(logits.device)
    fused = [row for row, seq in enumerate(seqs) if usable and seq.params.is_neutral(*_OTHERS)]
    if not fused:
        return pipeline(logits, list(seqs))
    tokens = _fused(logits if len(fused) == len(seqs) else logits[fused], [seqs[row] for row in fused])
    found: dict[int, Sampled | None] = {row: Sampled(token, None, ()) for row, token in zip(fused, tokens, strict=True)}
    rest = [row for row in range(len(seqs)) if row not in found]
    if rest:
        found.update(zip(rest, pipeline(logits[rest], [seqs[row] for row in rest]), strict=True))
    return [found[row] for row in range(len(seqs))]


def _fused(logits: Tensor, seqs: Sequence[Seq]) -> list[int]:
    params, device = [seq.params for seq in seqs], logits.device
    shares = [[each.temperature, each.min_p, each.top_p] for each in params]
    temperature, min_p, top_p = torch.tensor(shares, dtype=torch.float32, device=device).T.contiguous()
    top_k = torch.tensor([each.top_k for each in params], device=device)
    greedy = torch.tensor([each.greedy for each in params], device=device)
    key = keys([seq.seed for seq in seqs], [seq.num_output for seq in seqs], device)
    tokens: list[int] = sample_tail(logits, temperature, min_p, top_k, top_p, greedy, key).tolist()
    return tokens
