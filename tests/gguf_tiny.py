"""Tiny random models of the architectures that GGUF carries, written as GGUF, and what llama.cpp says of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_export import export, header
from bitsmith.models.gguf_plan import Planned, pieces, plan
from torch import Tensor

_COMMON = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 256,
}
_EXPERTS = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
# name -> (transformers class, config). Windows and soft caps are small enough to matter.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **_LLAMA3}}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen2-moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("Gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-long": (
        "Phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "long_factor": [1 + i / 2 for i in range(8)],
                "short_factor": [1 + i / 10 for i in range(8)],
            },
        },
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
}


def model(name: str, **more: Any) -> transformers.PreTrainedModel:
    """Always the same one, in float32, its weights large enough that mistakes show."""
    kind, config = CASES[name]
    made = getattr(transformers, f"{kind}Config")(**{**_COMMON, **config, **more})
    found = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in found.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.1 if "norm" in key or "bias" in key else 0.2)
        if "norm" in key and not name.startswith("gemma"):
            parameter.data += 1
    eval_mode: transformers.PreTrainedModel = found.eval()
    return eval_mode


def packed(planned: Planned, kind: str, rows: Iterable[Tensor]) -> Iterable[Tensor]:
    """Rows quantized by the gguf package."""
    for piece in rows:
        raw = gguf.quants.quantize(piece.numpy(), gguf.GGMLQuantizationType[kind])
        yield torch.from_numpy(np.ascontiguousarray(raw))


def write(source: Path, path: Path, kind: str = "F32", tokenizer: Any = None) -> Path:
    """The checkpoint in a directory as GGUF with every matrix of type `kind`."""
    ckpt = open_checkpoint(source)
    _, planned = plan(ckpt)
    types = {
        p.name: kind
        for p in planned
        if len(p.shape) > 1 and not p.name.endswith(("norm.weight", "gate_inp.weight", ".bias"))
    }
    export(header(ckpt, tokenizer, types, 0), ckpt, path, lambda p, k: packed(p, k, pieces(p, ckpt)))
    return path


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """float32 [len(ids), vocabulary]: llama.cpp's, with float32 keys and values."""
    import llama_cpp

    engine = llama_cpp.Llama(
        str(path), n_ctx=len(ids), logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0, flash_attn=False
    )
    try:
        engine.eval(ids)
        return torch.tensor(np.array(engine.scores[: len(ids)]))
    finally:
        engine.close()
