"""Paged, packed, chunked and staggered generation gives the tokens of one-by-one transformers `generate`."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.models import attention
from bitsmith.models.attention import freeze_rope, make_paged, paged_forward, warm_up
from bitsmith.models.batch import current_step
from bitsmith.models.load import load_model, load_tokenizer
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.engine import Engine, EngineConfig
from bitsmith.serve.runner import make_batch, order_work
from bitsmith.serve.scheduler import Seq
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

SERVED = ["Llama", "Qwen3", "Mistral", "Gemma2", "Phi3", "Mixtral", "GptOss"]
NEW_TOKENS = 12
SMALL = EngineConfig(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=100)

Build = Callable[..., PreTrainedModel]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 256, (n,), generator=generator).tolist() for n in (7, 41, 1, 23)]


def greedy(max_tokens: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def one_by_one(model: PreTrainedModel, asked: list[list[int]]) -> list[list[int]]:
    """transformers' own greedy continuation of each prompt alone."""
    generate: Any = model.generate
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]


def staggered(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    """The engine's continuations, a prompt arriving every second step."""
    outputs: dict[str, list[int]] = {}
    step = 0
    while engine.has_work() or len(outputs) < len(asked):
        if step % 2 == 0 and len(outputs) < len(asked):
            name = str(len(outputs))
            outputs[name] = []
            engine.add_request(name, asked[len(outputs) - 1], greedy())
        for name, chunk in engine.step():
            outputs[name] += chunk.token_ids
        engine.scheduler.check_integrity()
        step += 1
    return list(outputs.values())


def poison(engine: Engine) -> None:
    """Fill every cache slot with NaN: only what a sequence stored itself may be read."""
    cache: Any = engine.runner.cache
    for parts_k, parts_v in cache._parts.values():
        for part in (*parts_k, *parts_v):
            part.fill_(math.nan)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_equal_transformers_generate(name: str, tiny_model: Build, byte_tokenizer: Any) -> None:
    asked = prompts()
    want = one_by_one(tiny_model(name), asked)
    engine = Engine(tiny_model(name), byte_tokenizer, SMALL)
    poison(engine)
    assert staggered(engine, asked) == want
    # Tokens that never vary would equal anything.
    assert len({token for tokens in want for token in tokens}) > NEW_TOKENS
    assert engine.blocks.num_free == engine.blocks.num_blocks


@pytest.mark.parametrize("name", SERVED)
def test_the_last_mlp_computes_the_rows_whose_logits_are_wanted(
    name: str, tiny_model: Build, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = prompts(), list[int]()
    model = tiny_model(name)
    mlp = model.get_decoder().layers[-1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: (rows.append(x.shape[1]), forward(x))[1])
    engine = Engine(model, byte_tokenizer, replace(SMALL, max_num_batched_tokens=64))
    rows.clear()
    staggered(engine, asked)
    assert rows and max(rows) <= SMALL.max_num_seqs < max(map(len, asked))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("Mistral", "sliding_window"),
        ("Gemma2", "softcap"),
        ("Gemma2", "sliding_window"),
        ("Gemma2", "scaling"),
        ("GptOss", "s_aux"),
        ("GptOss", "sliding_window"),
    ],
)
def test_what_attention_must_honour_changes_the_logits(
    name: str, lost: str, tiny_model: Build, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without one argument the comparison above would fail."""
    prompt = prompts()[1]
    logits = []
    for drop in (None, lost):
        engine = Engine(tiny_model(name), byte_tokenizer, SMALL)

        def forward(*args: Any, _drop: str | None = drop, **kwargs: Any) -> Any:
            if _drop is not None:
                assert _drop in kwargs, f"{name} does not pass {_drop}"
                kwargs.pop(_drop)
            return paged_forward(*args, **kwargs)

        monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION, forward)
        logits.append(last_logits(engine, prompt))
    want = tiny_model(name)(torch.tensor([prompt])).logits[0, -1]
    assert torch.allclose(logits[0], want, atol=1e-4)
    assert (logits[1] - want).abs().max() > 1e-2


@torch.inference_mode()
def last_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Logits after `ids`, prefilled in the engine's chunks."""
    engine.add_request("probe", ids, greedy())
    while True:
        work = order_work(engine.scheduler.schedule())
        logits = engine.runner.run(work)
        if work[0][1] == work[0][0].remaining:
            engine.abort("probe")
            return logits[0]
        engine.scheduler.update(work, [None])


def test_preemption_changes_no_token(tiny_model: Build, byte_tokenizer: Any) -> None:
    asked = [ids[:9] for ids in prompts()]
    want = one_by_one(tiny_model("Llama"), asked)
    config = EngineConfig(max_model_len=28, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=9)
    engine = Engine(tiny_model("Llama"), byte_tokenizer, config)
    assert staggered(engine, asked) == want
    assert engine.stats()["preemptions"] > 0
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_int8_cache_keeps_the_distribution(shared: Callable[[str], Path]) -> None:
    """On trained weights. Truncated codes, which other engines have shipped, cost 8 times the divergence."""
    path = shared("models/books-8m")
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(shared("data/books-heldout.txt").read_text()[20000:22000])[:400]
    model = load_model(path)
    logits = {}
    for name in ("none", "int8"):
        engine = Engine(model, tokenizer, EngineConfig(kv_cache_dtype=name, num_blocks=32))
        work = [(Seq("probe", ids, greedy(), blocks=list(range(32))), len(ids))]
        batch = make_batch(work, 16, model.device)
        every_row = replace(batch, last=torch.arange(len(ids)))
        logits[name] = engine.runner.forward(every_row).log_softmax(-1)
    divergence = (logits["none"].exp() * (logits["none"] - logits["int8"])).sum(-1)
    assert 0 < divergence.mean() < 6e-5
    assert (logits["none"].argmax(-1) == logits["int8"].argmax(-1)).float().mean() > 0.99


def test_int8_generation_runs_in_every_architecture(tiny_model: Build, byte_tokenizer: Any) -> None:
    config = EngineConfig(max_model_len=96, block_size=4, num_blocks=100, kv_cache_dtype="int8")
    for name in ("Llama", "Gemma2", "GptOss"):
        outputs = staggered(Engine(tiny_model(name), byte_tokenizer, config), prompts())
        assert [len(tokens) for tokens in outputs] == [NEW_TOKENS] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(dtype: torch.dtype, tiny_model: Build, byte_tokenizer: Any) -> None:
    for name in ("Llama", "Gemma2"):
        model: Any = tiny_model(name)
        model.to(dtype)
        outputs = staggered(Engine(model, byte_tokenizer, SMALL), prompts())
        assert [len(tokens) for tokens in outputs] == [NEW_TOKENS] * 4


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 32}


@pytest.mark.parametrize(("name", "config"), [("Phi3", LONGROPE), ("Llama", DYNAMIC)], ids=["longrope", "dynamic"])
def test_a_long_request_does_not_change_a_short_one(
    name: str, config: dict, tiny_model: Build, byte_tokenizer: Any
) -> None:
    _, long, _, short = prompts()
    limits = EngineConfig(max_model_len=30, max_num_batched_tokens=64, block_size=4, num_blocks=40)
    engine = Engine(tiny_model(name, **config), byte_tokenizer, limits)
    # Within the original context nothing differs from transformers.
    want = one_by_one(tiny_model(name, **config), [short[:10]])
    assert staggered(engine, [short[:10]]) == want
    model = tiny_model(name, **config)
    model.config.max_position_embeddings = 256
    engine = Engine(model, byte_tokenizer, EngineConfig(max_model_len=128, block_size=4, num_blocks=40))
    alone = staggered(engine, [short])
    assert staggered(engine, [long, short])[1:] == alone


def test_freezing_takes_the_frequencies_of_the_longest_request(tiny_model: Build) -> None:
    def frequencies(max_model_len: int) -> torch.Tensor:
        model = tiny_model("Phi3", **LONGROPE)
        freeze_rope(model, max_model_len)
        model(torch.tensor([[5] * 40]))
        return model.model.rotary_emb.inv_freq

    assert torch.allclose(frequencies(33), frequencies(32) / 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Bloom", "attention does not go through transformers' AttentionInterface"),
        ("Mamba", "recurrent|linear_attention|mamba"),
        ("Lfm2", "it has layers of type conv"),
    ],
)
def test_models_that_would_be_wrong_are_refused(name: str, reason: str, tiny_model: Build) -> None:
    with pytest.raises(UserError, match=rf"model_type '{name.lower()}' cannot be served: .*({reason}).*plain forward"):
        make_paged(tiny_model(name), 64)


def test_the_warm_up_counts_attention_calls(tiny_model: Build) -> None:
    model = tiny_model("Llama")
    # Still on eager attention: what a model that ignores the interface looks like.
    with pytest.raises(
        UserError, match=r"'llama' cannot be served: of its 2 layers 0 called .* \(0 calls in one forward"
    ):
        warm_up(model)
    shapes = make_paged(model, 64)
    assert {layer: tuple(shape) for layer, shape in shapes.items()} == {0: (2, 16, 16), 1: (2, 16, 16)}
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UserError, match=r"of its 2 layers 1 called .* \(2 calls"):
        warm_up(model)


def test_unknown_attention_arguments_are_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match=r"Linear passes alibi=<tensor \[2\]> .* does not implement"):
        paged_forward(torch.nn.Linear(1, 1), q, q, q, alibi=torch.ones(2))
    with pytest.raises(UserError, match=r"passes dropout=0\.5"):
        paged_forward(torch.nn.Linear(1, 1), q, q, q, dropout=0.5)
    with pytest.raises(UserError, match="passes attention_mask=<tensor"):
        paged_forward(torch.nn.Linear(1, 1), q, q, q, attention_mask=torch.ones(1))


def test_a_paged_model_outside_a_step_says_so(tiny_model: Build) -> None:
    with pytest.raises(RuntimeError, match="outside an engine step"):
        current_step()
    model = tiny_model("Llama")
    make_paged(model, 64)
    with pytest.raises(RuntimeError, match=r"model.set_attn_implementation\('sdpa'\)"):
        model(torch.tensor([[1, 2]]))
    model.set_attn_implementation("sdpa")
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 257)


def test_no_mask_function_is_registered() -> None:
    """With one, transformers would build masks, and synchronise with the GPU, in every forward."""
    assert attention.ATTENTION not in ALL_MASK_ATTENTION_FUNCTIONS
