"""What a text says about its next token, step by step, against the definitions that scan the whole text again."""

from typing import Any

import pytest
import torch
from bitsmith.samplers.feedback import update
from bitsmith.samplers.history import Growing, History, Penalised, Words
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from .sampler_reference import dry_lengths, fade, forced_token, ngram_followers

TOKENS = st.lists(st.integers(0, 4), max_size=30)
TEXTS = st.tuples(TOKENS, TOKENS)
BREAKERS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, breakers=BREAKERS, allowed=st.integers(0, 3), reach=st.integers(0, 12))
def test_dry_finds_what_a_scan_of_the_whole_text_finds(texts: Any, breakers: Any, allowed: int, reach: int) -> None:
    prompt, output = texts
    params = SamplingParams(dry_multiplier=1.0, dry_allowed_length=allowed, dry_range=reach)
    history = History(params, prompt, Words(breakers=breakers))
    for length in range(len(output) + 1):
        repeats = history.follow(output[:length]).repeats
        assert repeats and repeats.lengths() == dry_lengths(prompt + output[:length], breakers, allowed, reach)
    # And taken in at once.
    whole = History(params, prompt, Words(breakers=breakers)).follow(output).repeats
    assert whole and whole.lengths() == dry_lengths(prompt + output, breakers, allowed, reach)


@pytest.mark.parametrize(
    ("text", "breakers", "reach", "found"),
    [
        ([1, 2, 3, 1, 2], (), 0, {3: 2}),  # "1 2" came before 3
        ([1, 2, 3, 1, 2, 4, 9, 1, 2], (), 0, {3: 2, 4: 2}),
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], (), 0, {3: 3, 4: 2}),  # the longer match counts
        ([1, 2, 3, 1, 2], ((2,),), 0, {}),  # the text ends with a breaker
        ([7, 1, 2, 3, 7, 1, 2], ((7,),), 0, {3: 2}),  # what stands before a breaker does not count
        ([1, 2, 7, 1, 2], ((7,),), 0, {}),  # a breaker is never penalised
        ([8, 7, 1, 2, 3, 8, 7, 1, 2], ((8, 7),), 0, {3: 2}),  # of two tokens
        ([8, 7, 1, 2, 3, 8, 7, 1, 2], (), 0, {3: 4}),
        ([1, 2, 3, 1, 2], (), 4, {}),  # 2 tokens back are one of the earlier match only
        ([1, 1, 1, 1], (), 0, {1: 3}),  # matches may overlap
    ],
)
def test_dry_by_hand(text: list[int], breakers: Any, reach: int, found: dict[int, int]) -> None:
    history = History(SamplingParams(dry_multiplier=1.0, dry_range=reach), text, Words(breakers=breakers))
    assert history.repeats and history.repeats.lengths() == found == dry_lengths(text, breakers, 2, reach)


def test_dry_takes_multiplier_times_base_to_the_surplus() -> None:
    params = SamplingParams(dry_multiplier=0.5, dry_base=2.0, dry_allowed_length=1)
    probs = distribution(torch.zeros(1, 6), [params], [[5, 1, 2, 3, 4, 1]], [[2]])[0]
    # Token 3 prolongs "1 2": 0.5 * 2 ^ (2 - 1) = 1 below the others.
    assert float((probs[0] / probs[3]).log()) == pytest.approx(1.0, abs=1e-6) and probs[0] == probs[4]


def test_dry_of_a_text_that_only_repeats_stays_finite() -> None:
    params = SamplingParams(dry_multiplier=1000.0, dry_base=1000.0)
    probs = distribution(torch.zeros(1, 2), [params], [[1] * 5000], [[]])[0]
    assert probs.tolist() == [1.0, 0.0]
    assert distribution(torch.zeros(1, 1), [params], [[0] * 5000], [[]]).tolist() == [[1.0]]


def test_dry_takes_in_a_long_prompt_in_linear_time() -> None:
    """100 000 equal tokens hold 5 000 000 000 pairs."""
    repeats = History(SamplingParams(dry_multiplier=1.0), [1] * 100_000 + [2, 1, 1]).repeats
    assert repeats and repeats.lengths() == {1: 2, 2: 2}


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS, size=st.integers(1, 5))
def test_ngrams_are_those_of_the_whole_text(texts: Any, size: int) -> None:
    prompt, output = texts
    history = History(SamplingParams(no_repeat_ngram_size=size), prompt)
    for length in range(len(output) + 1):
        ngrams = history.follow(output[:length]).ngrams
        assert ngrams and set(ngrams.banned()) == ngram_followers(prompt + output[:length], size)


WINDOWS = st.fixed_dictionaries(
    {
        "repetition_penalty_range": st.integers(-1, 12),
        "repetition_decay": st.integers(0, 8),
        "repetition_slope": st.sampled_from([1.0, 0.25, 0.8]),
    }
)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, window=WINDOWS)
def test_penalties_see_their_window(texts: Any, window: dict[str, Any]) -> None:
    prompt, output = texts
    params = SamplingParams(repetition_penalty=1.5, **window)
    history = History(params, prompt)
    for length in range(len(output) + 1):
        penalised, said = history.follow(output[:length]).penalised, output[:length]
        assert penalised
        text = prompt + said
        reach = len(text) if params.repetition_penalty_range < 0 else min(params.repetition_penalty_range, len(text))
        seen = {token: text[::-1].index(token) for token in text}
        wanted = {
            token: (1.0 if 2 * back < reach else params.repetition_slope, fade(params, back))
            for token, back in seen.items()
            if fade(params, back)
        }
        rows = zip(*(column.tolist() for column in penalised.seen()), strict=True)
        assert {token: (share, weight) for token, share, weight in rows} == {
            token: pytest.approx(each, abs=1e-6) for token, each in wanted.items()
        }
        weights = {token: [fade(params, i) for i, each in enumerate(said[::-1]) if each == token] for token in said}
        counted = {token: (sum(each), max(each)) for token, each in weights.items() if max(each)}
        rows = zip(*(column.tolist() for column in penalised.counted()), strict=True)
        assert {token: (count, present) for token, count, present in rows} == {
            token: pytest.approx(each, abs=1e-5) for token, each in counted.items()
        }


def test_a_decaying_penalty_by_hand() -> None:
    """Two tokens back in full, then 2/3 and 1/3 of the way, then nothing (ExLlamaV2: sustain 2, decay 3)."""
    params = SamplingParams(repetition_penalty=2.0, repetition_penalty_range=2, repetition_decay=3)
    penalised = Penalised(params, [9, 8, 7, 6, 5, 4])
    tokens, share, weight = (column.tolist() for column in penalised.seen())
    assert (tokens, share) == ([4, 5, 6, 7, 8], [1, 1, 1, 1, 1][:2] + [1.0] * 3)
    assert weight == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    # In KoboldCpp's halves the older ones get a share: of five tokens seen, the two oldest.
    params = SamplingParams(repetition_penalty=2.0, repetition_penalty_range=100, repetition_slope=0.3)
    tokens, share, _ = (column.tolist() for column in Penalised(params, [8, 7, 6, 5, 4]).seen())
    assert (tokens, share) == ([4, 5, 6, 7, 8], [1, 1, 1, pytest.approx(0.3), pytest.approx(0.3)])


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=40),
    budget=st.integers(0, 6),
    begin=st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple),
    end=st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
)
def test_thoughts_are_those_of_the_whole_text(text: list[int], budget: int, begin: Any, end: Any) -> None:
    params = SamplingParams(thinking_token_budget=budget)
    for cut in range(len(text) + 1):
        thought = History(params, text[:5], Words(thinking=(begin, end))).follow(text[5:cut]).thought
        assert thought and thought.forced() == forced_token(text[: max(cut, 5)], budget, begin, end)


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.integers(0, 3), min_size=30, max_size=30), budget=st.integers(0, 6))
def test_a_thought_ends_in_time(said: list[int], budget: int) -> None:
    """Whatever the model would say, at most the budget and the end are spent."""
    begin, end = (8,), (5, 6, 7)
    history = History(SamplingParams(thinking_token_budget=budget), [1, *begin], Words(thinking=(begin, end)))
    output: list[int] = []
    for token in said:
        thought = history.follow(output).thought
        assert thought
        forced = thought.forced()
        output.append(token if forced is None else forced)
    assert tuple(output[budget : budget + 3]) == end and output[:budget] == said[:budget]
    assert output[budget + 3 :] == said[budget + 3 :]


EVERYTHING = SamplingParams(
    repetition_penalty=1.3,
    presence_penalty=0.3,
    repetition_penalty_range=7,
    repetition_slope=0.5,
    no_repeat_ngram_size=3,
    dry_multiplier=0.8,
    dry_allowed_length=1,
    thinking_token_budget=2,
)
WORDS = Words(breakers=((4,), (1, 2)), thinking=((0,), (3,)))


def knowledge(history: History) -> tuple[Any, ...]:
    """All that samplers ask of a history."""
    assert history.penalised and history.ngrams and history.repeats and history.thought
    columns = [column.tolist() for column in (*history.penalised.seen(), *history.penalised.counted())]
    return (
        columns,
        sorted(history.ngrams.banned()),
        history.repeats.lengths(),
        history.thought.forced(),
        history.tail(3),
    )


@settings(max_examples=80, deadline=None)
@given(prompt=TOKENS, moves=st.lists(st.tuples(st.integers(0, 6), TOKENS), max_size=8))
def test_rewinding_leaves_no_trace(prompt: list[int], moves: list[tuple[int, list[int]]]) -> None:
    """After any rewinds and continuations a history knows what a new one of the same text knows."""
    history, output = History(EVERYTHING, prompt, WORDS), []
    for back, more in moves:
        output = output[: max(0, len(output) - back)]
        history.follow(output)
        output = output + more
        assert knowledge(history.follow(output)) == knowledge(History(EVERYTHING, prompt, WORDS).follow(output))


def test_another_text_of_the_same_length_is_taken_in_anew() -> None:
    history = History(EVERYTHING, [1, 2], WORDS).follow([1, 2, 3])
    assert knowledge(history.follow([2, 2, 4])) == knowledge(History(EVERYTHING, [1, 2], WORDS).follow([2, 2, 4]))


@given(prompt=TOKENS, output=TOKENS, count=st.integers(0, 70))
def test_the_tail_reaches_back_into_the_prompt(prompt: list[int], output: list[int], count: int) -> None:
    text = prompt + output
    history = History(SamplingParams(), prompt).follow(output)
    assert history.tail(count) == tuple(text[max(0, len(text) - count) :])


def test_growing_tensors_keep_what_they_had() -> None:
    grown = Growing([5, 6])
    for value in range(200):
        grown.append(value)
    assert grown.values.tolist() == [5, 6, *range(200)]


def test_states_belong_to_positions() -> None:
    """Rewinding forgets what was observed beyond, and a gap carries the last state on."""
    params = SamplingParams(mirostat_mode=2, mirostat_tau=3)
    history = History(params, [1])
    first = history.state(0)
    history.observe(0, -1.0)
    second = history.state(1)
    assert first == (6.0,) and second == update(params, first, -1.0) != first
    history.observe(1, -4.0)
    third = history.state(2)
    history.observe(1, -2.0)
    assert history.state(2) == update(params, second, -2.0) != third
    history.observe(0, -1.0)
    assert history.state(1) == second and history.state(9) == second


def test_bans_hold_at_their_position_only() -> None:
    params = SamplingParams(banned_strings=("x",))
    history = History(params, [0], bans={1: {2}})
    for output, wanted in (([], [0, 1, 2]), ([1], [0, 1]), ([1, 1], [0, 1, 2])):
        probs = distribution(torch.zeros(1, 3), [params], [[0]], [output], histories=[history])
        assert probs[0].nonzero()[:, 0].tolist() == wanted


def test_bad_words_ban_the_token_that_completes_them() -> None:
    params = SamplingParams(bad_words=("x",))
    words = Words(bad_words=((1, 2, 3), (4,)))
    for prompt, output, gone in (([1], [2], {3, 4}), ([2], [1], {4}), ([0], [1, 2], {3, 4}), ([2], [], {4})):
        history = History(params, prompt, words)
        probs = distribution(torch.zeros(1, 5), [params], [prompt], [output], histories=[history])
        assert set((probs[0] == 0).nonzero()[:, 0].tolist()) == gone


def test_min_tokens_ends_with_the_token_it_names() -> None:
    params = [SamplingParams(min_tokens=2, stop_token_ids=(0,))] * 3
    probs = distribution(torch.zeros(3, 4), params, [[0]] * 3, [[1], [1, 1], [1, 1, 1]], (3,))
    assert probs.tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4, [0.25] * 4]
    # A model without end tokens has nothing to ban.
    assert distribution(torch.zeros(1, 4), [SamplingParams(min_tokens=3)], [[0]], [[]]).tolist() == [[0.25] * 4]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams(presence_penalty=1.0)]
    probs = distribution(torch.ones(2, 3), params, [[0], [0]], [[], []])
    assert probs[0, 0] < probs[0, 1] and torch.equal(probs[1], torch.full((3,), 1 / 3))
