"""Samplers within the engine: one seed gives one text whoever the neighbours are, and texts end where they should."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.llm import LLM
from bitsmith.serve.request import loops
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

MakeLLM = Callable[..., LLM]
LETTERS = [ord(letter) - 33 for letter in "abcdefghijkl"]  # as the byte tokenizer numbers them

# Every sampler there is, a few to a request, as they would be used together.
MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02, "min_p": 0.01, "top_k": 60},
    {"mirostat_mode": 2, "mirostat_tau": 3.0},
    {"mirostat_mode": 1, "mirostat_tau": 4.0, "repetition_penalty": 1.2},
    {"dry_multiplier": 0.8, "dry_sequence_breakers": ["ab", "\n"], "allowed_token_ids": LETTERS},
    {"adaptive_target": 0.3, "min_p": 0.02},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty_range": 8, "repetition_decay": 4},
    {"dynatemp_min": 0.5, "dynatemp_max": 2.0, "smoothing_factor": 0.2, "smoothing_curve": 1.5, "skew": 0.3},
    {"nsigma": 1.5, "top_a": 0.1, "tfs": 0.95, "typical_p": 0.9, "eta_cutoff": 0.001, "epsilon_cutoff": 0.001},
    {"top_p": 0.8, "temperature_last": True, "sampler_priority": ["top_p", "min_p", "temperature"], "min_p": 0.05},
    {"no_repeat_ngram_size": 2, "bad_words": ["ab", "c"], "allowed_token_ids": LETTERS, "logit_bias": {66: 1.0}},
    {"banned_strings": ["a", "bc", "dE"], "allowed_token_ids": LETTERS},
    {"guidance_scale": 1.4, "negative_prompt": "not so", "top_k": 40},
    {"temperature": 0.0, "repetition_penalty": 1.3, "token_healing": True},
    {"min_tokens": 20, "stop": ["abc"], "top_k": 20},
)


def params(number: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"seed": number, "max_tokens": 24, "ignore_eos": True, **MIXES[number], **more})


def prompt(number: int) -> list[int]:
    return [(7 * number + 3 * at) % 250 for at in range(1 + number % 6)]


def test_one_seed_one_text_alone_in_seven_batches_and_after_a_preemption(make_llm: MakeLLM) -> None:
    roomy = make_llm(num_blocks=200, max_num_seqs=16, max_num_batched_tokens=64)
    everyone = list(range(len(MIXES)))
    alone = [roomy.generate([prompt(number)], params(number))[0].token_ids for number in everyone]
    # 7 batches: neighbours, their order and where a request stands among them all differ.
    batches = [everyone[shift:] + everyone[:shift] for shift in (0, 2, 5, 9)]
    batches += [everyone[::-1], everyone[::2] + everyone[1::2], [0, 0, *everyone[3:9], 1, 2, *everyone[9:]]]
    assert len(batches) == 7
    for batch in batches:
        outputs = roomy.generate([prompt(number) for number in batch], [params(number) for number in batch])
        for number, output in zip(batch, outputs, strict=True):
            assert output.token_ids == alone[number], f"request {number} {MIXES[number]} in {batch}"
    # A pool that runs dry, prompts in chunks, and requests that leave in between.
    small = make_llm(num_blocks=40, max_num_seqs=8, max_num_batched_tokens=9)
    outputs = small.generate([prompt(number) for number in everyone], [params(number) for number in everyone])
    assert small.engine.stats()["preemptions"] > 0
    assert [output.token_ids for output in outputs] == alone


@pytest.mark.parametrize("number", range(len(MIXES)))
def test_a_preemption_at_any_time_changes_nothing(make_llm: MakeLLM, number: int) -> None:
    engine = make_llm().engine
    found: list[list[int]] = []
    for every in (0, 3, 7):
        engine.add_request("x", prompt(number), params(number))
        ids: list[int] = []
        for step in itertools.count(1):
            if every and step % every == 0 and engine.scheduler.running:
                engine.scheduler._preempt(engine.scheduler.running.pop())
            ids += [token for _, chunk in engine.step() for token in chunk.token_ids]
            if not engine.has_work():
                break
        found.append(ids)
    assert len(found[0]) >= 3 and found == [found[0]] * 3


def test_a_request_whose_tokens_are_all_banned_ends_alone(make_llm: MakeLLM, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm()
    stuck = SamplingParams(allowed_token_ids=[5], banned_tokens=[5], temperature=0)
    first, bad, last = llm.generate([[1], [2], [3]], [params(0), stuck, params(1)])
    assert (bad.text, bad.token_ids, bad.finish_reason) == ("", [], "abort")
    assert "the request's parameters ban all tokens" in str(bad.stop_reason)
    assert "no token is left" in caplog.text and "llm-1" in caplog.text
    assert first.completion_tokens == last.completion_tokens == 24


def test_words_reach_the_samplers(make_llm: MakeLLM) -> None:
    llm = make_llm()
    options: dict[str, Any] = {"allowed_token_ids": LETTERS[:4], "max_tokens": 40, "seed": 1, "temperature": 6.0}
    (output,) = llm.generate("a", SamplingParams(bad_words=["ab", "c"], **options))
    assert "c" not in output.text and "ab" not in "a" + output.text and "b" in output.text
    (loose,) = llm.generate(
        "a", SamplingParams(dry_multiplier=5.0, dry_sequence_breakers=["a", "b", "c", "d"], **options)
    )
    (strict,) = llm.generate("a", SamplingParams(dry_multiplier=5.0, dry_sequence_breakers=["z"], **options))
    # Where every token breaks the sequence, DRY does nothing.
    assert loose.text == llm.generate("a", SamplingParams(**options))[0].text != strict.text


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(1, 4), st.integers(0, 4), st.integers(2, 4))
def test_loops_are_vllms(ids: list[int], least: int, more: int, count: int) -> None:
    detection = {"min_pattern_size": least, "max_pattern_size": least + more, "min_count": count}

    def copies(size: int) -> bool:
        tail = ids[len(ids) - size * count :]
        return size * count <= len(ids) and tail == tail[:size] * count

    want = any(copies(size) for size in range(least, least + more + 1))
    assert loops([9, *ids], 1, detection) == want
    assert not loops(ids, 0, None)


def test_a_loop_ends_with_its_own_reason(make_llm: MakeLLM) -> None:
    llm = make_llm("start abcabcabcabcabc end")
    detection = {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3}
    asked = SamplingParams(temperature=0, max_tokens=40, repetition_detection=detection)
    (output,) = llm.generate("p", asked)
    assert (output.text, output.finish_reason) == ("start abcabcabc", "repetition")
    assert output.stop_reason == "repetition_detected"
    assert llm.engine.stats()["finished"]["repetition"] == 1
    # The prompt is no part of the loop.
    assert llm.generate("abcabc", asked)[0].text == "start abcabcabc"


@pytest.fixture
def thinker(tiny_model: Callable[..., Any], bpe_tokenizer: Any) -> LLM:
    """A random model that loves to open a thought and never closes one by itself."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.add_tokens(["<think>", "</think>"])
    llm = LLM(tiny_model("Llama", vocab_size=len(tokenizer)), tokenizer, max_model_len=64, block_size=4, num_blocks=64)
    inner = llm.engine.runner.run
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def run(work: Sequence[Any]) -> torch.Tensor:
        logits = inner(work).clone()
        logits[:, begin], logits[:, end] = logits.amax(-1), -50.0
        return logits

    llm.engine.runner.run = run  # type: ignore[method-assign]
    return llm


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_within_its_budget(thinker: LLM, budget: int) -> None:
    begin, end = thinker.engine.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    asked = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, thinking_token_budget=budget)
    inside, after = thinker.generate([[5, begin], [5, 6]], asked)
    assert inside.token_ids[budget] == end and end not in inside.token_ids[:budget]
    opened = after.token_ids.index(begin)
    assert after.token_ids[opened + budget + 1] == end
    assert after == thinker.generate([[5, 6]], asked)[0]


def test_a_budget_needs_tags(make_llm: MakeLLM) -> None:
    with pytest.raises(UserError, match="thinking_token_budget: neither this model's vocabulary nor its chat template"):
        make_llm().generate("a", SamplingParams(thinking_token_budget=4))
