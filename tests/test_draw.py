"""The counter-based generator: known answers, the extremes of its range, independence."""

import math

import numpy as np
import pytest
import torch
from bitsmith.samplers import draw


def test_splitmix64_known_answers() -> None:
    """The generator's published outputs for seed 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [draw._mix((1234567 + i * draw._GAMMA) & (2**64 - 1)) for i in range(1, 6)] == wanted
    noise = draw.exponential(torch.tensor(1234567), torch.arange(5))
    assert noise.tolist() == pytest.approx([-math.log1p(-value / 2**64) for value in wanted], rel=1e-6)
    assert draw.keys([-1], [2], torch.device("cpu")).tolist() == [
        draw._signed(draw._mix((draw._mix(2**64 - 1) + 2) & (2**64 - 1)))
    ]


def test_the_extreme_numbers_are_finite_and_positive() -> None:
    """A zero would win against any probability, an infinity would lose even alone."""
    value = 2**64 - 1
    # The state whose hash has all bits set, by undoing `_mix`; the one of 0 is 0.
    value ^= (value >> 31) ^ (value >> 62)
    for shift, multiplier in zip((27, 30), reversed(draw._MULTIPLIERS), strict=True):
        value = value * pow(multiplier, -1, 2**64) % 2**64
        value ^= (value >> shift) ^ (value >> 2 * shift)
    assert draw._mix(value) == 2**64 - 1
    state = torch.tensor([draw._signed((v - draw._GAMMA) % 2**64) for v in (0, value)])
    noise = draw.exponential(state, torch.tensor(0))
    assert noise.tolist() == pytest.approx([2.0**-54, 24 * math.log(2)], rel=1e-6, abs=0)


def test_noise_is_exponential_and_independent_of_its_neighbours() -> None:
    key = draw.keys(range(40), [0] * 40, torch.device("cpu"))
    noise = draw.exponential(key[:, None], torch.arange(10_000)).double()
    assert noise.min() > 0 and noise.max() < 17
    assert abs(float(noise.mean()) - 1) < 0.01 and abs(float(noise.var()) - 1) < 0.02
    for bound in (0.001, 0.1, 1.0, 4.0):
        share = 1 - math.exp(-bound)
        error = math.sqrt(share * (1 - share) / noise.numel())
        assert abs(float((noise < bound).double().mean()) - share) < 5 * error
    correlation = np.corrcoef(noise[:, :200].numpy())
    assert np.abs(correlation - np.eye(40)).max() < 0.4
    # Consecutive positions of one request are as unrelated as two requests.
    steps_noise = draw.exponential(draw.keys([7] * 40, range(40), torch.device("cpu"))[:, None], torch.arange(200))
    assert np.abs(np.corrcoef(steps_noise.numpy()) - np.eye(40)).max() < 0.4


def test_sparse_and_dense_draws_agree() -> None:
    """Padding the vocabulary with impossible tokens switches the path and must not change a draw."""
    probs = torch.randn(50, 20).softmax(-1)
    key = draw.keys(range(50), range(50), probs.device)
    padded = torch.cat([probs, torch.zeros(50, 300)], dim=-1)
    assert torch.equal(draw.draw(padded, key), draw.draw(probs, key))


def test_a_draw_among_named_tokens_is_the_one_among_all() -> None:
    """Compacted rows: the ids decide the numbers, padding repeats id 0."""
    probs = torch.zeros(50, 400)
    ids = torch.stack([torch.randperm(400)[:20].sort().values for _ in range(50)])
    probs.scatter_(-1, ids, torch.randn(50, 20).softmax(-1))
    key = draw.keys(range(50), range(50), probs.device)
    padded = torch.cat([ids, torch.zeros(50, 5, dtype=torch.int64)], dim=-1)
    narrow = torch.cat([probs.gather(-1, ids), torch.zeros(50, 5)], dim=-1)
    assert torch.equal(draw.draw(narrow, key, padded), draw.draw(probs, key))


def test_samplers_have_their_own_numbers() -> None:
    """Uniform in [0, 1), unrelated to each other, to the draw and to the next position."""
    columns = [
        draw.uniform(draw.keys(range(20_000), [position] * 20_000, torch.device("cpu"), sampler)).double()
        for position in (0, 1)
        for sampler in (0, 1, 2)
    ]
    for numbers in columns:
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(float(numbers.mean()) - 0.5) < 5 / math.sqrt(12 * 20_000)
    correlation = np.corrcoef(torch.stack(columns).numpy())
    assert np.abs(correlation - np.eye(6)).max() < 5 / math.sqrt(20_000)
