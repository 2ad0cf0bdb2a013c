"""Mirostat and adaptive-p: their formulas by hand, the state they carry, and what they do to a text over time."""

import math

import numpy as np
import pytest
import torch
from bitsmith.samplers import feedback
from bitsmith.samplers.history import History
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import distribution, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .sampler_reference import Row, mirostat_k, reference, softmax


def test_states_begin_where_the_papers_do_and_follow_their_updates() -> None:
    mirostat = SamplingParams(mirostat_mode=2, mirostat_tau=3.0, mirostat_eta=0.2)
    assert feedback.initial(mirostat) == (6.0,)
    # A token of probability 1/32 surprises by 5 bits, 2 more than asked: mu falls by 0.2 * 2.
    assert feedback.update(mirostat, (6.0,), -5 * math.log(2)) == pytest.approx((5.6,))
    adaptive = SamplingParams(adaptive_target=0.3, adaptive_decay=0.5)
    # As if 0.3 had been drawn for ever: 0.3 (1 + 1/2 + 1/4 ...).
    assert feedback.initial(adaptive) == pytest.approx((0.6, 2.0))
    state = feedback.update(adaptive, feedback.initial(adaptive), math.log(0.9))
    assert state == pytest.approx((0.9 + 0.3, 2.0))
    assert feedback.adaptive_goal(adaptive, feedback.initial(adaptive)) == pytest.approx(0.3)
    assert feedback.adaptive_goal(adaptive, state) == pytest.approx(2 * 0.3 - 1.2 / 2)
    assert feedback.adaptive_goal(adaptive, (9.0, 3.0)) == 0 and feedback.adaptive_goal(adaptive, (-9.0, 3.0)) == 1
    assert feedback.initial(SamplingParams()) == () == feedback.update(SamplingParams(), (), -1.0)


def test_an_adaptive_target_below_zero_is_off() -> None:
    assert SamplingParams(adaptive_target=-0.5) == SamplingParams(adaptive_target=-1) == SamplingParams()
    logits = torch.tensor([[1.0, 2.0]])
    assert torch.equal(
        distribution(logits, [SamplingParams(adaptive_target=-0.5)], [[0]], [[]]),
        distribution(logits, [SamplingParams()], [[0]], [[]]),
    )


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=200),
    mu=st.one_of(st.floats(-5, 20), st.sampled_from([-2000.0, 2000.0])),
    mode=st.integers(1, 2),
)
def test_mirostat_cuts_where_its_mu_says(logits: list[float], mu: float, mode: int) -> None:
    row = Row(np.array(logits), SamplingParams(mirostat_mode=mode), mu=mu)
    reference(row)
    step = feedback.mirostat_v1 if mode == 1 else feedback.mirostat_v2
    kept = step(torch.tensor([logits]), torch.tensor([[mu]])).isfinite()[0]
    assert not row.sure or np.array_equal(kept.numpy(), row.logits > -np.inf)


def test_mirostat_1_by_hand() -> None:
    """p_i of i^-2 is Zipf's law of exponent 2: k = ((2^mu) / (1 - 1/N))^(1/2), rounded, and one more."""
    size = 1000
    logits = -2 * torch.arange(1, size + 1).double().log()
    for mu in (3.0, 8.0, 12.0):
        k = round(math.sqrt(2**mu / (1 - 1 / size))) + 1
        assert mirostat_k(softmax(logits.numpy()), mu)[0] == k
        assert int(feedback.mirostat_v1(logits[None].float(), torch.tensor([[mu]])).isfinite().sum()) == k


def run(params: SamplingParams, logits: Tensor, tokens: int, seed: int) -> tuple[list[int], History]:
    """A text whose every token has the same logits."""
    history, output = History(params, [0]), []
    for _ in range(tokens):
        (drawn,) = sample(logits[None], [params], [[0]], [output], [seed], histories=[history])
        assert drawn
        output = [*output, drawn.token_id]
    return output, history


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("tau", [3.0, 4.5])
def test_mirostat_holds_the_surprise_of_the_text(mode: int, tau: float) -> None:
    """Which is 5.8 bits without it."""
    logits = -1.05 * torch.arange(1, 301).float().log()
    params = SamplingParams(mirostat_mode=mode, mirostat_tau=tau, mirostat_eta=0.1)
    output, _ = run(params, logits, 400, seed=3)
    surprise = -logits.log_softmax(-1) / math.log(2)
    assert float(surprise[output[100:]].mean()) == pytest.approx(tau, abs=0.35)


def test_adaptive_p_draws_around_its_target() -> None:
    """Of tokens with p 0.5, 0.3, 0.1 and many of 0.001, those near 0.3 come most, and in the mean 0.3 is drawn."""
    probs = torch.tensor([0.5, 0.3, 0.1] + [0.001] * 100)
    output, _ = run(SamplingParams(adaptive_target=0.3), probs.log(), 600, seed=1)
    plain, _ = run(SamplingParams(), probs.log(), 600, seed=1)
    assert float(probs[output].mean()) < float(probs[plain].mean()) or output != plain
    one = distribution(probs.log()[None], [SamplingParams(adaptive_target=0.3)], [[0]], [[]])[0]
    assert int(one.argmax()) == 1
    # 5 at the target; 0.2 beside it d = 2/3 and 5 - 10 d^2 / (1 + d) = 2.33.
    assert float((one[1] / one[0]).log()) == pytest.approx(10 * (4 / 9) / (5 / 3), abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(mirostat_mode=2, mirostat_tau=2),
        SamplingParams(mirostat_mode=1),
        SamplingParams(adaptive_target=0.2),
    ],
)
def test_what_was_drawn_is_fed_back(params: SamplingParams) -> None:
    """With its probability before the sampler, after those that come before it."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    warm = SamplingParams(
        **{**{k: getattr(params, k) for k in ("mirostat_mode", "mirostat_tau", "adaptive_target")}, "temperature": 0.5}
    )
    output, history = run(warm, logits, 5, seed=11)
    state = feedback.initial(warm)
    for position, token in enumerate(output):
        assert history.state(position) == pytest.approx(state)
        state = feedback.update(warm, state, float((logits / 0.5).log_softmax(-1)[token]))
    assert history.state(5) == pytest.approx(state)


def test_a_rewound_text_is_drawn_again_the_same() -> None:
    params, logits = SamplingParams(mirostat_mode=2, mirostat_tau=2), torch.randn(50)
    output, history = run(params, logits, 12, seed=5)
    again = output[:7]
    for _ in range(5):
        (drawn,) = sample(logits[None], [params], [[0]], [again], [5], histories=[history])
        assert drawn
        again = [*again, drawn.token_id]
    assert again == output


def test_states_survive_compaction() -> None:
    """Adaptive-p after a cut that leaves few of many tokens is told the probability among those."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(top_k=20, adaptive_target=0.2)
    output, history = run(params, logits, 3, seed=2)
    left = logits.topk(20)
    state = feedback.initial(params)
    for token in output:
        at = left.indices.tolist().index(token)
        state = feedback.update(params, state, float(left.values.log_softmax(-1)[at]))
    assert history.state(3) == pytest.approx(state)
