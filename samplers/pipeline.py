"""From logits to tokens: every sampler in one order, for a batch whose rows each have their own parameters.

ORDER is the order, for every request: first what decides which token is best (bias, bans, penalties), then temperature,
then truncation by min_p, top_k and top_p, as vLLM does. Penalties act on the model's own logits, so their strength does
not depend on temperature. Truncation sees the tempered distribution: the tokens it keeps are those that would be drawn.
top_k precedes top_p, which therefore takes its share of the tokens top_k left; min_p compares ratios and could stand
anywhere but before top_p. Each step appears once and runs once (applying penalties twice squares them).

A step runs on the rows that use it and on no others, so a row's result does not depend on its neighbours. To add a
sampler: one function in steps.py, one field in params.py, one line in ORDER.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from . import steps
from .draw import draw, keys
from .params import SamplingParams


@dataclass(frozen=True)
class Context:
    """What a step may look at, row by row: parameters, history, and what the model calls the end of a sequence."""

    params: Sequence[SamplingParams]
    prompts: Sequence[Sequence[int]]
    outputs: Sequence[Sequence[int]]
    eos_token_ids: Collection[int]
    device: torch.device

    def take(self, rows: Sequence[int]) -> "Context":
        """The context of some of the rows."""
        return replace(
            self,
            params=[self.params[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            outputs=[self.outputs[row] for row in rows],
        )

    def column(self, name: str) -> Tensor:
        """[B, 1]: field `name` of every row, float32 or int64."""
        values = [getattr(params, name) for params in self.params]
        dtype = torch.int64 if all(isinstance(value, int) for value in values) else torch.float32
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None]

    def at(self, tokens: Sequence[Collection[int]]) -> steps.At:
        """(rows[N], tokens[N]): where the logits of `tokens[i]` in row i are."""
        rows = [row for row, ids in enumerate(tokens) for row in repeat(row, len(ids))]
        flat = [token for ids in tokens for token in ids]
        return self._ints(rows), self._ints(flat)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Step:
    """A sampler's place in the order: `apply(logits, *inputs(context, fields))` on the rows where it is not neutral."""

    apply: Callable[..., Tensor]
    fields: tuple[str, ...]  # it is neutral for a row whose fields all have their defaults
    inputs: Callable[[Context, tuple[str, ...]], tuple[Any, ...]]
    greedy: bool = False  # whether it can change which token is best, so that greedy rows need it too


def _columns(context: Context, fields: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(context.column(name) for name in fields)


def _bias(context: Context, fields: tuple[str, ...]) -> tuple[Any, ...]:
    biases = [params.logit_bias or {} for params in context.params]
    values = torch.tensor([value for bias in biases for value in bias.values()], device=context.device)
    return context.at(biases), values


def _early_ends(context: Context, fields: tuple[str, ...]) -> tuple[Any, ...]:
    """Tokens that would end an output still shorter than min_tokens."""
    ends: list[Collection[int]] = []
    for params, output in zip(context.params, context.outputs, strict=True):
        eos = () if params.ignore_eos else context.eos_token_ids
        ends.append({*params.stop_token_ids, *eos} if len(output) < params.min_tokens else ())
    return (context.at(ends),)


def _seen(context: Context, fields: tuple[str, ...]) -> tuple[Any, ...]:
    texts = [{*prompt, *output} for prompt, output in zip(context.prompts, context.outputs, strict=True)]
    return *_columns(context, fields), context.at(texts)


def _counted(context: Context, fields: tuple[str, ...]) -> tuple[Any, ...]:
    counts = [Counter(output) for output in context.outputs]
    values = torch.tensor([n for count in counts for n in count.values()], device=context.device)
    return *_columns(context, fields), context.at(counts), values


ORDER: tuple[Step, ...] = (
    Step(steps.logit_bias, ("logit_bias",), _bias, greedy=True),
    Step(steps.ban, ("min_tokens",), _early_ends, greedy=True),
    Step(steps.repetition_penalty, ("repetition_penalty",), _seen, greedy=True),
    Step(steps.presence_frequency_penalty, ("presence_penalty", "frequency_penalty"), _counted, greedy=True),
    Step(steps.temperature, ("temperature",), _columns),
    Step(steps.min_p, ("min_p",), _columns),
    Step(steps.top_k, ("top_k",), _columns),
    Step(steps.top_p, ("top_p",), _columns),
)


@dataclass(frozen=True)
class Sampled:
    """One token, and how likely the model itself found it and the best alternatives (natural logarithms)."""

    token_id: int
    logprob: float | None  # None unless params.logprobs is set
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first, lower id first among equals


def process(logits: Tensor, context: Context) -> Tensor:
    """float32 logits [B, V] after every step of ORDER; greedy rows only after those that can change the best token."""
    for step in ORDER:
        rows = [
            row
            for row, params in enumerate(context.params)
            if (step.greedy or not params.greedy) and not params.is_neutral(*step.fields)
        ]
        if len(rows) == len(context.params):
            logits = step.apply(logits, *step.inputs(context, step.fields))
        elif rows:
            some = torch.tensor(rows, device=logits.device)
            changed = step.apply(logits[some], *step.inputs(context.take(rows), step.fields))
            logits = logits.index_copy(0, some, changed)
    return logits


def distribution(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    eos_token_ids: Collection[int] = (),
) -> Tensor:
    """float32 [B, V]: the distribution each row's next token is drawn from, after every sampler.

    logits: float32 [B, V], not changed. Row i has params[i], the prompt prompts[i] and has sampled outputs[i]. A greedy
    row is one-hot at its largest processed logit, the lowest id among equals. `eos_token_ids` matter to min_tokens.

    UserError if logit_bias or stop_token_ids names a token beyond V. ValueError if the columns differ in length or a
    row has no finite logit left (NaN from the model, or everything banned).
    """
    processed, best = _checked(logits, Context(params, prompts, outputs, eos_token_ids, logits.device))
    greedy = torch.tensor([each.greedy for each in params], device=logits.device)[:, None]
    one_hot = torch.zeros_like(processed).scatter_(-1, best[:, None], 1.0)
    return torch.where(greedy, one_hot, processed.softmax(-1))


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    seeds: Sequence[int],
    eos_token_ids: Collection[int] = (),
) -> list[Sampled]:
    """Draw one token per row from `distribution`, whose arguments and errors these are.

    seeds[i] is params[i].seed or, without one, any number drawn once per request. The draw depends on it and on
    len(outputs[i]) alone. Log-probabilities are those of `logits` as given, before any step (vLLM's `raw_logprobs`).
    """
    processed, chosen = _checked(logits, Context(params, prompts, outputs, eos_token_ids, logits.device))
    drawn = [row for row, each in enumerate(params) if not each.greedy]
    if drawn:
        key = keys([seeds[row] for row in drawn], [len(outputs[row]) for row in drawn], logits.device)
        chosen[drawn] = draw(processed[drawn].softmax(-1), key)
    return [_report(logits[row], token, params[row].logprobs) for row, token in enumerate(chosen.tolist())]


def _checked(logits: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Processed logits [B, V] and the best token of each row [B], or the errors of `distribution`."""
    columns = (context.params, context.prompts, context.outputs)
    if any(len(column) != len(logits) for column in columns):
        counts = "{} params, {} prompts and {} outputs".format(*map(len, columns))
        raise ValueError(f"{len(logits)} rows of logits, but {counts}: one of each per row is needed")
    for each in context.params:
        each.check_vocab(logits.shape[-1])
    processed = process(logits.float(), context)
    value, best = processed.max(-1)
    broken = (~value.isfinite()).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"rows {broken} have no finite logit to sample from: NaN from the model, or all tokens banned")
    return processed, best


def _report(logits: Tensor, token: int, wanted: int | None) -> Sampled:
    """`token` with its log-probability under logits [V] and the `wanted` best ones."""
    if wanted is None:
        return Sampled(token, None, ())
    logprobs = logits.float().log_softmax(-1)
    wanted = min(wanted, len(logprobs))
    if wanted == 0:
        return Sampled(token, float(logprobs[token]), ())
    # All that tie with the last of the best, so that equal values are listed by id on every device.
    ids = (logprobs >= logprobs.topk(wanted).values[-1]).nonzero()[:, 0]
    ranked = sorted(zip(logprobs[ids].tolist(), ids.tolist(), strict=True), key=lambda each: (-each[0], each[1]))
    return Sampled(token, float(logprobs[token]), tuple((i, value) for value, i in ranked[:wanted]))
