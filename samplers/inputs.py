"""The samplers in order, and what each takes from the rows that use it.

A `Step` runs on rows whose parameters are not all at their defaults, with `inputs(context)` of those rows.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import feedback, steps, truncation
from .draw import keys, uniform
from .history import History
from .params import SamplingParams

# Which numbers of the generator are whose; see draw.keys.
_XTC_COIN = 1


@dataclass(frozen=True)
class Context:
    """What a step may look at, row by row, and what the model calls the end of a sequence."""

    params: Sequence[SamplingParams]
    histories: Sequence[History]  # in step with the outputs
    lengths: Sequence[int]  # of the outputs
    seeds: Sequence[int]
    eos_token_ids: Collection[int]
    vocab_size: int
    device: torch.device
    ids: Tensor | None = None  # int64 [B, W]: the tokens the logits are of; None: all of them

    def take(self, rows: Sequence[int]) -> "Context":
        """The context of some of the rows."""
        return replace(
            self,
            params=[self.params[row] for row in rows],
            histories=[self.histories[row] for row in rows],
            lengths=[self.lengths[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            ids=None if self.ids is None else self.ids[torch.tensor(rows, device=self.device)],
        )

    def column(self, name: str) -> Tensor:
        """[B, 1]: field `name` of every row, float32 or int64."""
        values = [getattr(params, name) for params in self.params]
        dtype = torch.int64 if all(isinstance(value, int) for value in values) else torch.float32
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None]

    def floats(self, values: Iterable[float]) -> Tensor:
        """float32 [B, 1] of one number a row."""
        return torch.tensor(list(values), dtype=torch.float32, device=self.device)[:, None]

    def at(self, tokens: Sequence[Collection[int]]) -> steps.At:
        """(rows[N], tokens[N]): where the logits of `tokens[i]` in row i are."""
        counts = torch.tensor([len(ids) for ids in tokens])
        flat = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64)
        return torch.arange(len(tokens)).repeat_interleave(counts).to(self.device), flat.to(self.device)

    def gathered(self, found: Sequence[Sequence[Tensor]]) -> tuple[steps.At, list[Tensor]]:
        """`at` and the values of rows that each bring tokens [n] and more tensors [n]."""
        counts = torch.tensor([len(row[0]) for row in found])
        tokens, *values = (torch.cat(column).to(self.device) for column in zip(*found, strict=True))
        return (torch.arange(len(found)).repeat_interleave(counts).to(self.device), tokens), values


@dataclass(frozen=True)
class Step:
    """A sampler: `apply(logits, *inputs(context))` on the rows where a field is not at its default."""

    name: str
    apply: Callable[..., Tensor]
    inputs: Callable[[Context], tuple[Any, ...]]
    fields: tuple[str, ...]  # it is neutral for a row whose fields all have their defaults
    uses: tuple[str, ...] = ()  # fields that tune it
    greedy: bool = False  # whether it can change which token is best, so that greedy rows need it too
    truncates: bool = False  # whether it is there to remove tokens, which mirostat does itself
    sparse: bool = False  # whether it takes token ids, so that it needs logits of the whole vocabulary
    feeds: bool = False  # whether the next step wants to know how likely the token was before this one


def columns(*names: str) -> Callable[[Context], tuple[Any, ...]]:
    """Inputs of a step that takes its fields and nothing else."""
    return lambda context: tuple(context.column(name) for name in names)


def _bias(context: Context) -> tuple[Any, ...]:
    biases = [params.logit_bias or {} for params in context.params]
    return context.at(biases), context.floats(value for bias in biases for value in bias.values())[:, 0]


def _allowed(context: Context) -> tuple[Any, ...]:
    rows = zip(context.params, context.histories, context.lengths, strict=True)
    allowed = [_only(*row) for row in rows]
    return context.at(allowed), torch.tensor([not each for each in allowed], device=context.device)[:, None]


def _only(params: SamplingParams, history: History, length: int) -> Collection[int]:
    """The tokens this row may have now; none: all of them."""
    forced = history.thought.forced() if history.thought else None
    return history.only.get(length, {*params.allowed_token_ids}) if forced is None else {forced}


def _banned(context: Context) -> tuple[Any, ...]:
    rows = zip(context.params, context.histories, context.lengths, strict=True)
    return (context.at([_bans(*row, context.eos_token_ids) for row in rows]),)


def _bans(params: SamplingParams, history: History, length: int, eos: Collection[int]) -> set[int]:
    """Tokens this row must not have now, whatever their logits."""
    banned = {*params.banned_tokens, *history.bans.get(length, ())}
    if params.ban_eos_token:
        banned |= {*eos}
    if length < params.min_tokens:
        banned |= {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    words = history.words.bad_words
    return banned | {word[-1] for word in words if history.tail(len(word) - 1) == word[:-1]}


def _ngrams(context: Context) -> tuple[Any, ...]:
    return (context.at([history.ngrams.banned() if history.ngrams else () for history in context.histories]),)


def _repetition(context: Context) -> tuple[Any, ...]:
    at, (share, weight) = context.gathered([_known(history).seen() for history in context.histories])
    penalty = context.column("repetition_penalty")[at[0], 0]
    return at, torch.where(share == 1, penalty, 1 + (penalty - 1) * share), weight


def _counted(context: Context) -> tuple[Any, ...]:
    at, values = context.gathered([_known(history).counted() for history in context.histories])
    return context.column("presence_penalty"), context.column("frequency_penalty"), at, *values


def _known(history: History) -> Any:
    assert history.penalised is not None, "a history without the penalties its parameters ask for"
    return history.penalised


def _repeats(context: Context) -> tuple[Any, ...]:
    found = [history.repeats.lengths() if history.repeats else {} for history in context.histories]
    lengths = context.floats(length for row in found for length in row.values())[:, 0]
    tuned = (context.column(name) for name in ("dry_multiplier", "dry_base", "dry_allowed_length"))
    return context.at(found), lengths, *tuned


def _coin(context: Context) -> tuple[Any, ...]:
    coin = uniform(keys(context.seeds, context.lengths, context.device, _XTC_COIN))[:, None]
    return (
        context.column("xtc_threshold"),
        coin < context.column("xtc_probability"),
        _protected(context),
    )


def _protected(context: Context) -> Tensor:
    """bool [B, W]: the tokens XTC must leave."""
    flags = torch.zeros(len(context.params), context.vocab_size, dtype=torch.bool, device=context.device)
    found = [{*context.eos_token_ids, *history.words.protected} for history in context.histories]
    flags = flags.index_put(context.at(found), torch.ones((), dtype=torch.bool, device=context.device))
    return flags if context.ids is None else flags.gather(-1, context.ids)


def _states(context: Context) -> list[feedback.State]:
    return [history.state(length) for history, length in zip(context.histories, context.lengths, strict=True)]


def _surprise(context: Context) -> tuple[Any, ...]:
    return context.floats(state[0] for state in _states(context)), context.column("mirostat_mode")


def _mirostat(logits: Tensor, mu: Tensor, mode: Tensor) -> Tensor:
    return torch.where(mode == 1, feedback.mirostat_v1(logits, mu), feedback.mirostat_v2(logits, mu))


def _goal(context: Context) -> tuple[Any, ...]:
    pairs = zip(context.params, _states(context), strict=True)
    return (context.floats(feedback.adaptive_goal(params, state) for params, state in pairs),)


def _warmth(context: Context) -> tuple[Any, ...]:
    names = ("temperature", "dynatemp_min", "dynatemp_max", "dynatemp_exponent")
    return tuple(context.column(name).float() for name in names)


def _temperature(logits: Tensor, fixed: Tensor, low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
    """Dynamic temperature where it is on, in place of the fixed one."""
    dynamic = (low != 0) | (high != 0)
    if not dynamic.any():
        return steps.temperature(logits, fixed)
    if dynamic.all():
        return steps.dynamic_temperature(logits, low, high, exponent)
    return torch.where(
        dynamic, steps.dynamic_temperature(logits, low, high, exponent), steps.temperature(logits, fixed)
    )


def _cut(name: str, apply: Callable[..., Tensor]) -> Step:
    return Step(name, apply, columns(name), (name,), truncates=True)


_PENALTY_RANGE = ("repetition_penalty_range", "repetition_decay")
_ALLOWS = ("allowed_token_ids", "thinking_token_budget", "token_healing")
_BANS = ("banned_tokens", "ban_eos_token", "bad_words", "banned_strings", "min_tokens")
ORDER: tuple[Step, ...] = (
    Step("logit_bias", steps.logit_bias, _bias, ("logit_bias",), greedy=True, sparse=True),
    Step("allow", steps.allow, _allowed, _ALLOWS, greedy=True, sparse=True),
    Step("ban", steps.ban, _banned, _BANS, greedy=True, sparse=True),
    Step("no_repeat_ngram", steps.ban, _ngrams, ("no_repeat_ngram_size",), greedy=True, sparse=True),
    Step(
        "repetition_penalty", steps.repetition_penalty, _repetition, ("repetition_penalty",),
        (*_PENALTY_RANGE, "repetition_slope"), greedy=True, sparse=True,
    ),
    Step(
        "presence_frequency_penalty", steps.presence_frequency_penalty, _counted,
        ("presence_penalty", "frequency_penalty"), _PENALTY_RANGE, greedy=True, sparse=True,
    ),
    Step(
        "dry", steps.dry, _repeats, ("dry_multiplier",),
        ("dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers"), greedy=True, sparse=True,
    ),
    Step(
        "temperature", _temperature, _warmth, ("temperature", "dynatemp_min", "dynatemp_max"), ("dynatemp_exponent",),
    ),
    Step(
        "smoothing", steps.smoothing, columns("smoothing_factor", "smoothing_curve"), ("smoothing_factor",),
        ("smoothing_curve",),
    ),
    _cut("nsigma", truncation.top_n_sigma),
    _cut("min_p", truncation.min_p),
    _cut("top_k", truncation.top_k),
    _cut("top_p", truncation.top_p),
    _cut("top_a", truncation.top_a),
    _cut("tfs", truncation.tfs),
    _cut("eta_cutoff", truncation.eta_cutoff),
    _cut("epsilon_cutoff", truncation.epsilon_cutoff),
    _cut("typical_p", truncation.typical_p),
    Step("xtc", truncation.xtc, _coin, ("xtc_probability",), ("xtc_threshold",), truncates=True),
    Step("skew", truncation.skew, columns("skew"), ("skew",), truncates=True),
    Step("mirostat", _mirostat, _surprise, ("mirostat_mode",), ("mirostat_tau", "mirostat_eta"), feeds=True),
    Step("adaptive_p", feedback.adaptive_p, _goal, ("adaptive_target",), ("adaptive_decay",), feeds=True),
)  # fmt: skip
