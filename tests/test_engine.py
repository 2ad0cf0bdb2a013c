"""What becomes of a sampled token: text, stops, limits, logprobs, aborts; through Engine, LLM and AsyncEngine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.engine import context_length
from bitsmith.serve.llm import LLM
from bitsmith.serve.outputs import Output, StreamChunk
from bitsmith.serve.pool import free_memory, pool_blocks

EOS = 256

MakeLLM = Callable[..., LLM]


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **options})


def said(llm: LLM, **options: Any) -> Output:
    (output,) = llm.generate("prompt", greedy(**options))
    return output


def test_text_ends_with_eos(make_llm: MakeLLM) -> None:
    output = said(make_llm("naïve €5 😀!"))
    assert output.text == "naïve €5 😀!"
    assert output.token_ids[-1] == EOS and output.finish_reason == "stop" and output.stop_reason is None
    assert output.prompt_tokens == 6
    assert output.completion_tokens == len(output.token_ids) == len("naïve €5 😀!".encode()) + 1
    assert output.logprobs is None


def test_every_chunk_holds_whole_characters(make_llm: MakeLLM, byte_tokenizer: Any) -> None:
    engine = make_llm("a€b").engine
    engine.add_request("x", byte_tokenizer.encode("é"), greedy())
    chunks = [chunk for _ in range(6) for _, chunk in engine.step()]
    assert [chunk.text_delta for chunk in chunks] == ["a", "", "", "€", "b", ""]
    assert [chunk.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["stop"]


def test_max_tokens_flushes_half_a_character(make_llm: MakeLLM) -> None:
    output = said(make_llm("a€b"), max_tokens=3)
    assert (output.text, output.finish_reason, output.completion_tokens) == ("a\ufffd", "length", 3)


def test_stop_strings_cross_tokens_and_are_cut(make_llm: MakeLLM) -> None:
    llm = make_llm("one STOPPED STOP two")
    output = said(llm, stop=["STOP t", "never"])
    assert output.text == "one STOPPED " and output.stop_reason == "STOP t" and output.finish_reason == "stop"
    assert bytes(output.token_ids) != b"" and output.completion_tokens == len("one STOPPED STOP t")
    assert said(llm, stop="STOP", include_stop_str_in_output=True).text == "one STOP"
    assert said(llm, stop="€").text == "one STOPPED STOP two"


def test_nothing_of_a_possible_stop_string_is_streamed_early(make_llm: MakeLLM) -> None:
    engine = make_llm("ab<|end").engine
    engine.add_request("x", [1], greedy(stop="<|end|>"))
    deltas = []
    while engine.has_work():
        deltas += [chunk.text_delta for _, chunk in engine.step()]
    assert deltas == ["a", "b", "", "", "", "", "", "<|end"]


def test_stop_tokens_and_eos_can_be_chosen(make_llm: MakeLLM, byte_tokenizer: Any) -> None:
    llm = make_llm("abc")
    (b,) = byte_tokenizer.encode("b")
    output = said(llm, stop_token_ids=[b])
    assert (output.text, output.stop_reason, output.finish_reason) == ("a", b, "stop")
    output = said(llm, ignore_eos=True, max_tokens=6)
    assert (output.text, output.token_ids[-3:], output.finish_reason) == ("abc", [EOS] * 3, "length")
    assert said(llm, ignore_eos=True, max_tokens=5, skip_special_tokens=False).text == "abc<eos><eos>"
    # The scripted logits say eos at the fourth token; until min_tokens it is banned.
    assert said(llm, min_tokens=6).completion_tokens == 7


def test_the_context_ends_a_completion(make_llm: MakeLLM) -> None:
    output = said(make_llm("x" * 80), max_tokens=None)
    assert output.finish_reason == "length" and output.prompt_tokens + output.completion_tokens == 64


def test_logprobs_are_those_of_the_model(make_llm: MakeLLM, tiny_model: Callable[..., Any]) -> None:
    llm = make_llm()
    prompt = [5, 9, 77]
    (output,) = llm.generate([prompt], greedy(logprobs=3, max_tokens=4, ignore_eos=True))
    assert output.logprobs is not None and len(output.logprobs) == 4
    logits = tiny_model("Llama")(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    want = logits.detach().log_softmax(-1)
    for row, entry in enumerate(output.logprobs):
        best, ids = want[row].topk(3)
        assert entry.token_id == output.token_ids[row] == ids[0]
        assert entry.logprob == pytest.approx(float(best[0]), abs=1e-4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.tolist(), abs=1e-4)


def test_one_batch_of_different_parameters(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompts = ["one", [7, 8, 9], "three is longer than the others"]
    params = [greedy(max_tokens=5), SamplingParams(seed=3, max_tokens=9), greedy(max_tokens=7)]
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone
    assert [output.completion_tokens for output in together] == [5, 9, 7]


def test_a_single_string_and_default_parameters(make_llm: MakeLLM) -> None:
    assert [output.completion_tokens for output in make_llm("x" * 50).generate("a single string")] == [16]


def test_generate_refuses_bad_requests_before_running(make_llm: MakeLLM) -> None:
    llm = make_llm()
    cases: list[tuple[Any, Any, str]] = [
        ([[1] * 64], None, r"the prompt has 64 tokens and the context holds 64.*shorten the prompt.*max-model-len"),
        ([[]], None, "the prompt is empty"),
        (["ok", [3, 999]], None, r"prompt token 1 is 999, outside the model's vocabulary of 257 \(0 to 256\)"),
        ([1, 2], None, "prompt 0 is int '1': give a string or a list of ints"),
        (["a", "b"], [greedy()], "2 prompts and 1 SamplingParams: give one for all, or one each"),
        (["a"], greedy(logit_bias={300: 1.0}), "logit_bias names token 300"),
    ]
    for prompts, params, message in cases:
        with pytest.raises(UserError, match=message):
            llm.generate(prompts, params)
    assert not llm.engine.has_work()


def test_llm_refuses_unknown_options(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"LLM has no option max_len, seed; it accepts device, dtype, int8_copy, kv_cache_dtype, max"
    ):
        LLM(tiny_model("Llama"), byte_tokenizer, max_len=3, seed=1)
    with pytest.raises(UserError, match="a built model needs its tokenizer"):
        LLM(tiny_model("Llama"))
    with pytest.raises(UserError, match="device, dtype and int8_copy are for checkpoints"):
        LLM(tiny_model("Llama"), byte_tokenizer, dtype="float32")
    with pytest.raises(UserError, match="kv_cache_dtype 'fp3' is unknown"):
        LLM(tiny_model("Llama"), byte_tokenizer, kv_cache_dtype="fp3")


def test_an_interrupted_generate_leaves_nothing_behind(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm("abc")
    monkeypatch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"])
    assert not llm.engine.has_work() and llm.engine.blocks.num_free == 64


def test_abort_frees_blocks_at_once(make_llm: MakeLLM) -> None:
    engine = make_llm("x" * 50).engine
    for name in ("a", "b"):
        engine.add_request(name, [1] * 10, greedy(stop="xxy"))
    engine.step()
    engine.step()
    assert engine.blocks.num_free == 64 - 6
    chunk = engine.abort("a")
    # Held back as the possible beginning of the stop string, and no longer.
    assert chunk == StreamChunk("xx", (), None, "abort", 10, 2)
    assert engine.blocks.num_free == 64 - 3
    assert engine.abort("a") is None and engine.abort("never") is None
    assert {name for name, _ in engine.step()} == {"b"}
    assert engine.stats()["finished"] == {"stop": 0, "length": 0, "repetition": 0, "abort": 1}


def test_the_context_is_lowered_to_the_models(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    assert context_length(4096, 256) == 256
    assert context_length(100, 256) == 100 and context_length(100, None) == 100
    assert LLM(tiny_model("Llama"), byte_tokenizer, num_blocks=4).engine.max_model_len == 256


def test_pool_size() -> None:
    assert pool_blocks(wanted=100, block_bytes=10, memory=5000, block_size=16, max_model_len=64) == 100
    assert pool_blocks(wanted=100, block_bytes=10, memory=59, block_size=16, max_model_len=64) == 5
    message = (
        r"room for 48 tokens \(1 MiB at 16384 bytes per token\), less than max_model_len 64; lower it, raise gpu_mem"
    )
    with pytest.raises(UserError, match=message):
        pool_blocks(wanted=100, block_bytes=1 << 18, memory=(1 << 20) - 1, block_size=16, max_model_len=64)
    with pytest.raises(UserError, match="room for 0 tokens"):
        pool_blocks(wanted=100, block_bytes=10, memory=-5, block_size=16, max_model_len=64)
    half, whole = (free_memory(torch.device("cpu"), fraction) for fraction in (0.5, 1.0))
    assert 0 < half < whole


def test_blocks_come_from_memory_by_default(make_llm: MakeLLM) -> None:
    engine = make_llm(num_blocks=None).engine
    assert engine.blocks.num_blocks == 8 * 64 // 4


def test_stats_count(make_llm: MakeLLM) -> None:
    llm = make_llm("abc")
    llm.generate(["12", "345"], greedy())
    said(llm, max_tokens=2)
    stats = llm.engine.stats()
    assert (stats["prompt_tokens"], stats["generation_tokens"]) == (2 + 3 + 6, 4 + 4 + 2)
    assert stats["finished"] == {"stop": 2, "length": 1, "repetition": 0, "abort": 0}
    assert (stats["running"], stats["waiting"], stats["kv_usage"], stats["blocks_free"]) == (0, 0, 0.0, 64)
    for name, count in (("time_to_first_token_seconds", 3), ("inter_token_seconds", 7)):
        histogram = stats[name]
        counts = [number for _, number in histogram["buckets"]]
        assert histogram["count"] == count and histogram["sum"] > 0
        assert counts == sorted(counts) and counts[-1] <= count


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_without_numbers_end_their_request_alone(make_llm: MakeLLM, broken: float) -> None:
    llm = make_llm("abc")
    run = llm.engine.runner.run

    def spoil(work: Any) -> torch.Tensor:
        logits = run(work)
        logits[[row for row, (seq, _) in enumerate(work) if seq.request_id == "llm-1" and seq.num_output == 2]] = broken
        return logits

    llm.engine.runner.run = spoil
    first, bad, last = llm.generate(["1", "2", "3"], greedy())
    assert (first.text, last.text) == ("abc", "abc") and first.finish_reason == last.finish_reason == "stop"
    assert (bad.text, bad.finish_reason) == ("ab", "abort")
    assert llm.engine.blocks.num_free == 64


def test_a_checkpoint_continues_as_its_authors_found(shared: Callable[[str], Path]) -> None:
    path = shared("models/stories260k")
    golden = json.loads((path / "golden.json").read_text())
    llm = LLM(path, device="cpu", num_blocks=40)
    assert llm.engine.max_model_len == 512
    (output,) = llm.generate([golden["prompt"]], greedy(max_tokens=60))
    assert output.token_ids == golden["greedy_ids"][output.prompt_tokens :][:60]
