"""The defects that reading Aphrodite's samplers found (specs/aphrodite.md, 3.4): none of them here."""

from typing import Any

import pytest
import torch
from bitsmith.samplers import inputs
from bitsmith.samplers.history import History
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import distribution, plan, sample

from .sampler_cases import MIXED, Batch, mixed

EVERYTHING = mixed(8)


def beside(logits: torch.Tensor, output: list[int], *rows: dict[str, Any], **params: Any) -> torch.Tensor:
    """Distribution of a row with `params` among rows with others, checked to be the one it has alone."""
    mine = SamplingParams(**params)
    others = [SamplingParams(**row) for row in rows]
    batch = Batch(
        logits.expand(len(rows) + 1, -1), [*others, mine], [[1]] * (len(rows) + 1), [output] * (len(rows) + 1)
    )
    alone = Batch(logits[None], [mine], [[1]], [output])
    assert torch.equal(batch.distribution()[-1], alone.distribution()[0])
    return alone.distribution()[0]


def test_1_penalties_apply_once() -> None:
    """There r acted as r squared, frequency and presence doubled."""
    logits = torch.tensor([2.0, -2.0, 0.5, 0.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    after = Batch(logits[None], [params], [[1]], [[0, 0]]).processed()
    assert after.tolist() == [[2 / 2 - 2 * 0.5 - 0.25, -2 * 2, 0.5, 0.0]]
    names = [step.name for step in plan(params)]
    assert names == ["repetition_penalty", "presence_frequency_penalty"]
    # A chosen order does not run them again either.
    again = SamplingParams(repetition_penalty=2.0, sampler_priority=("penalties", "rep_pen", "temperature", 6))
    assert [step.name for step in plan(again)] == ["repetition_penalty"]


@pytest.mark.parametrize("mode", [1, 2])
def test_2_mirostat_leaves_other_rows_alone(mode: int) -> None:
    """There one such request made all rows skip temperature, penalties and every cut."""
    steering = {"mirostat_mode": mode, "mirostat_tau": 2}
    for case in MIXED:
        if "mirostat_mode" not in case:
            beside(EVERYTHING.logits[0], [5, 6], steering, **case)
    cut = beside(torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0]), [], steering, top_k=2)
    assert (cut > 0).tolist() == [True, True, False, False, False]


def test_3_nsigma_of_one_row_is_not_greedy_for_the_others() -> None:
    """There a row with nsigma 0 lost all but its best token beside one with nsigma 1."""
    logits = torch.tensor([3.0, 2.5, 1.0, 0.0, 1.0])
    assert torch.equal(beside(logits, [], {"nsigma": 1.0}), logits[None].softmax(-1)[0])
    assert not plan(SamplingParams(nsigma=0)) and not plan(SamplingParams(nsigma=-1))


@pytest.mark.parametrize(("on", "off"), [({"tfs": 0.5}, {"tfs": 1}), ({"typical_p": 0.5}, {"typical_p": 1})])
def test_3_rows_with_tfs_or_typical_at_1_keep_their_tail(on: dict[str, Any], off: dict[str, Any]) -> None:
    logits = torch.tensor([9.0, 2.5, 1.0, 0.0, -9.0])
    assert torch.equal(beside(logits, [], on, **off), logits[None].softmax(-1)[0])
    # The same with other samplers in common.
    both = beside(logits, [], {**on, "min_p": 1e-9}, **off, min_p=1e-9)
    assert (both > 0).all()


def test_3_a_banned_token_does_not_switch_nsigma_off() -> None:
    """There one -inf made the standard deviation NaN."""
    probs = beside(torch.tensor([3.0, 2.9, -3.0, 0.0, -2.0]), [], nsigma=0.5, banned_tokens=(4,))
    assert (probs > 0).tolist() == [True, True, False, False, False]


def test_4_xtc_and_mirostat_respect_the_seed() -> None:
    """There coins and draws came from one generator for all."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    for case in ({"xtc_probability": 0.5, "xtc_threshold": 0.01}, {"mirostat_mode": 2}, {"mirostat_mode": 1}):
        texts = []
        for noise in range(3):
            torch.manual_seed(noise)
            params, text = SamplingParams(**case, seed=7), []
            history = History(params, [0])
            for _ in range(12):
                # Other rows draw before and after.
                rows = [SamplingParams(xtc_probability=0.5), params, SamplingParams(mirostat_mode=2)][noise:]
                place = rows.index(params) if params in rows else 0
                rows = rows if params in rows else [params]
                histories = [history if row is params else History(row, [0]) for row in rows]
                drawn = sample(
                    logits.expand(len(rows), -1),
                    rows,
                    [[0]] * len(rows),
                    [text] * len(rows),
                    [7] * len(rows),
                    histories=histories,
                )[place]
                assert drawn
                text = [*text, drawn.token_id]
            texts.append(text)
        assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 1
    coins = [
        distribution(logits, [SamplingParams(xtc_probability=0.5, xtc_threshold=0.01)], [[0]], [[]], seeds=[s])
        for s in range(40)
    ]
    assert 8 < sum(bool(probs[0, logits.argmax()] == 0) for probs in coins) < 32


def test_5_greedy_rows_stay_greedy_in_mixed_batches() -> None:
    """There temperature 0 became 1e-5, and the row was sampled."""
    logits = torch.zeros(37)
    logits[30] = 1e-6
    greedy = beside(logits, [5], *MIXED, temperature=0)
    assert greedy.tolist() == [float(token == 30) for token in range(37)]
    assert not [step.name for step in plan(SamplingParams(temperature=0, top_k=3, mirostat_mode=2, xtc_probability=1))]
    params = [SamplingParams(**case) for case in MIXED] + [SamplingParams(temperature=0)]
    rows = len(params)
    for seed in range(5):
        drawn = sample(logits.expand(rows, -1), params[-1:] * rows, [[0]] * rows, [[]] * rows, [seed] * rows)
        assert {each.token_id for each in drawn if each} == {30}


def test_6_every_sampler_is_in_the_distribution_that_verifies_drafts() -> None:
    """There drafts were verified with penalties, temperature, top-k and top-p only."""
    batch = mixed(9)
    probs = batch.distribution()
    for row, case in enumerate(MIXED):
        draws = {each.token_id for seed in range(20) for each in one(batch.take([row]), seed) if each}
        if "xtc_probability" not in case:
            assert all(probs[row, token] > 0 for token in draws), case


def one(batch: Batch, seed: int) -> list[Any]:
    return sample(*batch.columns(), [seed], batch.eos, batch.histories())


def test_7_no_step_copies_logits_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """There loops over rows with .item() ran in several samplers; here no step reads a logit on the host."""
    batch = mixed(10)

    def refuse(self: torch.Tensor, *args: Any) -> Any:
        if self.shape[-1:] == batch.logits.shape[-1:]:
            raise AssertionError("a row of logits is read on the host")
        return real(self, *args)

    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    assert batch.distribution().shape == batch.logits.shape


def test_8_zeros_of_kobold_clients_are_values() -> None:
    """There `or` turned temperature 0 into 1, and samplers were accepted and dropped."""
    request = {
        "temperature": 0, "xtc_threshold": 0, "rep_pen": 1.1, "rep_pen_range": 64, "rep_pen_slope": 0.7, "nsigma": 1.5,
        "dynatemp_range": 0.3, "sampler_order": [6, 0, 1, 3, 4, 2, 5], "mirostat": 2, "dry_multiplier": 0.8, "logit_bias": {"5": -3},
    }  # fmt: skip
    params = SamplingParams.from_request(request)
    assert params.greedy and params.xtc_threshold == 0 and params.repetition_penalty_range == 64
    assert params.repetition_slope == 0.7 and params.nsigma == 1.5 and params.mirostat_mode == 2
    assert params.dynatemp_max == 0.3 and params.dry_multiplier == 0.8 and params.logit_bias == {5: -3}
    assert params.sampler_priority[:3] == ("repetition_penalty", "presence_frequency_penalty", "top_k")


def test_every_sampler_is_in_the_mixed_batch() -> None:
    """What these tests rely on."""
    used = {step.name for case in MIXED for step in plan(SamplingParams(**case))}
    assert used == {step.name for step in inputs.ORDER}
