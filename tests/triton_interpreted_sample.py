"""The fused end of the samplers against the pipeline, token for token, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is. Sums of probabilities are taken in another order than torch's, so
the token at the edge of top_p may differ where they are within rounding of it. Where edges are what is tested, sums are
exact or stay away from top_p; with random logits a draw sees the difference as often as that token is drawn: one time
in a million.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bitsmith.kernels import sample as device
from bitsmith.kernels.lang import jit, tl
from bitsmith.samplers import draw, pipeline
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve import tail
from bitsmith.serve.scheduler import Seq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        found = real(*size, **options)
        return found.fill_(math.nan if found.dtype.is_floating_point else torch.iinfo(found.dtype).max)

    monkeypatch.setattr(torch, "empty", empty)


def seqs_of(params: Sequence[SamplingParams]) -> list[Seq]:
    """Requests with these parameters, 0 to 2 tokens into their output."""
    seqs = []
    for row, each in enumerate(params):
        seqs.append(Seq(str(row), [5, 2], each))
        seqs[-1].seed = 1000 + row
        seqs[-1].ids += [4] * (row % 3)
    return seqs


def by_pipeline(logits: Tensor, seqs: Sequence[Seq]) -> list[pipeline.Sampled]:
    columns = [s.params for s in seqs], [s.prompt for s in seqs], [s.output for s in seqs], [s.seed for s in seqs]
    return pipeline.sample(logits, *columns)


def check(logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    seqs = seqs_of(params)
    found = tail._fused(logits, seqs)
    wanted = [each.token_id for each in by_pipeline(logits, seqs)]
    wrong = [(row, params[row], *pair) for row, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1]
    assert not wrong, wrong
    return found


@jit
def exponential_kernel(key, token, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, device._exponential(tl.load(key + at), tl.load(token + at)))


def test_numbers_are_those_of_the_generator() -> None:
    """To an ulp of the logarithm, at the extremes too: the states whose hash has no bit set and all of them."""
    value = 2**64 - 1
    value ^= (value >> 31) ^ (value >> 62)
    for shift, multiplier in zip((27, 30), reversed(draw._MULTIPLIERS), strict=True):
        value = value * pow(multiplier, -1, 2**64) % 2**64
        value ^= (value >> shift) ^ (value >> 2 * shift)
    extremes = [draw._signed((v - draw._GAMMA) % 2**64) for v in (0, value)]
    key, token = torch.randint(-(2**63), 2**63 - 1, (4096,)), torch.randint(0, 2**18, (4096,), dtype=torch.int32)
    key[:2], token[:2] = torch.tensor(extremes), 0
    y = torch.empty(4096)
    exponential_kernel[(1,)](key, token, y, 4096)
    torch.testing.assert_close(y, draw.exponential(key, token.long()), rtol=3e-7, atol=0)
    assert y[:2].tolist() == pytest.approx([2.0**-54, 24 * math.log(2)], rel=1e-6, abs=0)


@pytest.mark.parametrize("count", [10, 60])
def test_logarithm_of_small_and_large_numbers(count: int) -> None:
    u = torch.cat([2.0 ** -torch.arange(1, count), 1 - 2.0 ** -torch.arange(1, 25), torch.rand(1000)])
    u = u[(u > 0) & (u < 1)].float()
    y = torch.empty(2048)

    @jit
    def kernel(u, y, N, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, device._log1p_of_minus(tl.load(u + at, mask=at < N, other=0.5)))

    kernel[(1,)](u, y, len(u), 2048)
    torch.testing.assert_close(y[: len(u)].double(), (-u.double()).log1p(), rtol=2e-7, atol=0)


def random_params(count: int, generator: torch.Generator) -> list[SamplingParams]:
    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    return [
        SamplingParams(
            temperature=one_of(0, 1e-5, 0.3, 1, 1, 2.5, 1000),
            min_p=one_of(0, 0, 1e-30, 0.05, 0.3, 1),
            top_k=one_of(0, 0, 1, 2, 5, 50, 10**6),
            top_p=one_of(1, 1, 0.9, 0.51, 0.9999, 0.03, 1e-300),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("vocabulary", "block"), [(2, 4096), (37, 16), (1001, 256), (5003, 2048)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_random_rows_and_parameters(vocabulary: int, block: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_BLOCK", block)
    params = random_params(16, torch.Generator().manual_seed(vocabulary))
    logits = torch.randn(len(params), vocabulary) * scale + torch.randn(len(params), 1) * 10
    check(logits, params)
    # Ties of almost everything, and tokens that cannot be drawn.
    ties = (logits / scale).round()
    ties[torch.rand(ties.shape) < 0.2] = -math.inf
    ties[:, 0] = 0
    check(ties, params)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.one_of(st.just(-math.inf), st.integers(-3, 3).map(float)), min_size=1, max_size=12),
    k=st.integers(0, 15),
    fraction=st.sampled_from([0.0, 1e-30, 0.3, 1.0]),
    # Sums of a few equal shares come near none of these.
    mass=st.sampled_from([1.0, 0.137, 0.5037, 0.9371, 0.99993, 1e-300]),
    hot=st.sampled_from([0.0, 1e-5, 0.5, 1.0, 1000.0]),
)
def test_ties_and_infinities(logits: list[float], k: int, fraction: float, mass: float, hot: float) -> None:
    if max(logits) == -math.inf:
        logits[0] = 0.0
    params = SamplingParams(temperature=hot, min_p=fraction, top_k=k, top_p=mass)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_BLOCK", 8)
        check(torch.tensor([logits]).repeat(4, 1), [params] * 4)


@pytest.mark.parametrize("mass", [1 / 64, 0.5, 63 / 64])
def test_equal_logits_are_cut_by_id(mass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 equal shares every sum is exact: so many tokens stay, those with the lowest ids."""
    monkeypatch.setattr(device, "_BLOCK", 16)
    logits = torch.tensor([0.0, -7.25, 1e30, 1e-30]).repeat(6)[:, None].repeat(1, 64)
    assert max(check(logits, [SamplingParams(top_p=mass)] * 24)) < mass * 64
    check(logits[:8], [SamplingParams(top_p=mass, top_k=9, min_p=1)] * 8)
    check(logits[:4], [SamplingParams()] * 4)


def test_top_k_and_min_p_keep_ties_by_value() -> None:
    def drawn(logits: list[float], **params: Any) -> set[int]:
        return set(check(torch.tensor([logits]).repeat(24, 1), [SamplingParams(**params)] * 24))

    logits = [1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 3.0]
    assert drawn(logits, top_k=2, temperature=9) == {1, 2, 4, 6}
    assert drawn(logits, min_p=math.exp(-1.001)) == {1, 2, 4, 6}
    # Both zeros are one value.
    assert drawn([-0.0, 0.0, -1.0, -0.0], top_k=1) == {0, 1, 3}
    assert drawn([-1.0, -0.0, 0.0], top_p=1e-300) == {1}
    # Tempering makes equal what was not.
    assert drawn([1e-45, 3e-45, 0.0], top_k=1, temperature=9) == {0, 1, 2}


def test_greedy_rows_get_the_first_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_BLOCK", 4)
    logits = torch.randn(5, 19)
    logits[:, [11, 7, 18]] = 9.0
    assert check(logits, [SamplingParams(temperature=0, top_k=3, top_p=0.1)] * 5) == [7] * 5


def test_one_token_and_no_rows() -> None:
    params = random_params(12, torch.Generator().manual_seed(3))
    assert check(torch.randn(12, 1), params) == [0] * 12
    none, ints = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert device.sample_tail(torch.zeros(0, 9), none, none, ints, none, none > 0, ints).shape == (0,)


def test_hopeless_tokens() -> None:
    """Nothing but the best is within reach: at a low temperature, and where all else is banned."""
    logits = torch.randn(6, 300) * 5
    check(logits, [SamplingParams(temperature=1e-3, top_k=20, top_p=0.999)] * 6)
    only = torch.full((2, 300), -math.inf)
    only[:, 123] = -50.0
    assert check(only, [SamplingParams(top_k=20), SamplingParams(top_p=0.5)]) == [123, 123]


def test_rows_at_a_stride() -> None:
    """A slice of padded logits, and columns that are no neighbours; what lies beyond is NaN."""
    wide = torch.full((6, 50), math.nan)
    wide[:, 3:40] = torch.randn(6, 37)
    params = random_params(6, torch.Generator().manual_seed(1))
    check(wide[:, 3:40], params)
    check(wide[::2, 3:40], params[:3])
    check(wide[:, 3:40].T.contiguous().T, params)


def test_a_large_vocabulary_of_odd_size() -> None:
    logits = torch.randn(4, 256_001) * 2
    params = [SamplingParams(top_k=50, top_p=0.9), SamplingParams(top_p=0.95, temperature=1.5), SamplingParams()]
    check(logits, [*params, SamplingParams(min_p=0.01)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_overflows_gets_its_best_token() -> None:
    """The pipeline refuses it; here nobody reads it back, and the others must go on."""
    logits = torch.tensor([[1e36, 3e36, 2e36], [0.0, 1.0, 2.0]])
    seqs = seqs_of([SamplingParams(temperature=1e-4, top_k=2, top_p=0.9), SamplingParams(top_k=1)])
    assert tail._fused(logits, seqs) == [1, 2]


def test_rows_are_divided_between_operator_and_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        SamplingParams(temperature=0.8, top_k=9, stop=["x"], stop_token_ids=[3], max_tokens=5, seed=4, ignore_eos=True),
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(min_tokens=3),
        SamplingParams(top_p=0.7, min_p=0.1),
        SamplingParams(logit_bias={3: 2.0}),
    ]
    logits, seqs, slow = torch.randn(7, 40), seqs_of(params), []

    def some(logits: Tensor, seqs: list[Seq]) -> list[pipeline.Sampled]:
        slow.append([seq.request_id for seq in seqs])
        return by_pipeline(logits, seqs)

    wanted = by_pipeline(logits, seqs)
    assert tail.sample(logits, seqs, some) == wanted and wanted[3].logprob is not None
    assert tail.sample(logits[::5], seqs[::5], some) == wanted[::5]
    assert tail.sample(logits[1:2], seqs[1:2], some) == wanted[1:2]
    assert slow == [["1", "3", "4", "6"], ["1"]]
    for forced, rows in (("cpu", 7), ("reference", 7), ("triton", 4)):
        monkeypatch.setenv("BITSMITH_KERNELS", forced)
        assert tail.sample(logits, seqs, some) == wanted and len(slow[-1]) == rows


def test_torch_accepts_the_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one = torch.ones(3)
    arguments = torch.randn(3, 9), one, one / 9, torch.tensor([0, 2, 5]), one / 2, one > 2, torch.arange(3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    done = torch.library.opcheck(device.sample_tail, arguments, test_utils=checks)
    assert set(done.values()) == {"SUCCESS"}
