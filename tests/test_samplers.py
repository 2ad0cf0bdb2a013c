"""Each sampler against its definition written again in numpy float64, row by row, and the pipeline's promises:

rows do not see each other, neutral rows keep their bits, one seed gives one text, frequencies match the distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers import pipeline, steps
from bitsmith.samplers.params import SamplingParams, about
from bitsmith.samplers.pipeline import ORDER, Step, distribution, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

VOCAB = 37
EOS = frozenset({3})


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """The distribution of one row in float64, from the definitions alone."""
    values = [float(value) for value in logits]
    for token, bias in (params.logit_bias or {}).items():
        values[token] += bias
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}:
            values[token] = -math.inf
    for token in set(prompt) | set(output):
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(output):
        values[token] -= output.count(token) * params.frequency_penalty + params.presence_penalty
    row = np.array(values)
    if params.temperature == 0:
        return np.eye(len(row))[int(row.argmax())]
    row = row / params.temperature
    probs = softmax(row)
    row[probs < params.min_p * probs.max()] = -math.inf
    if 0 < params.top_k < len(row):
        row[row < np.sort(row)[-params.top_k]] = -math.inf
    if params.top_p < 1:
        probs, mass = softmax(row), 0.0
        for token in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if mass >= params.top_p:
                row[token] = -math.inf
            mass += probs[token]
    return softmax(row)


MIXED = (
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=1e-300),
    SamplingParams(min_p=0.1),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, temperature=0),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.9),
    SamplingParams(presence_penalty=-0.5, frequency_penalty=0.7, repetition_penalty=1.2),
    SamplingParams(logit_bias={0: 4.0, 5: -100, 36: 1.25}),
    SamplingParams(min_tokens=9, stop_token_ids=(7, 9)),
    SamplingParams(min_tokens=9, stop_token_ids=(7,), ignore_eos=True),
    SamplingParams(min_tokens=2, stop_token_ids=(7,)),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1, logit_bias={3: 2.0}),
    SamplingParams(temperature=0.4, top_p=0.6, presence_penalty=0.4, frequency_penalty=0.2),
)


def mixed_batch(
    seed: int = 0,
) -> tuple[Tensor, list[SamplingParams], list[list[int]], list[list[int]]]:
    """Logits, MIXED, prompts and outputs; the histories repeat tokens and overlap."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(scale=3, size=(len(MIXED), VOCAB))).float()
    logits[:, 11] = -math.inf
    prompts = [rng.integers(0, VOCAB, size=rng.integers(1, 12)).tolist() for _ in MIXED]
    outputs = [rng.integers(0, 12, size=rng.integers(0, 8)).tolist() for _ in MIXED]
    return logits, list(MIXED), prompts, outputs


@pytest.mark.parametrize("seed", range(8))
def test_distribution_matches_the_definitions_row_by_row(seed: int) -> None:
    logits, params, prompts, outputs = mixed_batch(seed)
    before = logits.clone()
    probs = distribution(logits, params, prompts, outputs, EOS)
    assert torch.equal(logits, before) and probs.dtype == torch.float32
    for row, each in enumerate(params):
        wanted = reference(logits[row].double().numpy(), each, prompts[row], outputs[row])
        assert np.array_equal(probs[row].numpy() > 0, wanted > 1e-45), each
        np.testing.assert_allclose(probs[row].numpy(), wanted, rtol=2e-5, atol=1e-9, err_msg=str(each))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"temperature": 0.7}, "TemperatureLogitsWarper"),
        ({"top_k": 9}, "TopKLogitsWarper"),
        ({"top_p": 0.85}, "TopPLogitsWarper"),
        ({"min_p": 0.08}, "MinPLogitsWarper"),
    ],
)
def test_distribution_matches_transformers(ours: dict[str, Any], theirs: str) -> None:
    logits = torch.randn(4, 500) * 3
    texts = torch.randint(0, 500, (4, 30))
    (value,) = ours.values()
    wanted = getattr(logits_process, theirs)(value)(texts, logits.clone()).softmax(-1)
    history: Any = ([row[:20].tolist() for row in texts], [row[20:].tolist() for row in texts])
    torch.testing.assert_close(distribution(logits, [SamplingParams(**ours)] * 4, *history), wanted)


def test_min_tokens_ends_with_the_token_it_names() -> None:
    params = [SamplingParams(min_tokens=2, stop_token_ids=(0,))] * 3
    probs = distribution(torch.zeros(3, 4), params, [[0]] * 3, [[1], [1, 1], [1, 1, 1]], EOS)
    assert probs.tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4, [0.25] * 4]
    # A model without end tokens has nothing to ban.
    assert distribution(torch.zeros(1, 4), [SamplingParams(min_tokens=3)], [[0]], [[]]).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_bit_identical_alone_in_company_and_after_permutation(seed: int) -> None:
    logits, params, prompts, outputs = mixed_batch(seed)
    seeds = list(range(len(params)))
    together = distribution(logits, params, prompts, outputs, EOS)
    drawn = sample(logits, params, prompts, outputs, seeds, EOS)
    for row in range(len(params)):
        one, alone, prompt, output = logits[row : row + 1], [params[row]], [prompts[row]], [outputs[row]]
        assert torch.equal(distribution(one, alone, prompt, output, EOS)[0], together[row])
        assert sample(one, alone, prompt, output, [seeds[row]], EOS) == [drawn[row]]
    order = torch.randperm(len(params)).tolist()

    def shuffled(column: Sequence[Any]) -> list[Any]:
        return [column[i] for i in order]

    columns = shuffled(params), shuffled(prompts), shuffled(outputs), shuffled(seeds)
    assert sample(logits[order], *columns, EOS) == shuffled(drawn)


NOWHERE = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
EVERY = (torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2]))
NEUTRAL_CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit_bias": lambda x, one: steps.logit_bias(x, NOWHERE, torch.zeros(0)),
    "ban": lambda x, one: steps.ban(x, NOWHERE),
    "repetition_penalty": lambda x, one: steps.repetition_penalty(x, one, EVERY),
    "presence_frequency_penalty": lambda x, one: steps.presence_frequency_penalty(
        x, one - 1, one - 1, EVERY, torch.full((6,), 4)
    ),
    "temperature": steps.temperature,
    "min_p": lambda x, one: steps.min_p(x, one - 1),
    "top_k": lambda x, one: steps.top_k(x, (one - 1).long()),
    "top_p": steps.top_p,
}


@pytest.mark.parametrize("name", NEUTRAL_CALLS)
def test_a_neutral_parameter_returns_the_same_bits(name: str) -> None:
    logits = torch.tensor([[-0.0, 1e-42, -3.3e38, 0.1, 7.0], [-math.inf, 12.5, -1e-3, 12.5, 0.0]])
    out = NEUTRAL_CALLS[name](logits, torch.ones(2, 1))
    assert torch.equal(out.view(torch.int32), logits.view(torch.int32))


def test_top_p_1_keeps_tokens_below_float32_precision() -> None:
    logits = torch.tensor([[0.0, -30.0, -40.0]])
    assert torch.equal(steps.top_p(logits, torch.ones(1, 1)), logits)


def test_rows_a_step_does_not_concern_keep_their_bits() -> None:
    logits, params, prompts, outputs = mixed_batch()
    params = [each if row % 2 else SamplingParams() for row, each in enumerate(params)]
    context = pipeline.Context(params, prompts, outputs, EOS, logits.device)
    assert torch.equal(pipeline.process(logits, context)[::2], logits[::2])


def test_penalties_apply_once() -> None:
    """Aphrodite 0.20 applied them twice: r acted as r squared, frequency and presence doubled."""
    logits = torch.tensor([[2.0, -2.0, 0.5, 0.0]])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    context = pipeline.Context([params], [[1]], [[0, 0]], (), logits.device)
    assert pipeline.process(logits, context).tolist() == [[2 / 2 - 2 * 0.5 - 0.25, -2 * 2, 0.5, 0.0]]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    logits = torch.ones(2, 3)
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams(presence_penalty=1.0)]
    probs = distribution(logits, params, [[0], [0]], [[], []])
    assert probs[0, 0] < probs[0, 1] and torch.equal(probs[1], torch.full((3,), 1 / 3))


def test_top_p_takes_its_share_of_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # 0.4 and 0.3 renormalise to 0.571 and 0.429: the first alone holds half.
    probs = distribution(logits, [SamplingParams(top_k=2, top_p=0.5)], [[0]], [[]])
    assert probs.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_ties() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(4, 1)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=1),
    ]
    kept = [(row > 0).nonzero()[:, 0].tolist() for row in distribution(logits, params, [[0]] * 4, [[]] * 4)]
    # Greedy takes the lowest id; top_k and min_p keep every tied token; top_p, lower ids first, stops at its mass.
    assert kept == [[1], [1, 2, 3], [1, 2], [1, 2, 3]]


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.one_of(st.integers(-6, 6).map(float), st.floats(-30, 30, width=32)), min_size=1, max_size=30),
    mass=st.floats(2**-20, 1, exclude_max=True, width=32),
    head=st.integers(1, 30),
)
def test_top_p_keeps_the_smallest_sufficient_prefix(logits: list[float], mass: float, head: int) -> None:
    """With every size of the head, so that both of its paths are taken."""
    row = torch.tensor([logits, logits])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "HEAD", head)
        kept = steps.top_p(row, torch.tensor([[mass], [0.5]])).isfinite()
    probs = softmax(row[0].double().numpy())
    order = sorted(range(len(logits)), key=lambda i: (-float(row[0, i]), i))
    for flags, wanted in ((kept[0], mass), (kept[1], 0.5)):
        count = int(flags.sum())
        assert count >= 1 and flags[order[:count]].all()
        assert probs[order[: count - 1]].sum() < wanted + 1e-6
        assert probs[order[:count]].sum() > wanted - 1e-6


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.one_of(st.just(-math.inf), st.integers(-3, 3).map(float)), min_size=1, max_size=12),
    k=st.integers(0, 15),
    fraction=st.sampled_from([0.0, 1e-30, 0.3, 1.0]),
    hot=st.sampled_from([1e-5, 0.5, 1000.0]),
)
def test_top_k_and_min_p_with_ties_and_infinities(logits: list[float], k: int, fraction: float, hot: float) -> None:
    if max(logits) == -math.inf:
        logits[0] = 0.0
    params = SamplingParams(top_k=k, min_p=fraction, temperature=hot)
    probs = distribution(torch.tensor([logits]), [params], [[0]], [[]])[0]
    assert probs.isfinite().all() and math.isclose(float(probs.sum()), 1, rel_tol=1e-5)
    wanted = reference(np.array(logits), params, [0], [])
    np.testing.assert_allclose(probs.numpy(), wanted, rtol=1e-4, atol=1e-30)


def test_large_vocabulary() -> None:
    logits = torch.randn(3, 200_000)
    # The second row's set reaches beyond the head of 1024 tokens, the others' do not.
    params = [SamplingParams(top_p=0.001), SamplingParams(top_p=0.97), SamplingParams(top_k=50, top_p=0.9)]
    probs = distribution(logits, params, [[0]] * 3, [[]] * 3)
    for row, each in enumerate(params):
        wanted = reference(logits[row].double().numpy(), each, [0], [])
        # float32 sums of 200 000 terms may place the last token differently.
        assert abs(int((probs[row] > 0).sum()) - int((wanted > 0).sum())) <= 2
        assert np.abs(probs[row].numpy() - wanted).sum() < 1e-4
    assert all(each.token_id < 200_000 for each in sample(logits, params, [[0]] * 3, [[]] * 3, [1, 2, 3]))


def test_seeds_and_positions_decide_the_draw() -> None:
    def different(seeds: list[int], lengths: list[int]) -> int:
        """How many different tokens a flat distribution gives to rows with these seeds and output lengths."""
        rows, outputs = len(seeds), [[0] * length for length in lengths]
        drawn = sample(torch.zeros(rows, 1000), [SamplingParams()] * rows, [[0]] * rows, outputs, seeds)
        return len({each.token_id for each in drawn})

    assert different([9] * 60, [4] * 60) == 1
    assert different(list(range(60)), [4] * 60) > 50
    assert different([9] * 60, list(range(60))) > 50
    # Negative and 63-bit seeds are seeds like any other.
    assert different([-5, 2**63 - 1, 5], [0] * 3) == 3


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]]).repeat(3, 1)
    params = [
        SamplingParams(temperature=0, logit_bias={2: 50}, logprobs=3),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, logprobs=99),
    ]
    first, second, third = sample(logits, params, [[0]] * 3, [[]] * 3, [0] * 3)
    wanted = np.log(softmax(np.array([0.0, 2.0, 1.0, 2.0])))
    assert first.token_id == 2 and first.logprob == pytest.approx(wanted[2], abs=1e-6)
    # Best first, the lower id first among equals, whatever was chosen.
    assert [token for token, _ in first.top] == [1, 3, 2]
    assert [value for _, value in first.top] == pytest.approx(wanted[[1, 3, 2]], abs=1e-6)
    assert (second.token_id, second.top) == (1, ()) and second.logprob == pytest.approx(wanted[1], abs=1e-6)
    assert [token for token, _ in third.top] == [1, 3, 2, 0]
    assert sample(logits[:1], [SamplingParams(temperature=0)], [[0]], [[]], [0])[0].logprob is None


@dataclass(frozen=True)
class WithTopA(SamplingParams):
    top_a: float = field(default=0.0, metadata=about("float", "keep tokens with p >= top_a * (max p)^2", 0, 1))


def test_a_new_sampler_is_a_function_a_field_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def top_a(logits: Tensor, factor: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        return logits.masked_fill(probs < factor * probs.amax(-1, keepdim=True) ** 2, -torch.inf)

    monkeypatch.setattr(pipeline, "ORDER", (*ORDER, Step(top_a, ("top_a",), pipeline._columns)))
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(2, 1)
    probs = distribution(logits, [WithTopA.from_request({"top_a": 0.5}), WithTopA()], [[0]] * 2, [[]] * 2)
    assert probs[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0]) and probs[1].tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_every_parameter_is_read_by_one_step_or_by_the_engine() -> None:
    engine = {"seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs"}
    engine |= {"skip_special_tokens", "include_stop_str_in_output"}
    read = [name for step in ORDER for name in step.fields]
    assert len(read) == len(set(read)) and not engine & set(read)
    assert engine | set(read) == {each.name for each in fields(SamplingParams)}


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_row_without_a_finite_logit_is_named(broken: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1] = broken
    with pytest.raises(ValueError, match=r"rows \[1\] have no finite logit to sample from: NaN from the model"):
        distribution(logits, [SamplingParams(), SamplingParams(temperature=0), SamplingParams()], [[0]] * 3, [[]] * 3)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(
        ValueError, match="2 rows of logits, but 2 params, 1 prompts and 2 outputs: one of each per row"
    ):
        distribution(torch.zeros(2, 5), [SamplingParams()] * 2, [[0]], [[], []])


@pytest.mark.parametrize(("name", "value"), [("logit_bias", {4: 1.0, 5: 1.0}), ("stop_token_ids", [4, 5])])
def test_tokens_beyond_the_vocabulary_are_named(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    with pytest.raises(UserError, match=f"{name} names token 5, but the model has tokens 0 to 4: remove it"):
        distribution(torch.zeros(1, 5), [params], [[0]], [[]])
