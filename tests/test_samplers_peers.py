"""Against the samplers of others where definitions are shared: transformers' processors and llama.cpp's chain."""

import ctypes
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.samplers import inputs, pipeline
from bitsmith.samplers.history import History, Words
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import distribution
from torch import Tensor
from transformers.generation import logits_process

from .sampler_cases import Batch
from .sampler_reference import mirostat_k, softmax

VOCAB = 300
HF: tuple[tuple[dict[str, Any], str, tuple[Any, ...]], ...] = (
    ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor", (1.3,)),
    ({"repetition_penalty": 0.7}, "RepetitionPenaltyLogitsProcessor", (0.7,)),
    ({"temperature": 0.7}, "TemperatureLogitsWarper", (0.7,)),
    ({"top_k": 9}, "TopKLogitsWarper", (9,)),
    ({"top_p": 0.85}, "TopPLogitsWarper", (0.85,)),
    ({"top_p": 0.02}, "TopPLogitsWarper", (0.02,)),
    ({"min_p": 0.08}, "MinPLogitsWarper", (0.08,)),
    ({"typical_p": 0.4}, "TypicalLogitsWarper", (0.4,)),
    ({"typical_p": 0.95}, "TypicalLogitsWarper", (0.95,)),
    ({"epsilon_cutoff": 0.003}, "EpsilonLogitsWarper", (0.003,)),
    ({"eta_cutoff": 0.02}, "EtaLogitsWarper", (0.02,)),
    ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor", (2,)),
    ({"no_repeat_ngram_size": 1}, "NoRepeatNGramLogitsProcessor", (1,)),
    ({"banned_tokens": (3, 7)}, "SuppressTokensLogitsProcessor", ([3, 7],)),
    ({"logit_bias": {3: 2.5, 7: -9.0}}, "SequenceBiasLogitsProcessor", ({(3,): 2.5, (7,): -9.0},)),
)


@pytest.mark.parametrize(("ours", "theirs", "arguments"), HF)
def test_distribution_matches_transformers(ours: dict[str, Any], theirs: str, arguments: tuple[Any, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator) * 3
    # Few tokens, so that n-grams come again.
    texts = torch.randint(0, 9, (6, 30), generator=generator)
    if theirs == "EtaLogitsWarper":
        arguments = (*arguments, -math.inf, 1, "cpu")
    if theirs == "SuppressTokensLogitsProcessor":
        arguments = (*arguments, "cpu")
    wanted = getattr(logits_process, theirs)(*arguments)(texts, logits.clone()).softmax(-1)
    assert not torch.allclose(wanted, logits.softmax(-1), atol=1e-3)
    history: Any = ([row[:20].tolist() for row in texts], [row[20:].tolist() for row in texts])
    torch.testing.assert_close(distribution(logits, [SamplingParams(**ours)] * 6, *history), wanted)


def test_bad_words_are_those_of_transformers() -> None:
    words = [[4], [1, 2], [0, 0, 3]]
    processor = logits_process.NoBadWordsLogitsProcessor(words, eos_token_id=99)
    params = SamplingParams(bad_words=("x",))
    for seed in range(30):
        text = torch.randint(0, 3, (1, 5), generator=torch.Generator().manual_seed(seed))
        history = History(params, text[0, :2].tolist(), Words(bad_words=tuple(map(tuple, words))))
        logits = torch.zeros(1, 6)
        probs = distribution(logits, [params], [text[0, :2].tolist()], [text[0, 2:].tolist()], histories=[history])
        torch.testing.assert_close(probs, processor(text, logits).softmax(-1))


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install it to compare"
)
ROWS = 8


def theirs(make: Callable[[Any], Any], logits: Tensor, text: Sequence[int] = ()) -> Tensor:
    """Logits [V] after llama.cpp's sampler that `make` builds from its library, -inf for what it removed."""
    import llama_cpp.llama_cpp as L

    sampler = make(L)
    assert sampler
    for token in text:
        L.llama_sampler_accept(sampler, token)
    data = (L.llama_token_data * len(logits))()
    for token, logit in enumerate(logits.tolist()):
        data[token].id, data[token].logit = token, logit
    array = L.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    L.llama_sampler_apply(sampler, ctypes.byref(array))
    after = torch.full((len(logits),), -torch.inf)
    for place in range(array.size):
        after[array.data[place].id] = array.data[place].logit
    L.llama_sampler_free(sampler)
    return after


LLAMA: tuple[tuple[dict[str, Any], Callable[[Any], Any]], ...] = (
    ({"top_k": 9}, lambda L: L.llama_sampler_init_top_k(9)),
    ({"top_p": 0.85}, lambda L: L.llama_sampler_init_top_p(0.85, 1)),
    ({"top_p": 0.02}, lambda L: L.llama_sampler_init_top_p(0.02, 1)),
    ({"min_p": 0.08}, lambda L: L.llama_sampler_init_min_p(0.08, 1)),
    ({"typical_p": 0.4}, lambda L: L.llama_sampler_init_typical(0.4, 1)),
    ({"typical_p": 0.95}, lambda L: L.llama_sampler_init_typical(0.95, 1)),
    ({"temperature": 0.7}, lambda L: L.llama_sampler_init_temp(0.7)),
    (
        {"dynatemp_min": 0.4, "dynatemp_max": 1.8, "dynatemp_exponent": 1.5},
        lambda L: L.llama_sampler_init_temp_ext(1.1, 0.7, 1.5),
    ),
    ({"xtc_probability": 1, "xtc_threshold": 0.05}, lambda L: L.llama_sampler_init_xtc(1.0, 0.05, 1, 0)),
    ({"xtc_probability": 1, "xtc_threshold": 0.1}, lambda L: L.llama_sampler_init_xtc(1.0, 0.1, 1, 0)),
    ({"nsigma": 1.2}, lambda L: L.llama_sampler_init_top_n_sigma(1.2)),
    ({"nsigma": 0.2}, lambda L: L.llama_sampler_init_top_n_sigma(0.2)),
)


@needs_llama_cpp
@pytest.mark.parametrize(("ours", "make"), LLAMA)
@pytest.mark.parametrize("banned", [False, True])
def test_distribution_matches_llama_cpp(ours: dict[str, Any], make: Callable[[Any], Any], banned: bool) -> None:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    if banned and not {"dynatemp_min", "typical_p"} & set(ours):
        # There dynamic temperature compares the entropy with that of all tokens, and typical's entropy becomes NaN.
        logits[:, ::7] = -torch.inf
    wanted = torch.stack([theirs(make, row) for row in logits]).softmax(-1)
    assert not torch.allclose(wanted, logits.softmax(-1), atol=1e-3)
    probs = distribution(logits, [SamplingParams(**ours)] * ROWS, [[0]] * ROWS, [[]] * ROWS)
    torch.testing.assert_close(probs, wanted, rtol=1e-4, atol=1e-6)


@needs_llama_cpp
@pytest.mark.parametrize("last_n", [64, 7])
@pytest.mark.parametrize("penalties", [(1.3, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, 0.9), (1.2, 0.3, -0.5)])
def test_penalties_match_llama_cpp(last_n: int, penalties: tuple[float, float, float]) -> None:
    """Which counts prompt and output alike: here the text is all output."""
    repeat, frequency, presence = penalties
    rng = np.random.default_rng(0)
    params = SamplingParams(
        repetition_penalty=repeat,
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty_range=last_n,
    )

    def make(L: Any) -> Any:
        return L.llama_sampler_init_penalties(VOCAB, last_n, repeat, frequency, presence)

    for _ in range(ROWS):
        logits, text = torch.from_numpy(rng.normal(size=VOCAB)).float() * 3, rng.integers(0, 12, size=30).tolist()
        ours = Batch(logits[None], [params], [[]], [text]).processed()[0]
        torch.testing.assert_close(ours, theirs(make, logits, text))


@needs_llama_cpp
@pytest.mark.parametrize(("allowed", "last_n", "base"), [(2, 1000, 1.75), (1, 1000, 1.2), (3, 12, 2.5), (1, 9, 1.75)])
def test_dry_matches_llama_cpp(allowed: int, last_n: int, base: float) -> None:
    params = SamplingParams(dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed, dry_range=last_n)
    rng, penalised = np.random.default_rng(0), 0

    def make(L: Any) -> Any:
        return L.llama_sampler_init_dry(None, 0.8, base, allowed, last_n, None, 0)

    for _ in range(40):
        text = rng.integers(0, 4, size=rng.integers(1, 40)).tolist()
        after = dry_without_breakers(params, text)
        torch.testing.assert_close(after, theirs(make, torch.zeros(6), text))
        penalised += bool((after != 0).any())
    assert penalised > 2


def dry_without_breakers(params: SamplingParams, text: list[int]) -> Tensor:
    history = History(params, text, Words())
    context = pipeline.context_of(torch.zeros(1, 6), [params], [text], [[]], (), None, [history])
    (step,) = pipeline.plan(params)
    assert isinstance(step, inputs.Step) and step.name == "dry"
    return step.apply(torch.zeros(1, 6), *step.inputs(context))[0]


@needs_llama_cpp
@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_mirostat_2_draws_from_the_set_of_llama_cpp(tau: float) -> None:
    """At its beginning; what is fed back differs, see feedback.mirostat_v2."""
    params = SamplingParams(mirostat_mode=2, mirostat_tau=tau)
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    wanted = torch.stack([theirs(lambda L: L.llama_sampler_init_mirostat_v2(0, tau, 0.1), row) for row in logits])
    probs = distribution(logits, [params] * ROWS, [[0]] * ROWS, [[]] * ROWS)
    assert torch.equal(probs > 0, wanted > -torch.inf)
    torch.testing.assert_close(probs, wanted.softmax(-1), rtol=1e-4, atol=1e-6)


@needs_llama_cpp
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_mirostat_1_keeps_what_llama_cpp_keeps_and_rounds_as_its_authors(tau: float) -> None:
    """llama.cpp cuts k down to an integer; its authors round and add one."""
    generator = torch.Generator().manual_seed(3)
    params = SamplingParams(mirostat_mode=1, mirostat_tau=tau)
    for _ in range(ROWS):
        logits = torch.randn(VOCAB, generator=generator) * 2
        kept = theirs(lambda L: L.llama_sampler_init_mirostat(VOCAB, 0, tau, 0.1, 101), logits) > -torch.inf
        ours = distribution(logits[None], [params], [[0]], [[]])[0] > 0
        assert ours[kept].all() and 0 <= int(ours.sum()) - int(kept.sum()) <= 2
        k, sure = mirostat_k(softmax(logits.double().numpy()), 2 * tau)
        assert not sure or int(ours.sum()) == k


@needs_llama_cpp
@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_adaptive_p_matches_llama_cpp(target: float) -> None:
    params = SamplingParams(adaptive_target=target)
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(4)) * 3
    wanted = torch.stack([theirs(lambda L: L.llama_sampler_init_adaptive_p(target, 0.9, 0), row) for row in logits])
    probs = distribution(logits, [params] * ROWS, [[0]] * ROWS, [[]] * ROWS)
    torch.testing.assert_close(probs, wanted.softmax(-1), rtol=1e-4, atol=1e-6)
