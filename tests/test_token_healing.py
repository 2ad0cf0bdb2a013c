"""Token healing: the prompt's last token is chosen again, and the answer goes on from the prompt's text."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.llm import LLM
from bitsmith.serve.runner import Work

SIZES = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4, "num_blocks": 64}


@pytest.fixture
def llm(tiny_model: Callable[..., Any], bpe_tokenizer: Any) -> LLM:
    return LLM(tiny_model("Llama", vocab_size=len(bpe_tokenizer)), bpe_tokenizer, **SIZES)


def healing(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 10, "token_healing": True, **options})


def wants(llm: LLM, *pieces: str) -> None:
    """Make the model prefer these tokens, in this order, to all others."""
    vocabulary = llm.engine.tokenizer.get_vocab()
    ids = [vocabulary[piece] for piece in pieces]

    def run(work: Sequence[Work]) -> torch.Tensor:
        logits = torch.zeros(len(work), llm.engine.vocab_size)
        logits[:, ids] = 20.0 - torch.arange(len(ids), dtype=torch.float32)
        said = [ids[seq.num_output :][:1] or [256] for seq, _ in work]
        logits[torch.arange(len(work)), torch.tensor(said)[:, 0]] = 30.0
        return logits

    llm.engine.runner.run = run  # type: ignore[method-assign]


def test_a_longer_token_takes_the_place_of_the_last(llm: LLM, bpe_tokenizer: Any) -> None:
    assert bpe_tokenizer.tokenize("is th") == ["i", "s", "Ġth"]
    wants(llm, "Ġther", "e")
    (output,) = llm.generate("is th", healing())
    assert output.text == "ere" and output.finish_reason == "stop"
    assert bpe_tokenizer.convert_ids_to_tokens(output.token_ids) == ["Ġther", "e", "<eos>"]
    assert (output.prompt_tokens, output.completion_tokens) == (2, 3)
    (plain,) = llm.generate("is th", healing(token_healing=False))
    assert plain.text == " there"


def test_several_tokens_may_say_the_healed_text(llm: LLM, bpe_tokenizer: Any) -> None:
    wants(llm, "Ġ", "th", "ing")
    (output,) = llm.generate("is the", healing())
    # "th" may come within " the", and then nothing but an "e".
    assert bpe_tokenizer.convert_ids_to_tokens(output.token_ids)[:2] == ["Ġ", "th"]
    assert bpe_tokenizer.decode(output.token_ids, skip_special_tokens=True) == " the" + output.text
    wants(llm, "x", "y")
    (output,) = llm.generate("is the", healing())
    assert bpe_tokenizer.decode(output.token_ids, skip_special_tokens=True) == " the" + output.text


def test_streams_leave_the_healed_text_out(llm: LLM) -> None:
    wants(llm, "Ġ", "t", "h", "e", "x")
    llm.engine.add_request("x", llm.engine.tokenizer.encode("is the"), healing())
    deltas = [chunk.text_delta for _ in range(6) for _, chunk in llm.engine.step()]
    assert deltas == ["", "", "", "", "x", ""]


@pytest.mark.parametrize("prompt", ["is the", "the in", "a\n", "x th", "naïve", "ing"])
def test_prompt_and_answer_are_one_text(llm: LLM, prompt: str) -> None:
    tokenizer = llm.engine.tokenizer
    ids = tokenizer.encode(prompt)
    params = [healing(temperature=1.0, seed=seed, ignore_eos=True, banned_tokens=[256]) for seed in range(6)]
    for output in llm.generate([ids] * 6, params):
        kept = ids[: output.prompt_tokens] + output.token_ids
        assert tokenizer.decode(kept) == prompt + output.text
        assert output.prompt_tokens == len(ids) - 1 or prompt == "ing"


def test_going_back_into_the_healed_text(llm: LLM, bpe_tokenizer: Any) -> None:
    wants(llm, "Ġther", "e", "q")
    (output,) = llm.generate("is th", healing(banned_strings=["ER"], max_tokens=6))
    first = bpe_tokenizer.convert_ids_to_tokens(output.token_ids)[0]
    assert first != "Ġther" and "er" not in output.text.lower()
    assert bpe_tokenizer.decode(output.token_ids, skip_special_tokens=True) == " th" + output.text


def test_what_cannot_be_healed_stays(llm: LLM) -> None:
    half_a_character = llm.engine.tokenizer.encode("\N{EURO SIGN}")[0]
    for prompt in ([40, 256], [258], [40, half_a_character]):
        healed, plain = llm.generate([prompt, prompt], [healing(), healing(token_healing=False)])
        assert healed == plain and healed.prompt_tokens == len(prompt)
    with pytest.raises(UserError, match="token_healing and allowed_token_ids both say which tokens may come first"):
        llm.generate("is th", healing(allowed_token_ids=[5]))
