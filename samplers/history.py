"""What a sequence's text says about its next token, kept up to date token by token.

Penalties, n-gram bans and DRY depend on the whole text. A `History` indexes it once and then takes in new tokens only.
It is made from the text alone, so a sequence that was
preempted, rewound or drafted can rebuild it and gets the same answer; only the feedback samplers (mirostat,
adaptive-p) carry numbers for each sampled token that the text does not tell.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .feedback import State, initial, update
from .params import SamplingParams

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """Strings of a request's parameters as token sequences; serve/words.py makes them with the tokenizer."""

    breakers: tuple[Ids, ...] = ()  # dry_sequence_breakers
    bad_words: tuple[Ids, ...] = ()  # bad_words, with and without a leading space
    protected: Ids = ()  # tokens XTC must not remove besides the end of sequence: newlines
    thinking: tuple[Ids, Ids] = ((), ())  # what begins and what ends a thought


NO_WORDS = Words()


class Growing:
    """A one-dimensional tensor that is appended to."""

    def __init__(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> None:
        self._count = len(values)
        self._buffer = torch.empty(max(64, 2 * self._count), dtype=dtype)
        self._buffer[: self._count] = torch.tensor(values, dtype=dtype)

    def append(self, value: int) -> None:
        if self._count == len(self._buffer):
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
        self._buffer[self._count] = value
        self._count += 1

    @property
    def values(self) -> Tensor:
        """A view of what was appended so far."""
        return self._buffer[: self._count]


class Index(ABC):
    """Takes in a text token by token."""

    @abstractmethod
    def append(self, token: int) -> None: ...

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.append(token)


class Penalised(Index):
    """Which tokens repetition, presence and frequency penalties concern, and how much.

    repetition_penalty_range tokens back they act in full (-1: the whole text), then fade over repetition_decay tokens.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._range, self._decay = params.repetition_penalty_range, params.repetition_decay
        self._slope = params.repetition_slope
        self._num_prompt = len(prompt)
        self._text = Growing(prompt)
        # Of the whole text, in order of first occurrence.
        unique = dict.fromkeys(prompt)
        self._known = set(unique)
        self._seen = Growing(list(unique))
        self._place: dict[int, int] = {}
        self._output, self._counts = Growing([]), Growing([], torch.float32)

    def append(self, token: int) -> None:
        self._text.append(token)
        if token not in self._known:
            self._known.add(token)
            self._seen.append(token)
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._output.values):
            self._output.append(token)
            self._counts.append(0)
        self._counts.values[place] += 1

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of prompt and output [N]; by how much of `penalty - 1` each is penalised; how much of that counts."""
        if self._range < 0 and self._slope == 1:
            ones = torch.ones(len(self._seen.values))
            return self._seen.values, ones, ones
        ids, distance = self._window()
        tokens, inverse = ids.unique(return_inverse=True)
        nearest = torch.full_like(tokens, len(self._text.values)).scatter_reduce(0, inverse, distance, "amin")
        reach = len(self._text.values)
        half = (reach if self._range < 0 else min(reach, self._range)) / 2
        return tokens, torch.where(nearest < half, 1.0, self._slope), self._weight(nearest)

    def counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the output [N]; how often each was sampled; 1. The last two are less where the penalty fades."""
        if self._range < 0:
            return self._output.values, self._counts.values, torch.ones(len(self._output.values))
        ids, distance = self._window()
        own = distance < len(self._text.values) - self._num_prompt
        weight = self._weight(distance[own])
        tokens, inverse = ids[own].unique(return_inverse=True)
        zeros = torch.zeros(len(tokens))
        return tokens, zeros.scatter_add(0, inverse, weight), zeros.scatter_reduce(0, inverse, weight, "amax")

    def _window(self) -> tuple[Tensor, Tensor]:
        """Tokens the range reaches, and how many tokens back each is (the last one: 0)."""
        text = self._text.values
        if self._range >= 0:
            text = text[max(0, len(text) - self._range - self._decay) :]
        return text, torch.arange(len(text) - 1, -1, -1)

    def _weight(self, distance: Tensor) -> Tensor:
        """1 within the range, then falling to 0 over the decay (ExLlamaV2's sustain and decay)."""
        if self._range < 0 or not self._decay:
            return torch.ones(len(distance))
        return ((self._range + self._decay - distance) / self._decay).clamp(0, 1)


class Ngrams(Index):
    """What followed each n-gram of the text."""

    def __init__(self, size: int) -> None:
        self._context = size - 1
        self._tail: Ids = ()
        self._followers: dict[Ids, dict[int, None]] = defaultdict(dict)

    def append(self, token: int) -> None:
        if len(self._tail) == self._context:
            self._followers[self._tail][token] = None
        self._tail = (*self._tail, token)[-self._context :] if self._context else ()

    def banned(self) -> Collection[int]:
        """Tokens that would complete an n-gram for the second time (https://arxiv.org/abs/1705.04304, section 2.5)."""
        return self._followers.get(self._tail, {}) if len(self._tail) == self._context else ()


class Repeats(Index):
    """DRY's longest repetitions that end where the text ends.

    For every earlier position whose token is the last one, how many tokens up to there equal the last ones of the
    text. A new token prolongs the matches it continues and ends the others, so only its own occurrences are visited.
    No match reaches back over a sequence breaker.
    """

    def __init__(self, params: SamplingParams, breakers: Sequence[Ids]) -> None:
        self._range, self._allowed = params.dry_range, params.dry_allowed_length
        self._single = {breaker[0] for breaker in breakers if len(breaker) == 1}
        # Thousands for a breaker of several characters: one look-up for each length.
        self._longer = {breaker for breaker in breakers if len(breaker) > 1}
        self._sizes = {len(breaker) for breaker in self._longer}
        self._text: list[int] = []
        self._positions: dict[int, list[int]] = defaultdict(list)
        self._matches: dict[int, int] = {}

    def append(self, token: int) -> None:
        earlier = self._positions[token]
        first = bisect_left(earlier, len(self._text) + 1 - self._range) if self._range else 0
        self._matches = {at: self._matches.get(at - 1, 0) + 1 for at in earlier[first:]}
        earlier.append(len(self._text))
        self._text.append(token)
        if self._breaks(len(self._text)):
            self._matches = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """A whole text in time proportional to its length, where appending visits each pair of equal tokens."""
        if len(tokens) < 2:
            return super().extend(tokens)
        for place, token in enumerate(tokens, len(self._text)):
            self._positions[token].append(place)
        self._text += tokens
        size = len(self._text)
        limit = next((back for back in range(size) if self._breaks(size - back)), size)
        start = size - self._range if self._range else 0
        equal = enumerate(_equal_beginnings(self._text[::-1]))
        matches = {size - 1 - back: min(length, limit) for back, length in equal if back and length and limit}
        self._matches = {at: length for at, length in matches.items() if at >= start}

    def _breaks(self, end: int) -> bool:
        """Whether the text up to `end` ends with a breaker."""
        if self._text[end - 1] in self._single:
            return True
        return any(tuple(self._text[max(0, end - size) : end]) in self._longer for size in self._sizes)

    def lengths(self) -> dict[int, int]:
        """Token -> length of the longest repetition it would prolong, where that is dry_allowed_length or more."""
        found: dict[int, int] = {}
        start = max(0, len(self._text) - self._range) if self._range else 0
        for at, match in self._matches.items():
            length, follower = min(match, at + 1 - start), self._text[at + 1]
            if length >= max(1, self._allowed) and follower not in self._single:
                found[follower] = max(length, found.get(follower, 0))
        return found


def _equal_beginnings(text: Sequence[int]) -> list[int]:
    """For each place how many tokens from there on equal those from the start on (the Z-algorithm, linear time)."""
    size = len(text)
    found = [size] + [0] * (size - 1)
    left = right = 0
    for place in range(1, size):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < size and text[length] == text[place + length]:
            length += 1
        found[place] = length
        if place + length > right:
            left, right = place, place + length
    return found


class Thought(Index):
    """Whether the text is within a thought, and what has to be said to end it in time."""

    def __init__(self, budget: int, begin: Ids, end: Ids) -> None:
        self._budget, self._begin, self._end = budget, begin, end
        self._tail: Ids = ()
        self._spent: int | None = None  # tokens of the thought so far; None outside

    def append(self, token: int) -> None:
        self._tail = (*self._tail, token)[-max(len(self._begin), len(self._end)) :]
        if self._spent is None:
            self._spent = 0 if self._ends_with(self._begin) else None
        else:
            self._spent += 1
            # The end of a thought shares no token with its beginning.
            if self._spent >= len(self._end) and self._ends_with(self._end):
                self._spent = None

    def forced(self) -> int | None:
        """The only token that may come now, once the budget is spent: the next of the end of a thought."""
        if self._spent is None or self._spent < self._budget:
            return None
        said = min(self._spent - self._budget, len(self._end) - 1)
        return next(self._end[n] for n in range(said, -1, -1) if self._ends_with(self._end[:n]))

    def _ends_with(self, ids: Ids) -> bool:
        return self._tail[len(self._tail) - len(ids) :] == ids if ids else True


@dataclass
class History:
    """The indices that one request's parameters need. `follow` brings them up to the output so far."""

    params: SamplingParams
    prompt: Sequence[int]
    words: Words = NO_WORDS
    # bans[i]: tokens the output must not have at position i; what rewinding from a banned string leaves behind.
    bans: dict[int, set[int]] = field(default_factory=dict)
    # only[i]: the tokens the output may have at position i, where not all may come; what token healing asks for.
    only: dict[int, Collection[int]] = field(default_factory=dict)
    plan: tuple[Any, ...] | None = None  # the steps of its parameters, kept by pipeline.process

    def __post_init__(self) -> None:
        self._states: list[State] = [initial(self.params)]
        self._reset()

    def _reset(self) -> None:
        params = self.params
        penalised = not params.is_neutral("repetition_penalty", "presence_penalty", "frequency_penalty")
        self.penalised = Penalised(params, self.prompt) if penalised else None
        self.ngrams = Ngrams(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else None
        self.repeats = Repeats(params, self.words.breakers) if params.dry_multiplier else None
        limited = params.thinking_token_budget is not None and all(self.words.thinking)
        self.thought = Thought(params.thinking_token_budget or 0, *self.words.thinking) if limited else None
        self._output: list[int] = []
        self._indices: list[Index] = [index for index in (self.ngrams, self.repeats, self.thought) if index]
        for index in self._indices:
            index.extend(self.prompt)
        # It has taken in the prompt already.
        self._indices += [self.penalised] if self.penalised else []

    def follow(self, output: Sequence[int]) -> "History":
        """Take in the tokens of `output` that are new; from the start again if it is not a continuation."""
        known = len(self._output)
        if len(output) < known or (known and output[known - 1] != self._output[-1]):
            self._reset()
            known = 0
        new = list(output[known:])
        for index in self._indices:
            index.extend(new)
        self._output += new
        return self

    def rewind(self, position: int) -> None:
        """Forget what holds only for the text beyond the first `position` tokens of the output."""
        for asked in (self.bans, self.only):
            for later in [at for at in asked if at > position]:
                del asked[later]

    def tail(self, count: int) -> Ids:
        """The last `count` tokens of prompt and output, fewer at the start of the text."""
        short = count - len(self._output)
        head = tuple(self.prompt[max(0, len(self.prompt) - short) :]) if short > 0 else ()
        return (*head, *self._output[len(self._output) - min(count, len(self._output)) :])

    def state(self, position: int) -> State:
        """What the feedback samplers know before the token at `position` of the output."""
        return self._states[min(position, len(self._states) - 1)]

    def observe(self, position: int, logprob: float) -> None:
        """The token at `position` was drawn, and had this natural log-probability before the feedback samplers."""
        before = self.state(position)
        del self._states[position + 1 :]
        self._states += [before] * (position + 1 - len(self._states))
        self._states.append(update(self.params, before, logprob))
