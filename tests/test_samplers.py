"""The pipeline's promises: every row equals the definitions, rows do not see each other, one seed gives one text."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers import feedback, inputs, pipeline, steps, truncation
from bitsmith.samplers.history import History
from bitsmith.samplers.params import SamplingParams, about
from bitsmith.samplers.pipeline import distribution, sample
from torch import Tensor

from .sampler_cases import EOS, MIXED, VOCAB, Batch, mixed
from .sampler_reference import ORDER, reference, softmax

# Row after row with these, some shrink at top_k, some later or never.
WIDE: tuple[dict[str, Any], ...] = tuple(
    {"top_k": k, "min_p": m, "top_p": p, "temperature": t}
    for k in (40, 1021, 1022, 1023, 2500)
    for m, p, t in ((0.001, 0.999, 1.5), (1e-6, 0.98, 3.0), (1e-9, 0.9999, 4.0))
)


@pytest.mark.parametrize("seed", range(6))
def test_distribution_matches_the_definitions_row_by_row(seed: int) -> None:
    batch = mixed(seed)
    before, texts = batch.logits.clone(), [*map(list, batch.prompts)]
    probs, processed, compared = batch.distribution(), batch.processed(), 0
    assert torch.equal(batch.logits, before) and batch.prompts == texts and probs.dtype == torch.float32
    for row, each in enumerate(MIXED):
        expected = batch.row(row)
        wanted = reference(expected)
        if expected.sure:
            compared += 1
            if batch.params[row].temperature:
                assert np.array_equal(processed[row].numpy() > -np.inf, expected.logits > -np.inf), each
            np.testing.assert_allclose(probs[row].numpy(), wanted, rtol=1e-4, atol=1e-7, err_msg=str(each))
    assert compared > 0.9 * len(MIXED)


def test_the_reference_sees_every_sampler_of_the_batch() -> None:
    """Each of MIXED changes the distribution, or the comparison would prove nothing about it."""
    changed = set()
    for seed in range(6):
        batch = mixed(seed)
        plain = batch.logits.softmax(-1).numpy()
        changed |= {row for row in range(len(MIXED)) if np.abs(reference(batch.row(row)) - plain[row]).max() > 1e-3}
    still = {str(MIXED[row]) for row in set(range(len(MIXED))) - changed}
    assert still == {"{}", str({"top_k": 10**6})}


@pytest.mark.parametrize(
    ("seed", "vocab", "cases"), [(0, VOCAB, MIXED), (1, VOCAB, MIXED), (2, 3000, WIDE), (3, 3000, MIXED)]
)
def test_a_row_is_bit_identical_alone_in_company_and_after_permutation(seed: int, vocab: int, cases: Any) -> None:
    batch = mixed(seed, vocab, cases)
    together, drawn = batch.distribution(), batch.sample()
    for row in range(len(cases)):
        alone = batch.take([row])
        assert torch.equal(alone.distribution()[0], together[row]), cases[row]
        assert alone.sample() == [drawn[row]], cases[row]
    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    assert torch.equal(batch.take(order).distribution(), together[order])
    assert batch.take(order).sample() == [drawn[row] for row in order]


def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = mixed(4, 3000, (*WIDE, *MIXED))
    narrow, probs = batch.processed(), batch.distribution()
    context = pipeline.context_of(*batch.columns(), EOS, batch.seeds, batch.histories())
    widths = {piece.logits.shape[-1] for piece in pipeline.process(batch.logits, context)}
    assert widths == {truncation.HEAD, 3000}
    monkeypatch.setattr(pipeline, "HEAD", 10**9)
    assert torch.equal(batch.processed().isfinite(), narrow.isfinite())
    torch.testing.assert_close(batch.distribution(), probs, rtol=1e-5, atol=1e-6)
    compared = 0
    for row in range(len(batch.params)):
        expected = batch.row(row)
        wanted = reference(expected)
        compared += expected.sure
        assert not expected.sure or np.abs(wanted - probs[row].numpy()).max() < 1e-6, batch.params[row]
    assert compared > 0.6 * len(batch.params)


def test_samples_are_the_races_of_the_distribution() -> None:
    """`sample` draws from what `distribution` says, with the key of the row's seed and position."""
    for vocab in (VOCAB, 3000):
        batch = mixed(5, vocab)
        probs, lengths = batch.distribution(), [len(output) for output in batch.outputs]
        key = pipeline.keys(batch.seeds, lengths, torch.device("cpu"))
        wanted = pipeline.draw(probs, key).tolist()
        assert [each and each.token_id for each in batch.sample()] == wanted


def test_seeds_and_positions_decide_the_draw() -> None:
    def different(seeds: list[int], lengths: list[int]) -> int:
        """How many different tokens a flat distribution gives to rows with these seeds and output lengths."""
        rows, outputs = len(seeds), [[0] * length for length in lengths]
        drawn = sample(torch.zeros(rows, 1000), [SamplingParams()] * rows, [[0]] * rows, outputs, seeds)
        return len({each.token_id for each in drawn if each})

    assert different([9] * 60, [4] * 60) == 1
    assert different(list(range(60)), [4] * 60) > 50
    assert different([9] * 60, list(range(60))) > 50
    # Negative and 63-bit seeds are seeds like any other.
    assert different([-5, 2**63 - 1, 5], [0] * 3) == 3


NONE = torch.zeros(0, dtype=torch.int64)
EVERY = (torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
HALVES = torch.linspace(0, 1, 8)
NEUTRAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit_bias": lambda x, one: steps.logit_bias(x, (NONE, NONE), torch.zeros(0)),
    "allow": lambda x, one: steps.allow(x, (NONE, NONE), one > 0),
    "ban": lambda x, one: steps.ban(x, (NONE, NONE)),
    "repetition_penalty": lambda x, one: steps.repetition_penalty(x, EVERY, torch.ones(8), torch.ones(8)),
    "repetition_penalty, faded": lambda x, one: steps.repetition_penalty(x, EVERY, torch.ones(8), HALVES),
    "presence_frequency_penalty": lambda x, one: steps.presence_frequency_penalty(
        x, one - 1, one - 1, EVERY, torch.full((8,), 4.0), torch.ones(8)
    ),
    "dry": lambda x, one: steps.dry(x, EVERY, torch.full((8,), 5.0), one - 1, one, one.long()),
    "temperature": steps.temperature,
    "temperature, in company": lambda x, one: inputs._temperature(
        x, one, HALVES[:2, None] - HALVES[:2, None], one * 0, one
    ),
    "smoothing": lambda x, one: steps.smoothing(x, one - 1, one),
    "nsigma": lambda x, one: truncation.top_n_sigma(x, one - 1),
    "min_p": lambda x, one: truncation.min_p(x, one - 1),
    "top_k": lambda x, one: truncation.top_k(x, (one - 1).long()),
    "top_p": truncation.top_p,
    "top_a": lambda x, one: truncation.top_a(x, one - 1),
    "tfs": truncation.tfs,
    "eta_cutoff": lambda x, one: truncation.eta_cutoff(x, one - 1),
    "epsilon_cutoff": lambda x, one: truncation.epsilon_cutoff(x, one - 1),
    "typical_p": truncation.typical_p,
    "xtc": lambda x, one: truncation.xtc(x, one * 0.01, one < 0, torch.zeros_like(x, dtype=torch.bool)),
    "skew": lambda x, one: truncation.skew(x, one - 1),
    "mirostat 2": lambda x, one: feedback.mirostat_v2(x, one * torch.inf),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_parameter_returns_the_same_bits(name: str) -> None:
    logits = torch.tensor([[-0.0, 1e-42, -3.3e38, 0.1, 7.0], [-math.inf, 12.5, -1e-3, 12.5, 0.0]])
    out = NEUTRAL[name](logits, torch.ones(2, 1))
    assert torch.equal(out.view(torch.int32), logits.view(torch.int32))


def test_every_step_has_a_neutral_test_and_a_reference() -> None:
    """Adaptive-p has no neutral value; mirostat's is a mu that never comes."""
    known = {name.split(",")[0].split()[0] for name in NEUTRAL}
    functions = {"no_repeat_ngram": "ban", "adaptive_p": "mirostat"}
    assert {functions.get(step.name, step.name) for step in inputs.ORDER} == known
    assert tuple(step.name for step in inputs.ORDER) == ORDER


def test_rows_a_step_does_not_concern_keep_their_bits() -> None:
    batch = mixed(7)
    params = [each if row % 2 else SamplingParams() for row, each in enumerate(batch.params)]
    batch = Batch(batch.logits, params, batch.prompts, batch.outputs)
    assert torch.equal(batch.processed()[::2], batch.logits[::2])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_rows_take_the_best_after_penalties_and_nothing_else(seed: int) -> None:
    """Whatever else they ask for; the lowest id among equals."""
    batch = mixed(seed)
    batch.logits[:, 20] = batch.logits.amax(-1)
    greedy = [SamplingParams(**{**case, "temperature": 0}) for case in MIXED]
    batch = Batch(batch.logits, greedy, batch.prompts, batch.outputs)
    probs, drawn = batch.distribution(), batch.sample()
    for row in range(len(MIXED)):
        wanted = reference(batch.row(row))
        assert probs[row].tolist() == wanted.tolist() and drawn[row] == pipeline.Sampled(int(wanted.argmax()), None, ())


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]]).repeat(3, 1)
    params = [
        SamplingParams(temperature=0, logit_bias={2: 50}, logprobs=3),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, logprobs=99),
    ]
    first, second, third = sample(logits, params, [[0]] * 3, [[]] * 3, [0] * 3)
    assert first and second and third
    wanted = np.log(softmax(np.array([0.0, 2.0, 1.0, 2.0])))
    assert first.token_id == 2 and first.logprob == pytest.approx(wanted[2], abs=1e-6)
    # Best first, the lower id first among equals, whatever was chosen.
    assert [token for token, _ in first.top] == [1, 3, 2]
    assert [value for _, value in first.top] == pytest.approx(wanted[[1, 3, 2]], abs=1e-6)
    assert (second.token_id, second.top) == (1, ()) and second.logprob == pytest.approx(wanted[1], abs=1e-6)
    assert [token for token, _ in third.top] == [1, 3, 2, 0]


def test_every_parameter_is_read_by_one_step_or_by_the_engine() -> None:
    engine = {"seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs", "skip_special_tokens"}
    engine |= {"include_stop_str_in_output", "guidance_scale", "negative_prompt"}
    engine |= {"repetition_detection", "sampler_trace", "sampler_priority", "temperature_last"}
    read = [name for step in inputs.ORDER for name in step.fields]
    # Two penalties share a window.
    shared = {"repetition_penalty_range", "repetition_decay"}
    read += [name for step in inputs.ORDER for name in step.uses if name not in shared]
    assert len(read) == len(set(read)) and not engine & set(read)
    assert engine | set(read) | shared == {each.name for each in fields(SamplingParams)}


@dataclass(frozen=True)
class WithFloor(SamplingParams):
    floor: float = about(0.0, "float", "keep logits of at least this", 0, 1)


def test_a_new_sampler_is_a_function_a_field_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def floor(logits: Tensor, least: Tensor) -> Tensor:
        return logits.masked_fill(logits < least, -torch.inf)

    monkeypatch.setattr(pipeline, "ORDER", (*inputs.ORDER, inputs._cut("floor", floor)))
    logits = torch.tensor([[0.6, 0.6, 0.1]]).repeat(2, 1)
    probs = distribution(logits, [WithFloor.from_request({"floor": 0.5}), WithFloor()], [[0]] * 2, [[]] * 2)
    assert probs[0].tolist() == [0.5, 0.5, 0] and probs[1, 2] > 0


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("vocab", [5, 100_000])
def test_a_row_without_a_finite_logit_is_named(broken: float, vocab: int) -> None:
    logits, cut = torch.zeros(4, vocab), SamplingParams(top_k=3, top_p=0.5, typical_p=0.9, tfs=0.9, nsigma=1)
    logits[1:3] = broken
    params = [SamplingParams(), SamplingParams(temperature=0), cut, SamplingParams()]
    with pytest.raises(ValueError, match=r"rows \[1, 2\] have no finite logit to sample from: NaN from the model"):
        distribution(logits, params, [[0]] * 4, [[]] * 4)
    drawn = sample(logits, params, [[0]] * 4, [[]] * 4, [0] * 4)
    assert drawn[0] and drawn[3] and drawn[1:3] == [None, None]


def test_a_single_nan_breaks_its_row() -> None:
    logits = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = math.nan
    for case in ({}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5, "top_k": 9}, {"temperature": 0}):
        params = [SamplingParams(**case)] * 2
        assert [bool(each) for each in sample(logits, params, [[0]] * 2, [[]] * 2, [0, 0])] == [True, False], case


def test_a_row_of_nan_alone_is_named() -> None:
    logits = torch.full((1, 100_000), math.nan)
    for case in ({"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}, {"tfs": 0.5}, {"mirostat_mode": 1}):
        with pytest.raises(ValueError, match=r"rows \[0\] have no finite logit"):
            distribution(logits, [SamplingParams(**case)], [[0]], [[]])


def test_banning_everything_is_named() -> None:
    params = [SamplingParams(allowed_token_ids=(1,), banned_tokens=(1,)), SamplingParams()]
    with pytest.raises(ValueError, match=r"rows \[0\] have no finite logit .* or all tokens banned"):
        distribution(torch.zeros(2, 4), params, [[0]] * 2, [[]] * 2)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(
        ValueError, match="2 rows of logits, but 2 params, 1 prompts and 2 outputs: one of each per row"
    ):
        distribution(torch.zeros(2, 5), [SamplingParams()] * 2, [[0]], [[], []])


def test_bad_words_need_their_tokens() -> None:
    params = SamplingParams(bad_words=("x",))
    with pytest.raises(ValueError, match="bad_words are text: give histories"):
        distribution(torch.zeros(1, 5), [params], [[0]], [[]])
    history = History(params, [0])
    assert distribution(torch.zeros(1, 5), [params], [[0]], [[]], histories=[history])[0, 0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {4: 1.0, 5: 1.0}),
        ("stop_token_ids", [4, 5]),
        ("allowed_token_ids", [5]),
        ("banned_tokens", [5]),
    ],
)
def test_tokens_beyond_the_vocabulary_are_named(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    with pytest.raises(UserError, match=f"{name} names token 5, but the model has tokens 0 to 4: remove it"):
        distribution(torch.zeros(1, 5), [params], [[0]], [[]])
