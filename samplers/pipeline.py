"""From logits to tokens: every sampler in one order, for a batch whose rows each have their own parameters.

ORDER is the order: first what decides which tokens there are (bias, bans) and which is best (penalties, DRY), then
temperature and smoothing, then what removes unlikely tokens, then XTC and skew, which bend what is left, then the
feedback samplers, then the draw. Penalties act on the model's own logits, so their strength does not depend on
temperature. Truncation sees the tempered distribution: the tokens it keeps are those that would be drawn. top_k
precedes top_p, which therefore takes its share of the tokens top_k left. XTC follows truncation, as its author
advises. Each step appears once and runs once (applying penalties twice squares them). `sampler_priority` gives the
samplers it names each other's places in its own order and leaves the others where they are; `temperature_last` moves
temperature behind skew. With mirostat nothing else removes tokens. Greedy rows take only the steps that decide which
token is best: up to DRY.

Rows that use the same steps in the same order go through them together and no row sees another, so a row's result does
not depend on its neighbours. To add a sampler: one function in steps.py or truncation.py, its fields in params.py, one
line in inputs.ORDER.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .draw import draw, keys
from .history import History
from .inputs import ORDER, Context, Step
from .params import SamplingParams
from .trace import StepTrace, compare
from .truncation import HEAD, LARGEST, above, alive

# Logits handled at once on a CPU: what its caches hold, and what the allocator keeps instead of mapping it anew.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sampled:
    """One token, and how likely the model itself found it and the best alternatives (natural logarithms)."""

    token_id: int
    logprob: float | None  # None unless params.logprobs is set
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first, lower id first among equals
    trace: tuple[StepTrace, ...] = ()  # what each sampler did, if params.sampler_trace is set


@dataclass(frozen=True)
class Piece:
    """Some rows of the batch, alike in their steps, with their logits [b, W] after them.

    ids [b, W] names the tokens; None if W is the whole vocabulary.
    """

    rows: list[int]
    context: Context
    logits: Tensor
    ids: Tensor | None = None
    # Logits before the feedback samplers, which are told how likely the token was there.
    open: Tensor | None = None
    traces: tuple[list[StepTrace], ...] = ()  # of each row, if they are traced

    def best(self) -> Tensor:
        """int64 [b, 1]: where the largest logit is, the lowest id among equals."""
        if self.logits.device.type == "cpu":
            # torch's takes 30 us of 32 thousand, numpy's 2.
            return torch.from_numpy(self.logits.numpy().argmax(-1)[:, None])
        return self.logits.argmax(-1, keepdim=True)

    @property
    def greedy(self) -> bool:
        return self.context.params[0].greedy

    def probs(self) -> Tensor:
        """float32 [b, W]: the distribution; a greedy row is one-hot at its best token."""
        if self.greedy:
            return torch.zeros_like(self.logits).scatter_(-1, self.best(), 1.0)
        return self.logits.softmax(-1)


def plan(params: SamplingParams) -> tuple[Step, ...]:
    """The steps that change something for a request, in its order."""
    steps = {step.name: step for step in ORDER}
    names = list(steps)
    if params.temperature_last:
        names.remove("temperature")
        names.insert(names.index("skew") + 1, "temperature")
    chosen = iter(params.sampler_priority)
    names = [next(chosen) if name in params.sampler_priority else name for name in names]
    return tuple(
        step
        for step in map(steps.__getitem__, names)
        if not params.is_neutral(*step.fields)
        and (step.greedy or not params.greedy)
        and not (step.truncates and params.mirostat_mode)
    )


def process(logits: Tensor, context: Context) -> list[Piece]:
    """float32 logits [B, V] after every step, in pieces: each row is in one of them, in any order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, (params, history) in enumerate(zip(context.params, context.histories, strict=True)):
        if history.plan is None:
            history.plan = plan(params)
        groups.setdefault((history.plan, params.greedy, params.sampler_trace), []).append(row)
    most = max(1, _CHUNK // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    pieces: list[Piece] = []
    for rows in groups.values():
        for start in range(0, len(rows), most):
            pieces += _run(logits, context, rows[start : start + most])
    return pieces


def _run(logits: Tensor, context: Context, rows: list[int]) -> Iterator[Piece]:
    """The rows, which take the same steps, after them; in pieces by when truncation left them few tokens."""
    some = context.take(rows)
    steps = some.histories[0].plan or ()
    whole = rows == list(range(rows[0], rows[0] + len(rows)))
    traces: tuple[list[StepTrace], ...] = tuple([] for _ in rows) if some.params[0].sampler_trace else ()
    taken = logits[rows[0] : rows[0] + len(rows)] if whole else logits[torch.tensor(rows, device=logits.device)]
    pieces = [Piece(rows, some, taken, traces=traces)]
    for at, step in enumerate(steps):
        pieces = [_step(piece, step) for piece in pieces]
        if step.truncates and not any(later.sparse for later in steps[at:]):
            pieces = [part for piece in pieces for part in _shrink(piece)]
    yield from pieces


def _step(piece: Piece, step: Step) -> Piece:
    after = step.apply(piece.logits, *step.inputs(replace(piece.context, ids=piece.ids)))
    for row, trace in enumerate(piece.traces):
        ids = None if piece.ids is None else piece.ids[row]
        trace.append(compare(step.name, piece.logits[row], after[row], ids))
    return replace(piece, logits=after, open=piece.logits if step.feeds else piece.open)


def _shrink(piece: Piece) -> list[Piece]:
    """Rows with few tokens left on those alone, the others as they are.

    When and how much a row narrows depends on that row only: sums over another width would round differently.
    """
    if piece.logits.shape[-1] <= HEAD:
        return [piece]
    # Two columns stay free: tail-free sampling looks at the two tokens after the last one.
    few = alive(piece.logits)[:, 0] <= HEAD - 2
    if not few.any():
        return [piece]
    if few.all():
        narrow, ids = above(piece.logits, piece.logits.new_full((1, 1), -LARGEST), HEAD)
        return [replace(piece, logits=narrow, ids=ids)]
    parts = []
    for mask in (few, ~few):
        rows = mask.nonzero()[:, 0].tolist()
        part = Piece(
            [piece.rows[row] for row in rows],
            piece.context.take(rows),
            piece.logits[mask],
            traces=tuple(piece.traces[row] for row in rows) if piece.traces else (),
        )
        parts.append(part)
    return [*_shrink(parts[0]), parts[1]]


def distribution(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    eos_token_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    histories: Sequence[History] | None = None,
) -> Tensor:
    """float32 [B, V]: the distribution each row's next token is drawn from, after every sampler.

    logits: float32 [B, V], not changed. Row i has params[i], the prompt prompts[i] and has sampled outputs[i]. A greedy
    row is one-hot at its largest processed logit, the lowest id among equals. `eos_token_ids` matter to min_tokens,
    ban_eos_token and XTC. seeds[i] decides XTC's coin; by default params[i].seed, or 0. A draft is verified against
    these rows: they are what `sample` draws from, at every position, with the same seeds and histories.

    histories[i] keeps what a row's samplers know of its text between calls; by default it is made from prompts[i] and
    outputs[i]. Without one there are no `Words`: strings (bad_words, dry_sequence_breakers) have no tokens, and
    mirostat and adaptive-p are at their beginning.

    UserError if a parameter names a token beyond V. ValueError if the columns differ in length, bad_words are asked for
    without a history, or a row has no finite logit left (NaN from the model, or everything banned).
    """
    context = context_of(logits, params, prompts, outputs, eos_token_ids, seeds, histories)
    probs = torch.zeros_like(logits, dtype=torch.float32)
    broken: list[int] = []
    for piece in process(logits.float(), context):
        broken += _broken(piece)
        rows = torch.tensor(piece.rows, device=logits.device)
        if piece.ids is None:
            probs[rows] = piece.probs()
        else:
            probs[rows] = torch.zeros_like(probs[rows]).scatter_add_(-1, piece.ids, piece.probs())
    if broken:
        raise ValueError(
            f"rows {sorted(broken)} have no finite logit to sample from: NaN from the model, or all tokens banned"
        )
    return probs


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    seeds: Sequence[int],
    eos_token_ids: Collection[int] = (),
    histories: Sequence[History] | None = None,
) -> list[Sampled | None]:
    """Draw one token per row from `distribution`, whose arguments and errors these are; None for a row without one.

    seeds[i] is params[i].seed or, without one, any number drawn once per request. The draw depends on it and on
    len(outputs[i]) alone. Log-probabilities are those of `logits` as given, before any step (vLLM's `raw_logprobs`).
    Histories of rows with mirostat or adaptive-p are told what was drawn.
    """
    context = context_of(logits, params, prompts, outputs, eos_token_ids, seeds, histories)
    result: list[Sampled | None] = [None] * len(params)
    for piece in process(logits.float(), context):
        chosen = _draw(piece)
        broken = set(_broken(piece))
        for place, (row, token) in enumerate(zip(piece.rows, chosen, strict=True)):
            if row not in broken:
                trace = tuple(piece.traces[place]) if piece.traces else ()
                result[row] = _report(logits[row], token, params[row].logprobs, trace)
    return result


def _draw(piece: Piece) -> list[int]:
    """The token of each row."""
    context = piece.context
    if piece.greedy:
        best = piece.best()
        return (best if piece.ids is None else piece.ids.gather(-1, best))[:, 0].tolist()
    key = keys(context.seeds, context.lengths, piece.logits.device)
    tokens: list[int] = draw(piece.probs(), key, piece.ids).tolist()
    if piece.open is not None:
        logprobs = piece.open.log_softmax(-1)
        at = torch.tensor(tokens, device=logprobs.device)[:, None]
        if piece.ids is not None:
            at = (piece.ids == at).int().argmax(-1, keepdim=True)
        fed = zip(context.histories, context.lengths, logprobs.gather(-1, at)[:, 0].tolist(), strict=True)
        for history, length, logprob in fed:
            history.observe(length, logprob)
    return tokens


def _broken(piece: Piece) -> list[int]:
    # torch's isfinite of one number takes 40 us.
    best = piece.logits.amax(-1).tolist()
    return [row for row, most in zip(piece.rows, best, strict=True) if not math.isfinite(most)]


def context_of(
    logits: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    eos_token_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    histories: Sequence[History] | None = None,
) -> Context:
    """The context of a batch, its histories brought up to the outputs, or the errors of `distribution`."""
    columns = (params, prompts, outputs)
    if any(len(column) != len(logits) for column in columns):
        counts = "{} params, {} prompts and {} outputs".format(*map(len, columns))
        raise ValueError(f"{len(logits)} rows of logits, but {counts}: one of each per row is needed")
    for each in params:
        each.check_vocab(logits.shape[-1])
    if histories is None:
        if any(each.bad_words for each in params):
            raise ValueError("bad_words are text: give histories whose Words hold their tokens (serve/words.py)")
        histories = [History(each, prompt) for each, prompt in zip(params, prompts, strict=True)]
    return Context(
        params=params,
        histories=[history.follow(output) for history, output in zip(histories, outputs, strict=True)],
        lengths=[len(output) for output in outputs],
        seeds=[each.seed or 0 for each in params] if seeds is None else seeds,
        eos_token_ids=eos_token_ids,
        vocab_size=logits.shape[-1],
        device=logits.device,
    )


def _report(logits: Tensor, token: int, wanted: int | None, trace: tuple[StepTrace, ...]) -> Sampled:
    """`token` with its log-probability under logits [V] and the `wanted` best ones."""
    if wanted is None:
        return Sampled(token, None, (), trace)
    logprobs = logits.float().log_softmax(-1)
    wanted = min(wanted, len(logprobs))
    if wanted == 0:
        return Sampled(token, float(logprobs[token]), (), trace)
    # All that tie with the last of the best, so that equal values are listed by id on every device.
    ids = (logprobs >= logprobs.topk(wanted).values[-1]).nonzero()[:, 0]
    ranked = sorted(zip(logprobs[ids].tolist(), ids.tolist(), strict=True), key=lambda each: (-each[0], each[1]))
    return Sampled(token, float(logprobs[token]), tuple((i, value) for value, i in ranked[:wanted]), trace)
