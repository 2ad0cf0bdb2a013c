"""Functions recorded and repeated: the same numbers as running them, for other contents; what cannot be is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsmith.kernels import fused, native_layer
from bitsmith.kernels.recording import Recording, Unrecordable, record
from bitsmith.serve import recorded
from bitsmith.serve.engine import Engine, EngineConfig
from torch import Tensor

from .test_paged import greedy, poison, prompts, staggered

SMALL = EngineConfig(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=100)
WITHOUT_PYTHON = [
    lambda x: x.view(2, 8).t().contiguous() @ x.view(2, 8),
    lambda x: x.split(4)[1].add_(1).cumsum(0),
    lambda x: torch.cat([x[3:], x.new_zeros(2), x.topk(3).values]),
    lambda x: x.clone().index_copy_(0, torch.tensor([5, 1]), x[:2] * 2),
    lambda x: x[x.argsort()].to(torch.bfloat16).float(),
    lambda x: torch.empty(4).copy_(x[:4]).exp_(),
    lambda x: x.bfloat16() + x.bfloat16().flip(0) + 1.5,
    lambda x: torch.add(x.bfloat16(), x.bfloat16().exp(), alpha=2),
    lambda x: x.bfloat16().view(4, 4) + x.bfloat16().view(4, 4).t(),
    lambda x: x.bfloat16().view(4, 4) + x.bfloat16()[:4],
]
WITH_PYTHON = [
    lambda x: x * x.sum().item(),
    lambda x: x[: x.argmax().tolist()],
    lambda x: x + 1 if x[0] > 0 else x,
    lambda x: x[: int(x[0].abs())],
    lambda x: torch.from_numpy(x.numpy() + 1),
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x + torch.rand(16),
    lambda x: x * float(x[0]),
    lambda x: x.repeat_interleave((x > 0).long()),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("function", WITHOUT_PYTHON)
def test_repeats_with_new_contents(function: Callable[[Tensor], Tensor]) -> None:
    own = torch.randn(16)
    first = own.clone()
    recording = record(lambda: function(own))
    assert torch.equal(recording.output, function(first))
    for _ in range(3):
        x = torch.randn(16)
        own.copy_(x)
        recording.output.fill_(torch.nan)
        assert torch.equal(recording(), function(x))


def test_results_are_written_where_they_lie() -> None:
    x = torch.randn(16)
    recording = record(lambda: torch.cat([x * 2, x.cos()]).to(torch.bfloat16).topk(4).values)
    names = [str(getattr(call, "func", call)) for call in recording.calls]
    assert [n.startswith("aten.") and n.endswith("out") for n in names] == [True, True, True, False, False]
    assert "copy_" in names[3] and "_again" in names[4]


@pytest.mark.skipif(not native_layer._library(), reason="the sum is the native library's")
def test_a_residual_is_added_by_the_library() -> None:
    a, b = torch.randn(2, 3, 70_001).bfloat16()
    recording = record(lambda: a + b)
    assert [call.func.__name__ for call in recording.calls] == ["bitsmith_add"]
    a.copy_(torch.randn(3, 70_001))
    assert torch.equal(recording(), a + b)


@pytest.mark.skipif(not native_layer._library(), reason="the copy is the native library's")
def test_rows_go_to_their_slots() -> None:
    part, x = torch.zeros(9, 2, 5, dtype=torch.int8), torch.randint(-128, 127, (3, 4, 5), dtype=torch.int8)[:, 1:3]
    slots = torch.tensor([7, 0, 3])
    assert native_layer.scatters(part, x, slots) and not native_layer.scatters(part, x.half(), slots)
    recording = record(lambda: (native_layer.scatter(part, x, slots), part)[1])
    slots.copy_(torch.tensor([8, 7, 1]))
    part.zero_()
    recording()
    assert torch.equal(part, torch.zeros_like(part).index_copy_(0, slots, x))


@pytest.mark.parametrize("function", WITH_PYTHON)
def test_refuses_what_depends_on_contents(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Unrecordable):
        record(lambda: function(torch.arange(16.0)))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="its tensors are oneDNN's")
def test_refuses_tensors_without_a_storage() -> None:
    with pytest.raises(Unrecordable, match="oneDNN"):
        record(lambda: torch.ones(2, 3).to_mkldnn().to_dense())


def build(tiny_model: Callable[..., Any], name: str) -> Any:
    return tiny_model(name).to(torch.bfloat16)


@pytest.mark.skipif(not native_layer._library(), reason="decode steps need the native library's attention")
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma2", "Phi3", "GptOss"])
def test_served_tokens_are_those_of_eager_steps(
    name: str, tiny_model: Callable[..., Any], byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated: list[Tensor] = []
    monkeypatch.setattr(Recording, "__call__", counted(Recording.__call__, repeated))
    outputs: list[list[list[int]]] = []
    logits: list[list[Tensor]] = []
    for eager in (False, True):
        engine = Engine(build(tiny_model, name), byte_tokenizer, replace(SMALL, enforce_eager=eager))
        poison(engine)
        seen: list[Tensor] = []
        engine.runner.forward = counted(engine.runner.forward, seen)  # type: ignore[method-assign]
        outputs.append(staggered(engine, prompts()))
        logits.append(seen)
    assert outputs[0] == outputs[1]
    assert all(map(torch.equal, *logits)) and len(logits[0]) == len(logits[1])
    assert len(repeated) > 5


def counted(function: Any, seen: list[Any]) -> Any:
    """`function`, its results also put into `seen`."""

    def call(*args: Any) -> Any:
        result = function(*args)
        seen.append(result.clone())
        return result

    return call


@pytest.mark.skipif(not native_layer._library(), reason="decode steps need the native library's attention")
def test_recordings_that_were_not_used_for_longest_go(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_KEPT", 5)
    engine = Engine(build(tiny_model, "Llama"), byte_tokenizer, SMALL)
    found = engine.runner._recorded
    assert found is not None
    kept = []
    for count in (1, 2, 3, 2, 4):
        for name in range(count):
            engine.add_request(str(name), [5, 6], greedy(3))
        while engine.has_work():
            engine.step()
        kept.append([rows for rows, _ in found._found])
    assert kept == [[1], [1, 2], [2, 3], [3, 2], [4]]


def test_float32_models_run_as_before(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    """Their attention gathers in Python."""
    engine = Engine(tiny_model("Llama"), byte_tokenizer, SMALL)
    engine.add_request("a", [5, 6], greedy(3))
    while engine.has_work():
        engine.step()
    assert engine.runner._recorded is not None and not engine.runner._recorded._possible


@pytest.mark.skipif(not native_layer._library(), reason="the calls are the native library's")
def test_calls_of_the_library_in_a_row_become_one() -> None:
    """Integers, addresses, a float32 and a structure's address all arrive, and what is not the library's stays between."""
    q, k, v = torch.randn(3, 2, 4, 32).bfloat16()
    weight, gate = torch.randn(32).bfloat16(), torch.randn(8, 32).bfloat16()
    table, lengths = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)

    def step() -> Tensor:
        rows = fused.rms_norm(q, weight, 1e-3, "llama")
        seen = native_layer.attend(rows, [k], [v], table, lengths, 2, 0.3, None, 7.5, None)
        a = fused.gated(seen.view(8, 32), gate, "silu")
        return fused.gated(a.exp(), gate, "gelu_tanh") + gate

    recording = record(step)
    assert [len(getattr(call, "calls", ())) for call in recording.calls] == [3, 0, 2]
    for t in (q, k, v, weight, gate):
        t.copy_(torch.randn(t.shape))
    recording.output.fill_(torch.nan)
    assert torch.equal(recording(), step())


@pytest.mark.skipif(not native_layer._library(), reason="the copy is the native library's")
@pytest.mark.parametrize(
    "take",
    [
        lambda x, rows: x.index_select(0, rows),
        lambda x, rows: x[None][:, rows][0],
        lambda x, rows: torch.nn.functional.embedding(rows[None], x.flatten(1))[0].unflatten(1, x.shape[1:]),
    ],
)
def test_rows_are_taken_by_the_library(take: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Numbers from the end count as torch counts them; a row that is not there is NaN and nobody else's memory."""
    x, rows = torch.randn(6, 3, 5)[1:5], torch.tensor([3, 0, 2])
    recording = record(lambda: take(x, rows))
    assert [call.func.__name__ for call in recording.calls] == ["bitsmith_gather"]
    x.copy_(torch.randn(4, 3, 5))
    rows.copy_(torch.tensor([1, 1, 3]))
    assert torch.equal(recording(), x[[1, 1, 3]])
    rows.copy_(torch.tensor([-1, 4, -5]))
    assert torch.equal(recording()[0], x[3]) and recording()[1:].isnan().all()
