"""Every sampler written once more from its definition: numpy float64, one row at a time, the whole text rescanned.

Shares no code with samplers/. A decision that float32 may take either way (a probability within rounding of a limit)
makes the row unsure, and tests compare nothing of it.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from bitsmith.samplers.params import SamplingParams

Array = np.ndarray
Ids = tuple[int, ...]
# How far float32 arithmetic on these logits may be off.
NEAR = 2e-5


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probs: Array) -> float:
    alive = probs[probs > 0]
    return float(-(alive * np.log(alive)).sum())


def dry_lengths(text: Sequence[int], breakers: Collection[Ids], allowed: int, reach: int) -> dict[int, int]:
    """token -> longest repetition it would prolong, by comparing the end of the text with every earlier place."""
    size = len(text)
    start = max(0, size - reach) if reach else 0
    ends = [
        end for each in breakers for end in range(len(each), size + 1) if tuple(text[end - len(each) : end]) == each
    ]
    limit = size - max(ends, default=0)
    found: dict[int, int] = {}
    for place in range(start, size - 1):
        length = 0
        while length < limit and place - length >= start and text[place - length] == text[size - 1 - length]:
            length += 1
        follower = text[place + 1]
        if length >= max(1, allowed) and (follower,) not in breakers:
            found[follower] = max(found.get(follower, 0), length)
    return found


def ngram_followers(text: Sequence[int], size: int) -> set[int]:
    """Tokens that would make an n-gram of the text occur again."""
    seen = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
    end = tuple(text[len(text) - size + 1 :]) if size > 1 else ()
    return {gram[-1] for gram in seen if gram[:-1] == end}


def forced_token(text: Sequence[int], budget: int, begin: Ids, end: Ids) -> int | None:
    """The token that has to come because the thought at the end of the text has used up its budget."""
    opened: int | None = None
    for stop in range(1, len(text) + 1):
        if opened is None:
            opened = stop if tuple(text[max(0, stop - len(begin)) : stop]) == begin else None
        elif stop - opened >= len(end) and tuple(text[stop - len(end) : stop]) == end:
            opened = None
    if opened is None or len(text) - opened < budget:
        return None
    # What of the end has been said since the budget was spent.
    late = min(len(text) - opened - budget, len(end) - 1)
    return next(end[said] for said in range(late, -1, -1) if tuple(text[len(text) - said :]) == end[:said])


def fade(params: SamplingParams, distance: int) -> float:
    """How much of a penalty a token `distance` tokens back gets (the last one: 0)."""
    reach, decay = params.repetition_penalty_range, params.repetition_decay
    if reach < 0 or distance < reach:
        return 1.0
    return max(0.0, 1 - (distance - reach) / decay) if decay else 0.0


@dataclass
class Row:
    """One row on its way through the samplers; every method is one of them and changes `logits` [V]."""

    logits: Array
    params: SamplingParams
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    eos: Collection[int] = ()
    breakers: Collection[Ids] = ()
    bad_words: Collection[Ids] = ()
    protected: Collection[int] = ()
    mu: float | None = None
    goal: float | None = None
    sure: bool = True

    @property
    def probs(self) -> Array:
        return softmax(self.logits)

    def cut(self, keep: Array, margin: Array) -> None:
        """Remove what is not in `keep`; `margin`: how far each token is from the opposite decision."""
        alive = self.logits > -math.inf
        self.sure &= not bool(((np.abs(margin) < NEAR) & alive).any())
        self.logits = np.where(keep, self.logits, -math.inf)

    def prefix(self, order: list[int], mass: float) -> None:
        """Keep the tokens of `order` until they hold `mass`, the one that crosses it included."""
        probs, before = self.probs, 0.0
        keep, margin = np.zeros(len(probs), bool), np.full(len(probs), math.inf)
        for place, token in enumerate(order):
            keep[token] = place == 0 or before < mass
            # A sum of float32 is nearer than a logarithm.
            margin[token] = math.inf if place == 0 else 7 * (before - mass)
            before += probs[token]
        self.cut(keep, margin)

    def ranked(self) -> list[int]:
        return sorted(range(len(self.logits)), key=lambda token: (-self.logits[token], token))

    def logit_bias(self) -> None:
        for token, bias in (self.params.logit_bias or {}).items():
            self.logits[token] += bias

    def allow(self) -> None:
        if self.params.allowed_token_ids:
            for token in set(range(len(self.logits))) - set(self.params.allowed_token_ids):
                self.logits[token] = -math.inf

    def ban(self) -> None:
        params, banned, text = self.params, set(self.params.banned_tokens), self.prompt + self.output
        if params.ban_eos_token:
            banned |= set(self.eos)
        if len(self.output) < params.min_tokens:
            banned |= set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos))
        for word in self.bad_words:
            if tuple(text[len(text) - len(word) + 1 :]) == word[:-1] and len(text) >= len(word) - 1:
                banned.add(word[-1])
        self.logits[sorted(banned)] = -math.inf

    def no_repeat_ngram(self) -> None:
        if self.params.no_repeat_ngram_size:
            text = self.prompt + self.output
            self.logits[sorted(ngram_followers(text, self.params.no_repeat_ngram_size))] = -math.inf

    def repetition_penalty(self) -> None:
        params, text = self.params, self.prompt + self.output
        reach = len(text) if params.repetition_penalty_range < 0 else min(len(text), params.repetition_penalty_range)
        for token in set(text):
            distance = text[::-1].index(token)
            share = 1.0 if distance * 2 < reach else params.repetition_slope
            penalty = 1 + (params.repetition_penalty - 1) * share
            was = self.logits[token]
            weight = fade(params, distance)
            if weight and was > -math.inf:
                now = was / penalty if was > 0 else was * penalty
                self.logits[token] = (1 - weight) * was + weight * now

    def presence_frequency_penalty(self) -> None:
        params = self.params
        for token in set(self.output):
            weights = [fade(params, back) for back, each in enumerate(self.output[::-1]) if each == token]
            self.logits[token] -= sum(weights) * params.frequency_penalty + max(weights) * params.presence_penalty

    def dry(self) -> None:
        params, text = self.params, self.prompt + self.output
        if params.dry_multiplier:
            found = dry_lengths(text, self.breakers, params.dry_allowed_length, params.dry_range)
            for token, length in found.items():
                self.logits[token] -= params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)

    def temperature(self) -> None:
        params, heat = self.params, self.params.temperature
        if params.dynatemp_min or params.dynatemp_max:
            count = int((self.logits > -math.inf).sum())
            share = entropy(self.probs) / math.log(count) if count > 1 else 0.0
            spread = params.dynatemp_max - params.dynatemp_min
            heat = max(1e-5, params.dynatemp_min + spread * share**params.dynatemp_exponent)
        self.logits = self.logits / heat

    def smoothing(self) -> None:
        factor, curve, best = self.params.smoothing_factor, self.params.smoothing_curve, self.logits.max()
        if factor:
            for token in np.flatnonzero(self.logits > -math.inf):
                d = self.logits[token] - best
                moved = -factor * (3 - curve) / 2 * d**2 + factor * (curve - 1) / 2 * d**3
                self.logits[token] = best + moved

    def nsigma(self) -> None:
        if self.params.nsigma:
            limit = self.logits.max() - self.params.nsigma * self.logits[self.logits > -math.inf].std()
            best = self.logits == self.logits.max()
            self.cut(self.logits >= limit, np.where(best, math.inf, self.logits - limit))

    def min_p(self) -> None:
        if self.params.min_p:
            limit = self.logits.max() + math.log(self.params.min_p)
            best = self.logits == self.logits.max()
            self.cut(best | (self.logits >= limit), np.where(best, math.inf, self.logits - limit))

    def top_k(self) -> None:
        if 0 < self.params.top_k < len(self.logits):
            keep = self.logits >= np.sort(self.logits)[-self.params.top_k]
            self.cut(keep, np.full(len(keep), math.inf))

    def top_p(self) -> None:
        if self.params.top_p < 1:
            self.prefix(self.ranked(), self.params.top_p)

    def at_least(self, limit: float) -> None:
        """Keep tokens with p >= limit, and the most likely one."""
        probs, best = self.probs, self.logits == self.logits.max()
        # Nearly the most likely is nearly kept.
        margin = np.log(np.maximum(probs, 1e-300) / max(min(limit, probs.max()), 1e-300))
        self.cut(best | (probs >= limit), np.where(best, math.inf, margin))

    def top_a(self) -> None:
        if self.params.top_a:
            self.at_least(self.params.top_a * self.probs.max() ** 2)

    def epsilon_cutoff(self) -> None:
        if self.params.epsilon_cutoff:
            self.at_least(self.params.epsilon_cutoff)

    def eta_cutoff(self) -> None:
        eta = self.params.eta_cutoff
        if eta:
            self.at_least(min(eta, math.sqrt(eta) * math.exp(-entropy(self.probs))))

    def tfs(self) -> None:
        if self.params.tfs == 1:
            return
        self.sure &= np.float32(self.params.tfs) < 1
        order, keep = self.ranked(), np.ones(len(self.logits), bool)
        margin = np.full(len(keep), math.inf)
        curvature = np.abs(np.diff(self.probs[order], n=2)) if len(order) > 2 else np.zeros(0)
        if curvature.sum() > 0:
            for place, share in enumerate(np.cumsum(curvature) / curvature.sum()):
                keep[order[place + 1]] = share <= self.params.tfs
                # Rounding of p, as large as it is beside all curvature.
                margin[order[place + 1]] = (share - self.params.tfs) * min(1.0, 1e3 * curvature.sum())
        keep[order[1:][-1:]] = False
        self.cut(keep, margin)

    def typical_p(self) -> None:
        if self.params.typical_p == 1:
            return
        probs = self.probs
        with np.errstate(divide="ignore"):
            distance = np.abs(-np.log(probs) - entropy(probs))
        order = sorted(range(len(probs)), key=lambda token: (distance[token], token))
        # Two tokens that are no ties but as far from the entropy to within rounding.
        for first, second in itertools.pairwise(order):
            alike = self.logits[first] == self.logits[second] or math.isinf(distance[second])
            self.sure &= alike or distance[second] - distance[first] > NEAR
        self.prefix(order, self.params.typical_p)

    def xtc(self) -> None:
        """With the coin fallen on its side."""
        if not self.params.xtc_probability:
            return
        probs, threshold = self.probs, self.params.xtc_threshold
        order = [token for token in self.ranked() if probs[token] >= threshold and probs[token] > 0]
        gone = set(order[:-1])
        margin = np.abs(probs - threshold) / max(threshold, 1e-9) if threshold else np.full(len(probs), math.inf)
        keep = np.ones(len(probs), bool)
        if not gone & (set(self.protected) | set(self.eos)):
            keep[sorted(gone)] = False
        # Which of two is the least likely is not decided by a difference that softmax rounds away.
        apart = [self.logits[token] - self.logits[order[-1]] for token in order[:-1]]
        self.sure &= not any(0 < each < NEAR for each in apart)
        self.cut(keep, margin)

    def skew(self) -> None:
        if self.params.skew:
            order = self.ranked()
            probs, running = self.probs[order], 0.0
            for token, p in zip(order, probs, strict=True):
                if p > 0:
                    e = math.exp(self.params.skew)
                    share = min(running + p, 1.0) ** e - running**e
                    # What float64 cannot tell apart at the end of the ranking.
                    self.sure &= share > 1e-9 * p
                    self.logits[token] = math.log(share) if share > 0 else -700.0
                    running = min(running + p, 1.0)

    def mirostat(self) -> None:
        params, probs = self.params, self.probs
        if not params.mirostat_mode:
            return
        mu = 2 * params.mirostat_tau if self.mu is None else self.mu
        with np.errstate(divide="ignore"):
            surprise = -np.log2(probs)
        if params.mirostat_mode == 2:
            best = surprise == surprise.min()
            self.cut(best | (surprise <= mu), np.where(best, math.inf, max(mu, surprise.min()) - surprise))
        else:
            k, rounding = mirostat_k(probs, mu)
            self.sure &= rounding
            self.cut(self.logits >= np.sort(self.logits)[-min(k, len(probs))], np.full(len(probs), math.inf))

    def adaptive_p(self) -> None:
        target = self.params.adaptive_target
        if target >= 0:
            goal = target if self.goal is None else self.goal
            for token, p in enumerate(self.probs):
                d = abs(p - goal) / 0.3
                if p > 0 or self.logits[token] > -math.inf:
                    self.logits[token] = 5 - 10 * d * d / (1 + d)


def mirostat_k(probs: Array, mu: float) -> tuple[int, bool]:
    """k of mirostat 1 from the probabilities, and whether its rounding is beyond doubt."""
    best = np.sort(probs)[::-1][:101]
    num = den = 0.0
    for i in range(len(best) - 1):
        if best[i + 1] > 0:
            t = math.log((i + 2) / (i + 1))
            num, den = num + t * math.log(best[i] / best[i + 1]), den + t * t
    if den == 0:
        return 2, True
    s, size = num / den, len(probs)
    if s == 0:
        return size, False
    e = s - 1
    spread = e / (1 - size**-e) if abs(e) > 1e-9 else 1 / math.log(size)
    exponent = (math.log(spread) + mu * math.log(2)) / s
    k = math.exp(exponent) if exponent < 30 else math.inf
    if k >= size:
        return size, k > size * 1.01
    return round(k) + 1, abs(k % 1 - 0.5) > 1e-3 * max(1.0, k)


ORDER = (
    "logit_bias", "allow", "ban", "no_repeat_ngram", "repetition_penalty", "presence_frequency_penalty", "dry",
    "temperature", "smoothing", "nsigma", "min_p", "top_k", "top_p", "top_a", "tfs", "eta_cutoff", "epsilon_cutoff",
    "typical_p", "xtc", "skew", "mirostat", "adaptive_p",
)  # fmt: skip
# Those that greedy rows take, and those that mirostat replaces.
GREEDY = ORDER[:7]
REPLACED = ORDER[9:20]


# Where temperature_last puts it: behind skew.
LAST = (*(name for name in ORDER[:20] if name != "temperature"), "temperature", "mirostat", "adaptive_p")


def reference(row: Row, order: Sequence[str] = ()) -> Array:
    """The distribution of the row after the samplers in this order."""
    order = order or (LAST if row.params.temperature_last else ORDER)
    row.logits = row.logits.astype(np.float64)
    greedy = row.params.temperature < 1e-5
    for name in order:
        if greedy and name not in GREEDY:
            continue
        if not (row.params.mirostat_mode and name in REPLACED):
            getattr(row, name)()
    if greedy:
        return np.eye(len(row.logits))[int(row.logits.argmax())]
    return row.probs
