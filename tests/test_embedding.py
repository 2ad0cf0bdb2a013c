"""Embeddings that stay packed: the rows of the dequantized table bit for bit, recorded too, and held once where tied."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.kernels import dispatch, native
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.recording import record
from bitsmith.kernels.rows import look_up, source
from bitsmith.models.embedding import QuantEmbedding
from bitsmith.models.linear import QuantLinear
from bitsmith.models.load import load_model
from bitsmith.quant_formats import gguf_blocks
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve import recorded
from bitsmith.serve.engine import Engine, EngineConfig
from torch import nn

from . import gguf_bytes
from . import gguf_tiny as tiny

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XS", "MXFP4")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1031}
needs_native = pytest.mark.skipif(
    native.best_path() in ("", "generic"),
    reason="no native library for this processor, or built without a C++ compiler",
)


def packed(name: str, shape: tuple[int, int]) -> QTensor:
    return gguf_blocks.unpack(name, gguf_bytes.random_rows(name, *shape, calm=True), shape)


@pytest.mark.parametrize(("name", "exact"), list(itertools.product(NAMES, (True, False))))
def test_rows_are_those_of_the_dequantized_table(name: str, exact: bool) -> None:
    """From the tensor itself, and from a product that holds it in its own order; 37 rows are no whole blocks."""
    q = packed(name, (37, 512))
    held = source(dispatch.prepare(q, torch.bfloat16, exact=exact))
    assert held is not None or not exact
    if held is None:
        pytest.skip(f"the product of {q.spec} on this machine gives no rows")
    ids = torch.tensor([[3, 36, 0], [16, 15, 3]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(look_up(held, ids, dtype), q.dequantize(dtype)[ids])
    with torch.inference_mode():
        own = ids.clone()
        again = record(lambda: look_up(held, own, torch.bfloat16))
        for other in (torch.tensor([[36, 1, 2], [17, 30, 31]]), ids):
            own.copy_(other)
            assert torch.equal(again(), q.dequantize(torch.bfloat16)[other])


def write(name: str, tmp_path: Path, kind: str, **more: Any) -> Path:
    tiny.model(name, **more).save_pretrained(tmp_path / "source")
    return tiny.write(tmp_path / "source", tmp_path / "model.gguf", kind)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma3", "granite"])
def test_models_compute_as_with_a_dense_table(name: str, tmp_path: Path) -> None:
    """Gemma multiplies its rows; in float32 nothing else differs."""
    found = load_model(write(name, tmp_path, "Q8_0"), attn_implementation="eager")
    table = found.get_input_embeddings()
    assert isinstance(table, QuantEmbedding) and "weight" not in table._parameters
    ids = torch.tensor([[5, 7, 250, 0]])
    with torch.no_grad():
        expected = found(ids).logits
        dense = nn.Embedding(*table.weight.shape, _weight=table.weight)
        rows = dense(ids) * torch.as_tensor(getattr(table, "embed_scale", 1.0))
        assert torch.equal(table(ids), rows)
        assert torch.equal(found(inputs_embeds=rows).logits, expected)


def resident(model: nn.Module) -> int:
    """Bytes of every tensor a model holds, each storage once."""
    held: dict[int, int] = {}

    def add(tensors: Any) -> None:
        for t in tensors:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    add(model.parameters())
    for module in model.modules():
        products = [module.matmul] if isinstance(module, QuantLinear) else []
        products += [module.held] if isinstance(module, QuantEmbedding) else []
        for product in products:
            stacked = product.shared.matmul if hasattr(product, "shared") else product
            inner = getattr(stacked, "core", stacked)
            add(inner.parts.values() if hasattr(inner, "parts") else inner.q.parts.values())
    return sum(held.values())


@needs_native
@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(["llama", "qwen2"], ["float32", "bfloat16"])))
def test_a_model_is_no_larger_than_its_file(name: str, dtype: str, tmp_path: Path) -> None:
    """The tied head of qwen2 and its embeddings are one copy. Without metadata, the file is its tensors."""
    path = write(name, tmp_path, "Q8_0", **WIDE, tie_word_embeddings=name == "qwen2")
    model = load_model(path, dtype=dtype)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert resident(model) <= 1.03 * path.stat().st_size


@needs_native
def test_decode_steps_of_a_file_are_recorded(tmp_path: Path, byte_tokenizer: Any, monkeypatch: Any) -> None:
    """In bfloat16 with the table looked up in the tied head; tokens are those of steps that are not recorded."""
    path = write("qwen2", tmp_path, "Q8_0", **WIDE, tie_word_embeddings=True)
    said: list[list[int]] = []
    kept: list[int] = []
    run = recorded.Recorded.run

    def noted(self: recorded.Recorded, batch: Any) -> Any:
        found = run(self, batch)
        kept.append(found is not None)
        return found

    monkeypatch.setattr(recorded.Recorded, "run", noted)
    for eager in (False, True):
        engine = Engine(
            load_model(path, dtype="bfloat16"),
            byte_tokenizer,
            EngineConfig(max_model_len=64, max_num_seqs=2, num_blocks=40, block_size=4, enforce_eager=eager),
        )
        engine.add_request("a", [5, 9, 11], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        tokens: list[int] = []
        while engine.has_work():
            for _, chunk in engine.step():
                tokens += chunk.token_ids
        said.append(tokens)
    assert said[0] == said[1]
    assert sum(kept) >= 6


def test_served_tokens_are_those_of_the_dequantized_model(tmp_path: Path, byte_tokenizer: Any) -> None:
    """In float32, beside the dense model with every packed weight replaced by what it decodes to."""
    packed_model = load_model(write("llama", tmp_path, "Q8_0"))
    dense = tiny.model("llama")
    for name, module in packed_model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            dense.get_submodule(name).weight = nn.Parameter(module.weight, requires_grad=False)
    ids = [5, 9, 11]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(dense(torch.tensor([ids])).logits[0, -1].argmax()))
    engine = Engine(packed_model, byte_tokenizer, EngineConfig(max_model_len=64, num_blocks=40, block_size=4))
    engine.add_request("a", ids[:3], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    said: list[int] = []
    while engine.has_work():
        for _, chunk in engine.step():
            said += chunk.token_ids
    assert said == ids[3:]
