"""The order of samplers, default and chosen; what a trace tells of them; exact frequencies of what is drawn."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers import draw, inputs
from bitsmith.samplers.names import KOBOLD_IDS, STEP_NAMES, STEPS
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import plan, sample
from bitsmith.samplers.trace import StepTrace

from .sampler_cases import Batch
from .sampler_reference import LAST, ORDER, Row, reference, softmax

LOGITS = torch.tensor([3.1, 2.9, 2.2, 1.9, 1.1, 0.8, 0.1, -0.4, -1.0, -1.7, -2.5, -3.0])
MIX: dict[str, Any] = {
    "temperature": 2.3,
    "top_k": 7,
    "top_p": 0.8,
    "min_p": 0.12,
    "typical_p": 0.75,
    "repetition_penalty": 1.6,
    "presence_penalty": 0.9,
    "tfs": 0.93,
    "smoothing_factor": 0.3,
}


def reordered(names: Sequence[str]) -> tuple[str, ...]:
    """ORDER with these samplers at each other's places, in this order."""
    order = list(ORDER)
    for place, name in zip(sorted(ORDER.index(name) for name in names), names, strict=True):
        order[place] = name
    return tuple(order)


def mix(order: Sequence[str] = (), **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ours and the reference's distribution of MIX."""
    params = SamplingParams(**{**MIX, **more})
    batch = Batch(LOGITS[None], [params], [[1, 2]], [[0, 5]])
    row = batch.row(0)
    wanted = reference(row, order)
    assert row.sure
    return batch.distribution()[0].numpy(), wanted


def test_the_default_order_is_the_documented_one() -> None:
    ours, wanted = mix()
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    backwards = reference(Batch(LOGITS[None], [SamplingParams(**MIX)], [[1, 2]], [[0, 5]]).row(0), ORDER[::-1])
    assert np.abs(backwards - wanted).max() > 0.01


ORDERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "our names": (["top_p", "temperature", "top_k"], ("top_p", "temperature", "top_k")),
    "a text, as llama.cpp takes it": (
        "top_k;typ_p;top_p;min_p;temp",
        ("top_k", "typical_p", "top_p", "min_p", "temperature"),
    ),
    "lines, as text-generation-webui": (
        "top_p\ntemperature\nquadratic_sampling",
        ("top_p", "temperature", "smoothing"),
    ),
    "aliases": (["TOP-K", "Typical", "dynatemp"], ("top_k", "typical_p", "temperature")),
    "Kobold's ids": (
        [6, 0, 1, 3, 4, 2, 5],
        (
            "repetition_penalty",
            "presence_frequency_penalty",
            "top_k",
            "top_a",
            "tfs",
            "typical_p",
            "top_p",
            "temperature",
        ),
    ),
    "penalties last": (
        ["min_p", "temperature", "penalties"],
        ("min_p", "temperature", "repetition_penalty", "presence_frequency_penalty"),
    ),
    "twice named": (["top_k", "temperature", "top_k"], ("top_k", "temperature")),
    "of Aphrodite": (["top_p_top_k", "temperature", "mirostat"], ("top_k", "top_p", "temperature")),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_chosen_order_is_followed(name: str) -> None:
    priority, names = ORDERS[name]
    ours, wanted = mix(reordered(names), sampler_priority=priority)
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    assert np.abs(wanted - mix()[1]).max() > 1e-3, "the order makes no difference here: the test proves nothing"


def test_temperature_last() -> None:
    ours, wanted = mix(LAST, temperature_last=True)
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    assert np.abs(wanted - mix()[1]).max() > 0.01
    last = [step.name for step in plan(SamplingParams(temperature=2, temperature_last=True, skew=1, xtc_probability=1))]
    assert last == ["xtc", "skew", "temperature"]


def test_orders_of_many_tokens_are_followed_too() -> None:
    """Penalties behind a cut need the whole vocabulary: the rows shrink later."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)) * 3
    priority = ("top_k", "temperature", "repetition_penalty", "min_p")
    params = SamplingParams(
        top_k=40, temperature=2, repetition_penalty=1.5, min_p=0.05, top_p=0.9, sampler_priority=priority
    )
    best = logits[0].topk(5).indices.tolist()
    batch = Batch(logits, [params], [best], [[]])
    row = batch.row(0)
    np.testing.assert_allclose(batch.distribution()[0].numpy(), reference(row, reordered(priority)), atol=1e-6)
    assert row.sure


def test_every_sampler_has_a_name_in_an_order() -> None:
    fixed = {"logit_bias", "allow", "ban", "mirostat", "adaptive_p"}
    assert set(STEPS) == set(ORDER) - fixed
    for names in STEP_NAMES.values():
        assert set([names] if isinstance(names, str) else names) <= set(STEPS)
    assert not set(STEP_NAMES) & set(STEPS) and set(KOBOLD_IDS) <= {*STEPS, *STEP_NAMES}


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        (["top_q"], "sampler_priority: unknown sampler 'top_q': did you mean top_"),
        (["zzzzz"], "sampler_priority: unknown sampler 'zzzzz': the samplers are no_repeat_ngram, repetition_penalty"),
        ([7], "sampler_priority: there is no sampler 7; Kobold's ids are 0 top_k, 1 top_a, 2 top_p"),
        ([True], "sampler_priority: unknown sampler True"),
        (5, "sampler_priority must be a list of sampler names or of Kobold's ids 0 to 6, not 5"),
    ],
)
def test_wrong_orders_are_explained(priority: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(sampler_priority=priority)
    assert str(error.value).startswith(message)


def traced(logits: torch.Tensor, **params: Any) -> tuple[StepTrace, ...]:
    (drawn,) = sample(logits[None], [SamplingParams(sampler_trace=True, **params)], [[0]], [[1]], [3])
    assert drawn
    return drawn.trace


def test_a_trace_tells_what_each_step_removed_and_moved() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    bias, cut = traced(logits, logit_bias={4: math.log(10)}, top_p=0.6)
    assert (bias.step, bias.removed, bias.removed_mass, bias.kept) == ("logit_bias", 0, 0.0, 5)
    assert bias.before == tuple((i, pytest.approx(p)) for i, p in enumerate((0.4, 0.3, 0.2, 0.06, 0.04)))
    # 0.04 became 0.4 of 1.36.
    after = {0: 0.4, 4: 0.4, 1: 0.3, 2: 0.2, 3: 0.06}
    assert dict(bias.after) == {token: pytest.approx(p / 1.36) for token, p in after.items()}
    assert dict(cut.before) == dict(bias.after) and (cut.step, cut.removed, cut.kept) == ("top_p", 2, 3)
    assert cut.removed_mass == pytest.approx(0.26 / 1.36)
    assert dict(cut.after) == {token: pytest.approx(after[token] / 1.1) for token in (0, 4, 1)}


def test_a_trace_follows_compacted_rows() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    first, second = traced(logits, top_k=30, min_p=0.5)
    ids = logits.topk(5).indices.tolist()
    assert [token for token, _ in second.before] == ids == [token for token, _ in second.after]
    assert (first.step, first.removed, first.kept) == ("min_p", 5000 - second.kept - second.removed, first.kept)
    assert second.kept == int((logits.topk(30).values >= logits.max() + math.log(0.5)).sum())


def test_rows_that_ask_for_no_trace_have_none_and_the_same_token() -> None:
    logits = torch.randn(3, 50)
    asked = [SamplingParams(top_k=3, sampler_trace=flag) for flag in (True, False, True)]
    drawn = sample(logits, asked, [[0]] * 3, [[]] * 3, [1, 2, 3])
    silent = sample(logits, [SamplingParams(top_k=3)] * 3, [[0]] * 3, [[]] * 3, [1, 2, 3])
    assert [len(each.trace) for each in drawn if each] == [1, 0, 1]
    assert [each.token_id for each in drawn if each] == [each.token_id for each in silent if each]
    assert traced(logits[0], temperature=0, top_k=3, repetition_penalty=2.0)[0].step == "repetition_penalty"


MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6, "top_k": 6},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logit_bias": {2: 1.0}},
    {"typical_p": 0.8, "dynatemp_min": 0.5, "dynatemp_max": 1.5},
    {"xtc_probability": 1.0, "xtc_threshold": 0.15, "temperature": 1.2},
    {"skew": 0.6, "top_k": 9},
    {"smoothing_factor": 0.3, "nsigma": 1.5},
    {"adaptive_target": 0.2, "epsilon_cutoff": 0.01},
    {"mirostat_mode": 2, "mirostat_tau": 1.4, "frequency_penalty": 0.6},
)
DRAWS = 200_000


@pytest.fixture(scope="module", params=["requests", "positions"])
def key(request: pytest.FixtureRequest) -> torch.Tensor:
    """Of as many requests, or of the positions of one."""
    many, one = range(DRAWS), [5] * DRAWS
    return draw.keys(*((many, one) if request.param == "requests" else (one, many)), torch.device("cpu"))


@pytest.mark.parametrize("number", range(len(MIXES)))
def test_frequencies_are_those_of_the_exact_distribution(key: torch.Tensor, number: int) -> None:
    """Chi-square of 200 000 draws from our distribution against the reference's."""
    batch = Batch(LOGITS[None], [SamplingParams(**MIXES[number])], [[0, 4]], [[1, 1]], eos=())
    wanted = reference(batch.row(0))
    assert number == 0 or np.abs(wanted - softmax(LOGITS.double().numpy())).max() > 0.01
    drawn = draw.draw(batch.distribution().expand(DRAWS, -1), key + number)
    counts = np.bincount(drawn.numpy(), minlength=len(wanted))
    live = wanted > 0
    assert not counts[~live].any()
    chi_square = float(((counts - wanted * DRAWS)[live] ** 2 / (wanted * DRAWS)[live]).sum())
    freedom = int(live.sum()) - 1
    # Five standard deviations.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (counts, wanted * DRAWS)


def test_the_reference_counts_a_row_unsure_at_a_limit() -> None:
    """Or comparisons would depend on rounding: p of 0.5 against a limit of 0.5."""
    row = Row(np.log([0.5, 0.3, 0.2]), SamplingParams(epsilon_cutoff=0.3))
    reference(row)
    assert not row.sure


def test_the_documented_order_is_the_true_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] == [step.name for step in inputs.ORDER]
    for row, step in zip(rows, inputs.ORDER, strict=True):
        assert set(re.findall(r"`(\w+)`", row[1])) == {*step.fields, *step.uses}, step.name
