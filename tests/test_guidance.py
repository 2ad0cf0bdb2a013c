"""Classifier-free guidance is transformers' own, token for token, whatever else runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.llm import LLM
from bitsmith.serve.outputs import Output
from transformers import PreTrainedModel

MakeLLM = Callable[..., LLM]
PROMPTS = ["a", "the second prompt", "3 is longer than the others, by far"]
NEGATIVES = ["what it must not be like", "", "no"]


def guided(negative: str = "", **options: Any) -> SamplingParams:
    base = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "guidance_scale": 1.7}
    return SamplingParams(**{**base, "negative_prompt": negative, **options})


def theirs(model: PreTrainedModel, ids: list[int], negative: list[int], scale: float) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation under guidance, and the scores it chose from."""
    more = {"negative_prompt_ids": torch.tensor([negative])} if negative else {}
    generate: Any = model.generate
    found = generate(
        torch.tensor([ids]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        guidance_scale=scale,
        output_scores=True,
        return_dict_in_generate=True,
        **more,
    )
    return found.sequences[0, len(ids) :].tolist(), torch.cat(found.scores)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("scale", [1.7, 0.5])
def test_tokens_and_scores_are_transformers(
    name: str, scale: float, tiny_model: Callable[..., PreTrainedModel], byte_tokenizer: Any
) -> None:
    sizes = {"max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 9, "block_size": 4, "num_blocks": 100}
    llm = LLM(tiny_model(name), byte_tokenizer, **sizes)
    params = [guided(negative, guidance_scale=scale, logprobs=0) for negative in NEGATIVES]
    outputs = llm.generate(PROMPTS, params)
    encode = byte_tokenizer.encode
    for prompt, negative, output in zip(PROMPTS, NEGATIVES, outputs, strict=True):
        tokens, scores = theirs(tiny_model(name), encode(prompt), encode(negative), scale)
        assert output.token_ids == tokens
        want = scores.log_softmax(-1)
        for row, entry in enumerate(output.logprobs or ()):
            assert entry.logprob == pytest.approx(float(want[row, entry.token_id]), abs=1e-3)
    plain = llm.generate(PROMPTS, [guided(guidance_scale=1.0)] * 3)
    assert all(one.token_ids != other.token_ids for one, other in zip(outputs, plain, strict=True))


def run(llm: LLM, params: list[SamplingParams]) -> list[Output]:
    outputs = llm.generate(PROMPTS * 2, params)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
    return outputs


def test_a_pair_survives_batches_chunks_and_preemptions(make_llm: MakeLLM) -> None:
    # Guided rows among plain ones, sampling, going back for banned strings.
    params = [guided(each, temperature=1.0, seed=n, max_tokens=16) for n, each in enumerate(NEGATIVES)]
    params += [guided(guidance_scale=1.0), guided("x", banned_strings=["a", "e"]), guided("y", min_p=0.1)]
    roomy = make_llm()
    alone = [roomy.generate([prompt], each)[0] for prompt, each in zip(PROMPTS * 2, params, strict=True)]
    assert run(roomy, params) == alone
    small = make_llm(num_blocks=30, max_num_batched_tokens=9)
    assert run(small, params) == alone
    assert small.engine.stats()["preemptions"] > 0
    pair = make_llm(max_num_seqs=2, max_num_batched_tokens=2)
    assert run(pair, params) == alone


def test_the_pair_leaves_together(make_llm: MakeLLM) -> None:
    engine = make_llm("x" * 50).engine
    engine.add_request("a", [1] * 5, guided("seven..", max_tokens=40))
    engine.step()
    engine.step()
    assert engine.blocks.num_free == 64 - 2 - 2
    engine.abort("a")
    assert engine.blocks.num_free == 64 and not engine.has_work()


def test_the_longer_of_the_two_meets_the_context(make_llm: MakeLLM) -> None:
    (output,) = make_llm("x" * 80).generate([[1] * 4], guided("n" * 50, max_tokens=None))
    assert output.finish_reason == "length" and output.completion_tokens == 64 - 50
    with pytest.raises(UserError, match="negative_prompt has 64 tokens and the context holds 64"):
        make_llm().generate("a", guided("n" * 64))
    with pytest.raises(UserError, match="guidance_scale runs two sequences: serve with --max-num-seqs 2"):
        make_llm(max_num_seqs=1).generate("a", guided())
