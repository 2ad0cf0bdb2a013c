"""Banned strings: the output goes back to where one begins, and nothing of it was ever shown.

The byte tokenizer makes every character a token, so an output that avoids a character by going back must be the one
that was forbidden its token from the start.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve import engine as engine_module
from bitsmith.serve.llm import LLM
from bitsmith.serve.outputs import Output, StreamChunk
from bitsmith.serve.runner import Work

EOS = 256
MakeLLM = Callable[..., LLM]


@pytest.fixture
def speaker(make_llm: MakeLLM, byte_tokenizer: Any) -> MakeLLM:
    """`speaker(a, b, ...)` is an LLM that says the first of these texts its output still allows, then eos."""

    def make(*texts: str, **options: Any) -> LLM:
        llm = make_llm(**options)
        scripts = [[*byte_tokenizer.encode(text), EOS] for text in texts]

        def run(work: Sequence[Work]) -> torch.Tensor:
            logits = torch.zeros(len(work), 257)
            for row, (seq, _) in enumerate(work):
                said = seq.output
                for rank, script in reversed(list(enumerate(scripts))):
                    if script[: len(said)] == said and len(script) > len(said):
                        logits[row, script[len(said)]] = 20.0 - rank
            return logits

        llm.engine.runner.run = run  # type: ignore[method-assign]
        return llm

    return make


def greedy(*banned: str, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "banned_strings": banned, **options})


def chunks(llm: LLM, params: SamplingParams) -> list[StreamChunk]:
    llm.engine.add_request("x", [1, 2, 3], params)
    found = []
    while llm.engine.has_work():
        found += [chunk for _, chunk in llm.engine.step()]
        llm.engine.scheduler.check_integrity()
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
    return found


def test_another_way_is_taken_where_the_string_begins(speaker: MakeLLM, byte_tokenizer: Any) -> None:
    llm = speaker("a Tapestry of", "a mix of", "quite another")
    (output,) = llm.generate("prompt", greedy("TAPESTRY", logprobs=1))
    assert output.text == "a mix of" and output.finish_reason == "stop" and output.stop_reason is None
    assert output.token_ids == [*byte_tokenizer.encode("a mix of"), EOS]
    assert output.completion_tokens == len(output.token_ids) == len(output.logprobs or ())
    assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids
    # Kept tokens count, those taken back do not.
    assert llm.engine.stats()["generation_tokens"] == output.completion_tokens
    assert llm.engine.stats()["time_to_first_token_seconds"]["count"] == 1
    (output,) = llm.generate("prompt", greedy("tapestry", "a "))
    assert output.text == "quite another"


def test_a_ban_lasts_as_long_as_the_text_before_it(speaker: MakeLLM) -> None:
    # After "xb" the "c" is banned; that says nothing of the "c" after "yb".
    llm = speaker("xbcq", "xbd", "ybck")
    (output,) = llm.generate("p", greedy("cq", "xbd"))
    assert output.text == "ybck"


def test_text_waits_until_it_is_certain(speaker: MakeLLM) -> None:
    found = chunks(speaker("xabcy abd", "xabcy z"), greedy("abd"))
    said = [(chunk.text_delta, len(chunk.token_ids)) for chunk in found]
    assert said == [("x", 1), ("abc", 3), ("y", 1), (" ", 1), ("z", 1), ("", 1)]
    assert [chunk.completion_tokens for chunk in found] == [1, 4, 5, 6, 7, 8]


def test_ends_hand_out_what_was_held(speaker: MakeLLM) -> None:
    llm = speaker("say tape")
    (output,) = llm.generate("p", greedy("tapestry"))
    assert (output.text, output.finish_reason, output.completion_tokens) == ("say tape", "stop", 9)
    (output,) = llm.generate("p", greedy("tapestry", max_tokens=6))
    assert (output.text, output.finish_reason, output.completion_tokens) == ("say ta", "length", 6)
    # The string is complete with the last token allowed: it still has to go.
    (output,) = llm.generate("p", greedy("ta", max_tokens=6))
    assert output.text.startswith("say ") and "ta" not in output.text and output.finish_reason == "length"
    assert output.completion_tokens == 6
    llm.engine.add_request("x", [1], greedy("tapestry"))
    for _ in range(6):
        llm.engine.step()
    last = llm.engine.abort("x")
    assert last is not None and (last.text_delta, len(last.token_ids), last.completion_tokens) == ("ta", 2, 6)


def test_stop_strings_beside_banned_ones(speaker: MakeLLM) -> None:
    llm = speaker("one two three", "one 2")
    # The stop string completes within text that may still become a banned one.
    (output,) = llm.generate("p", greedy("two three", stop="two"))
    assert (output.text, output.finish_reason, output.stop_reason) == ("one ", "stop", "two")
    # What the stop string cuts off is not shown, so it need not be taken back.
    (output,) = llm.generate("p", greedy("wo", stop="two"))
    assert (output.text, output.stop_reason) == ("one ", "two")
    (output,) = llm.generate("p", greedy("wo", stop="two", include_stop_str_in_output=True))
    assert output.stop_reason != "two" and "wo" not in output.text
    # The stop matcher goes back too: "two" it held is forgotten.
    (output,) = llm.generate("p", greedy("two", stop="twox"))
    assert output.text.startswith("one 2")


def test_bytes_of_one_character_go_together(speaker: MakeLLM, byte_tokenizer: Any) -> None:
    llm = speaker("caf\xe9", "cafe")
    (output,) = llm.generate("p", greedy("\xc9"))
    assert output.text == "cafe"
    assert output.token_ids == [*byte_tokenizer.encode("cafe"), EOS]


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.3, "dry_multiplier": 0.8}])
def test_going_back_equals_never_having_the_token(make_llm: MakeLLM, extra: dict[str, Any]) -> None:
    letters = [chr(code) for code in range(0x61, 0x6F)]
    options = {"seed": 5, "max_tokens": 40, "ignore_eos": True, "temperature": 1.5, "logprobs": 2, **extra}
    llm = make_llm()
    either = [byte for letter in letters for byte in llm.engine.tokenizer.encode(letter + letter.upper())]
    (want,) = llm.generate("prompt", SamplingParams(banned_tokens=either, **options))
    (got,) = llm.generate("prompt", SamplingParams(banned_strings=letters, **options))
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert got.completion_tokens == 40
    for one, other in zip(got.logprobs or (), want.logprobs or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    plain = llm.generate("prompt", SamplingParams(**options))[0]
    assert plain.token_ids != want.token_ids, "nothing was banned: the test shows nothing"


LETTERS = [ord(letter) - 33 for letter in "abcdefgh"]  # as the byte tokenizer numbers them


def pairs(output: Output) -> list[str]:
    """Two-character strings of a text."""
    return [output.text[at : at + 2] for at in range(4, 24, 3)]


def test_the_cache_after_going_back_is_that_of_the_text(make_llm: MakeLLM, tiny_model: Callable[..., Any]) -> None:
    options = {"seed": 3, "max_tokens": 40, "temperature": 0.7, "logprobs": 0, "allowed_token_ids": LETTERS}
    llm = make_llm()
    banned = pairs(llm.generate([[9, 8, 7]], SamplingParams(**options))[0])
    (output,) = llm.generate([[9, 8, 7]], SamplingParams(banned_strings=banned, **options))
    assert banned and not any(each in output.text for each in banned) and set(output.text) <= set("abcdefgh")
    with torch.no_grad():
        want = tiny_model("Llama")(torch.tensor([[9, 8, 7, *output.token_ids]])).logits[0, 2:-1].log_softmax(-1)
    for row, entry in enumerate(output.logprobs or ()):
        assert entry.logprob == pytest.approx(float(want[row, entry.token_id]), abs=1e-3)


def preference(said: str) -> str:
    """The letters a b c in an order that depends on all that was said."""
    return "".join(sorted("abc", key=lambda letter: random.Random(said + letter).random()))


def going_back(banned: Sequence[str], length: int) -> str:
    """The text of the rule itself: everything is kept, the whole text is searched after every letter."""
    said, bans = "", {at: set[str]() for at in range(length)}
    while len(said) < length:
        left = [letter for letter in preference(said) if letter not in bans[len(said)]]
        if not left:
            break
        said += left[0]
        if begins := [said.index(each) for each in banned if each in said]:
            at = min(begins)
            bans[at].add(said[at])
            bans |= {later: set() for later in bans if later > at}
            said = said[:at]
    return said


def test_random_bans_give_the_text_of_the_rule(make_llm: MakeLLM) -> None:
    llm, rng = make_llm(), random.Random(0)
    letters = llm.engine.tokenizer.encode("abc")

    def run(work: Sequence[Work]) -> torch.Tensor:
        logits = torch.zeros(len(work), 257)
        for row, (seq, _) in enumerate(work):
            for rank, letter in enumerate(preference(llm.engine.tokenizer.decode(seq.output))):
                logits[row, letters["abc".index(letter)]] = 20.0 - rank
        return logits

    llm.engine.runner.run = run  # type: ignore[method-assign]
    for _ in range(300):
        lengths = [rng.choice((1, 2, 2, 3, 3, 4)) for _ in range(rng.randint(1, 7))]
        banned = ["".join(rng.choices("abc", k=length)) for length in lengths]
        shown = ""
        for chunk in chunks(llm, greedy(*banned, max_tokens=15, allowed_token_ids=letters)):
            shown += chunk.text_delta
            assert not any(each in shown for each in banned), banned
        assert shown == going_back(banned, 15), banned


@pytest.mark.parametrize("eager", [False, True])
def test_one_seed_one_text_alone_in_a_batch_and_after_preemption(make_llm: MakeLLM, eager: bool) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "allowed_token_ids": LETTERS, "mirostat_mode": 2, "mirostat_tau": 2.0}
    prompts = [[9, 8, 7] * (n + 1) for n in range(4)]
    roomy = make_llm(enforce_eager=eager)
    plain = roomy.generate(prompts, [SamplingParams(seed=n, **options) for n in range(4)])
    params = [SamplingParams(seed=n, banned_strings=pairs(each), **options) for n, each in enumerate(plain)]
    alone = [roomy.generate([ids], each)[0] for ids, each in zip(prompts, params, strict=True)]
    assert all(one.token_ids != other.token_ids for one, other in zip(alone, plain, strict=True))
    assert roomy.generate(prompts, params) == alone
    small = make_llm(num_blocks=24, max_num_batched_tokens=8, enforce_eager=eager)
    assert small.generate(prompts, params) == alone
    assert small.engine.stats()["preemptions"] > 0


def test_a_request_without_a_way_on_ends_with_a_reason(
    speaker: MakeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = speaker("ab", "ba")
    a, b = llm.engine.tokenizer.encode("ab")
    nothing, other = llm.generate(["p", "q"], [greedy("a", "b", allowed_token_ids=[a, b]), greedy()])
    assert (nothing.text, nothing.finish_reason, nothing.completion_tokens) == ("", "abort", 0)
    assert "ban all tokens" in str(nothing.stop_reason) and "no token is left" in caplog.text
    assert (other.text, other.finish_reason) == ("ab", "stop")
    monkeypatch.setattr(engine_module, "MOST_REWINDS", 3)
    (given_up,) = llm.generate("p", greedy("a", "b", "\x01", "\x02", "\x00", "!", '"'))
    assert given_up.finish_reason == "abort" and "every continuation tried ends in banned_strings" in caplog.text
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
