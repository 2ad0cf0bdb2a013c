"""Steps that remove tokens, and XTC and skew, one by one against their definitions: ties, infinities, extremes."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.samplers import truncation
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from .sampler_cases import Batch
from .sampler_reference import Row, reference, softmax

SHARE = st.one_of(st.floats(0.001, 0.999), st.sampled_from([1e-300, 1e-6, 0.5, 1 - 1e-9]))
SMALL = st.one_of(st.floats(0.001, 1), st.sampled_from([1e-30, 1e-6, 1.0, 5.0]))
CASES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "temperature": st.builds(dict, temperature=st.one_of(st.floats(0.01, 5), st.sampled_from([2e-5, 1000.0]))),
    "dynamic temperature": st.builds(
        dict, dynatemp_min=st.floats(0, 1), dynatemp_max=st.floats(1, 4), dynatemp_exponent=st.floats(0.1, 4)
    ),
    "smoothing": st.builds(dict, smoothing_factor=st.floats(0.01, 3), smoothing_curve=st.floats(1, 3)),
    "nsigma": st.builds(dict, nsigma=st.one_of(st.floats(0.01, 4), st.sampled_from([1e-6, 1e6, 1]))),
    "min_p": st.builds(dict, min_p=st.one_of(st.floats(0.001, 1), st.sampled_from([1e-30, 1]))),
    "top_k": st.builds(dict, top_k=st.integers(0, 20)),
    "top_p": st.builds(dict, top_p=SHARE),
    "top_a": st.builds(dict, top_a=SMALL),
    "tfs": st.builds(dict, tfs=SHARE),
    "eta_cutoff": st.builds(dict, eta_cutoff=SMALL),
    "epsilon_cutoff": st.builds(dict, epsilon_cutoff=SMALL),
    "typical_p": st.builds(dict, typical_p=st.one_of(SHARE, st.just(0))),
    "xtc": st.builds(dict, xtc_probability=st.just(1), xtc_threshold=st.one_of(st.floats(0, 1), st.just(0.1))),
    "skew": st.builds(dict, skew=st.one_of(st.floats(-2, 2), st.sampled_from([-20.0, 20, 1]))),
    "mirostat": st.builds(dict, mirostat_mode=st.integers(1, 2), mirostat_tau=st.floats(0, 8)),
    "adaptive_p": st.builds(dict, adaptive_target=st.one_of(st.floats(0, 1), st.sampled_from([0, 1]))),
}
# Ties and infinities are common, one token is possible.
LOGITS = st.lists(
    st.one_of(st.integers(-4, 4).map(float), st.floats(-12, 12, width=32), st.just(-math.inf)), min_size=1, max_size=14
).filter(lambda row: max(row) > -math.inf)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), logits=LOGITS)
def test_a_step_is_its_definition(name: str, data: st.DataObject, logits: list[float]) -> None:
    params = SamplingParams(**data.draw(CASES[name]))
    batch = Batch(torch.tensor([logits]), [params], [[0]], [[]])
    # The end of sequence, which XTC spares, is token 3 or none.
    batch = replace(batch, eos=(3,) if len(logits) > 3 else ())
    processed, probs = batch.processed()[0].numpy(), batch.distribution()[0].numpy()
    assert math.isclose(float(probs.sum()), 1, rel_tol=1e-5) and not probs[np.isinf(logits)].any()
    row = batch.row(0)
    wanted = reference(row)
    if row.sure:
        assert np.array_equal(processed > -np.inf, row.logits > -np.inf)
        # A difference of 1e-6 between logits is 1e-6 / temperature of a probability.
        np.testing.assert_allclose(probs, wanted, rtol=3e-4 / min(1, params.temperature), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_most_random_rows_are_compared(name: str) -> None:
    """A reference that is seldom sure would prove little."""
    sure, changed = 0, 0
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "temperature": {"temperature": 0.6}, "dynamic temperature": {"dynatemp_min": 0.3, "dynatemp_max": 2},
        "smoothing": {"smoothing_factor": 0.3}, "nsigma": {"nsigma": 1}, "min_p": {"min_p": 0.1}, "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.7}, "top_a": {"top_a": 0.5}, "tfs": {"tfs": 0.9}, "eta_cutoff": {"eta_cutoff": 0.2},
        "epsilon_cutoff": {"epsilon_cutoff": 0.1}, "typical_p": {"typical_p": 0.6},
        "xtc": {"xtc_probability": 1, "xtc_threshold": 0.1}, "skew": {"skew": 0.4},
        "mirostat": {"mirostat_mode": 2, "mirostat_tau": 1}, "adaptive_p": {"adaptive_target": 0.3},
    }  # fmt: skip
    for _ in range(50):
        logits = rng.normal(scale=2, size=12)
        row = Row(logits, SamplingParams(**values[name]))
        changed += bool(np.abs(reference(row) - softmax(logits)).max() > 0.01)
        sure += row.sure
    assert sure > 45 and changed > 40


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.one_of(st.integers(-6, 6).map(float), st.floats(-30, 30, width=32)), min_size=1, max_size=30),
    mass=st.floats(2**-20, 1, exclude_max=True, width=32),
    head=st.integers(1, 30),
)
def test_top_p_keeps_the_smallest_sufficient_prefix(logits: list[float], mass: float, head: int) -> None:
    """With every size of the head, so that both of its paths are taken."""
    row = torch.tensor([logits, logits])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "HEAD", head)
        kept = truncation.top_p(row, torch.tensor([[mass], [0.5]])).isfinite()
    probs = softmax(row[0].double().numpy())
    order = sorted(range(len(logits)), key=lambda i: (-float(row[0, i]), i))
    for flags, wanted in ((kept[0], mass), (kept[1], 0.5)):
        count = int(flags.sum())
        assert count >= 1 and flags[order[:count]].all()
        assert probs[order[: count - 1]].sum() < wanted + 1e-6
        assert probs[order[:count]].sum() > wanted - 1e-6


def test_the_smallest_set_has_no_gaps() -> None:
    """Where a tiny probability stands before a large one, as in typical's order, differences of sums round backwards."""
    probs = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 0.45
    probs[:, 1] = 1e-10
    masses = (probs.cumsum(-1) - probs)[:, 1:2]
    inside = truncation._inside(probs, masses)
    assert torch.equal(inside, torch.arange(3) < inside.sum(-1, keepdim=True))


def test_top_p_1_keeps_tokens_below_float32_precision() -> None:
    logits = torch.tensor([[0.0, -30.0, -40.0]])
    assert torch.equal(truncation.top_p(logits, torch.ones(1, 1)), logits)


def test_top_p_takes_its_share_of_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # 0.4 and 0.3 renormalise to 0.571 and 0.429: the first alone holds half.
    probs = distribution(logits, [SamplingParams(top_k=2, top_p=0.5)], [[0]], [[]])
    assert probs.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def kept(logits: list[float], **params: Any) -> list[int]:
    probs = distribution(torch.tensor([logits]), [SamplingParams(**params)], [[0]], [[]])[0]
    return probs.nonzero()[:, 0].tolist()


def test_ties() -> None:
    """top_k and min_p keep every tied token; top_p, lower ids first, stops at its mass; XTC keeps the highest id."""
    logits = [1.0, 2.0, 2.0, 2.0, 0.0]
    assert kept(logits, temperature=0) == [1]
    assert kept(logits, top_k=2) == kept(logits, min_p=1) == kept(logits, top_a=1e6) == [1, 2, 3]
    assert kept(logits, epsilon_cutoff=0.9) == kept(logits, nsigma=1e-9) == [1, 2, 3]
    assert kept(logits, mirostat_mode=2, mirostat_tau=0) == [1, 2, 3]
    assert kept(logits, top_p=0.5) == [1, 2]
    assert kept(logits, xtc_probability=1, xtc_threshold=0.2) == [0, 3, 4]


def test_the_crossing_token_stays() -> None:
    logits = np.log([0.5, 0.3, 0.2]).tolist()
    assert kept(logits, top_p=0.6) == [0, 1]
    # |-ln p - H| with H = 1.03 is 0.34, 0.17, 0.58: the second token comes first.
    assert kept(logits, typical_p=0.2) == [1] and kept(logits, typical_p=0.4) == [0, 1]


def test_tfs_as_published_drops_the_last_token() -> None:
    """Second differences of 0.4 0.3 0.2 0.07 0.03 are 0, 0.03, 0.09: shares 0, 0.25, 1."""
    logits = np.log([0.4, 0.3, 0.2, 0.07, 0.03]).tolist()
    assert kept(logits, tfs=0.9) == [0, 1, 2] and kept(logits, tfs=0.2) == [0, 1]
    assert kept(logits[:2], tfs=0.9) == [0] and kept(logits[:1], tfs=0.9) == [0]


def test_xtc_leaves_rows_whose_protected_token_it_would_remove() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    params = [SamplingParams(xtc_probability=1)]
    assert distribution(logits, params, [[0]], [[]]).nonzero()[:, 1].tolist() == [2, 3]
    # The end of sequence is one of them; one that stays anyway does not matter.
    for eos, wanted in (((1,), [0, 1, 2, 3]), ((2,), [2, 3]), ((3,), [2, 3])):
        assert distribution(logits, params, [[0]], [[]], eos).nonzero()[:, 1].tolist() == wanted


def test_xtc_tosses_as_often_as_it_should() -> None:
    rows = 20_000
    logits = torch.log(torch.tensor([[0.6, 0.4]])).expand(rows, 2)
    params = SamplingParams(xtc_probability=0.3)
    probs = distribution(logits, [params] * rows, [[0]] * rows, [[]] * rows, seeds=range(rows))
    assert abs(float((probs[:, 0] == 0).float().mean()) - 0.3) < 5 * math.sqrt(0.21 / rows)


@pytest.mark.parametrize("exponent", [-1.5, 0.7])
def test_skew_is_a_bent_random_number(exponent: float) -> None:
    """ExLlamaV2 draws u in [0, 1), takes u^(exp -skew), and walks the ranked tokens that far."""
    probs = np.array([0.5, 0.25, 0.15, 0.1])
    u = (np.arange(200_000) + 0.5) / 200_000
    chosen = np.searchsorted(np.cumsum(probs), u ** math.exp(-exponent))
    ours = distribution(
        torch.from_numpy(np.log(probs[::-1]))[None].float(), [SamplingParams(skew=exponent)], [[0]], [[]]
    )
    np.testing.assert_allclose(ours[0].numpy()[::-1], np.bincount(chosen) / len(u), atol=2e-5)


def test_large_vocabulary() -> None:
    logits = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0))
    # The second row's set reaches beyond the head of 1024 tokens, the others' do not.
    params = [
        SamplingParams(top_p=0.001),
        SamplingParams(top_p=0.97),
        SamplingParams(top_k=50, top_p=0.9),
        SamplingParams(top_k=3000),
    ]
    probs = distribution(logits, params, [[0]] * 4, [[]] * 4)
    for row, each in enumerate(params):
        wanted = reference(Row(logits[row].double().numpy(), each))
        # Sums of 200 000 terms may place the last token differently.
        assert abs(int((probs[row] > 0).sum()) - int((wanted > 0).sum())) <= 2
        assert np.abs(probs[row].numpy() - wanted).sum() < 1e-4


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), scale=st.sampled_from([0.0, 1.0, 1e30]))
def test_the_best_are_found_among_folds(seed: int, count: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-5, 5, size=(2, 16 * 4 * count + int(rng.integers(40)))) * scale
    values[0, rng.random(values.shape[1]) < 0.9] = -np.inf
    row = torch.from_numpy(values).float()
    wanted = np.argsort(-row.numpy(), axis=1, kind="stable")[:, :count]
    assert np.array_equal(truncation._best(row, count).numpy(), wanted)
