"""Who may take the fused end of the samplers; that it draws the pipeline's tokens is shown by triton_interpreted_sample.py."""

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels.lang import INSTALL, interpreted
from bitsmith.kernels.sample import runs_on, sample_tail
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import ORDER, Sampled, sample
from bitsmith.serve import tail
from bitsmith.serve.scheduler import Seq
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def test_the_operator_applies_the_steps_in_the_pipelines_order() -> None:
    assert [name for step in ORDER for name in step.fields if name in tail.TAIL] == list(tail.TAIL)


def test_every_field_is_the_operators_the_engines_or_keeps_a_row_out() -> None:
    names = {each.name for each in fields(SamplingParams)}
    assert {*tail.TAIL, *tail._ENGINE} <= names
    read = {name for step in ORDER for name in step.fields} - {*tail.TAIL}
    assert read | {"logprobs"} <= {*tail._OTHERS}


@pytest.mark.parametrize("forced", ["", "cpu", "reference"])
def test_a_cpu_takes_the_pipeline(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", forced)
    assert not interpreted() and not runs_on(torch.device("cpu"))
    seqs, seen = [Seq("a", [1], SamplingParams()), Seq("b", [1], SamplingParams(temperature=0))], []

    def pipeline(logits: Tensor, seqs: list[Seq]) -> list[Sampled]:
        seen.append(seqs)
        return [Sampled(3, None, ())] * len(seqs)

    assert [each.token_id for each in tail.sample(torch.zeros(2, 9), seqs, pipeline)] == [3, 3]
    assert seen == [seqs]


def arguments(rows: int, device: Any = None) -> list[Tensor]:
    one = torch.ones(rows, device=device)
    return [one, one / 9, one.long(), one / 2, one > 2, one.long()]


def test_a_cpu_is_told_where_to_go() -> None:
    words = "not on cpu: use samplers.pipeline.sample there" if find_spec("triton") else INSTALL.partition(":")[0]
    with pytest.raises(UserError, match=words):
        sample_tail(torch.zeros(2, 5), *arguments(2))


def test_the_fake_has_the_shape_and_dtype_of_results() -> None:
    with FakeTensorMode():
        tokens = sample_tail(torch.empty(3, 50), *arguments(3))
    assert (tokens.shape, tokens.dtype) == ((3,), torch.int64)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a CUDA device and triton"
)
@pytest.mark.parametrize("vocabulary", [1, 37, 32000, 151936, 256001])
def test_on_a_device(vocabulary: int) -> None:
    params = [
        SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=len(str(top_p)))
        for temperature in (0, 0.7, 1.0, 1.5)
        for min_p in (0, 0.05)
        for top_k in (0, 1, 40)
        for top_p in (1, 0.9, 1e-300)
    ]
    seqs = [Seq(str(row), [1] * (1 + row), each) for row, each in enumerate(params)]
    logits = torch.randn(len(seqs), vocabulary, device="cuda") * 3
    logits[::2] = logits[::2].round()
    wanted = sample(logits, params, [s.prompt for s in seqs], [s.output for s in seqs], [s.seed for s in seqs])
    assert tail._fused(logits, seqs) == [each.token_id for each in wanted]
