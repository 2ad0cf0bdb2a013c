"""The architectures that GGUF files and transformers both know, as data: which metadata key is which config field, and
what llama.cpp stores differently from the checkpoint.

Facts from llama.cpp's converter (conversion/*.py) and its loader (src/models/*.cpp), b9000 as vendored by
llama-cpp-python 0.3.36. The same table is read from left to right when a file is opened and the other way when one is
written.
"""

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Field:
    """One metadata key (below the architecture's prefix) and the config field that says the same."""

    key: str
    field: str
    # uint32, float32 or bool: llama.cpp refuses a key of another type.
    kind: str = "uint32"
    required: bool = True


@dataclass(frozen=True)
class Arch:
    """One general.architecture."""

    name: str
    # transformers model types that are carried as it; the first is what a file becomes when it is read.
    model_types: tuple[str, ...]
    fields: tuple[Field, ...]
    # Rows of q and k are interleaved: llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
    permuted: bool = False
    # Norm weights are stored plus one, as they are used.
    norm_plus_one: bool = False
    # The rotary embedding may cover a part of the head (partial_rotary_factor).
    partial_rotary: bool = False
    # The config has a head_dim of its own; elsewhere it is hidden_size / num_attention_heads.
    head_dim: bool = True


_SIZES = (
    Field("context_length", "max_position_embeddings"),
    Field("embedding_length", "hidden_size"),
    Field("block_count", "num_hidden_layers"),
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count", "num_attention_heads"),
    Field("attention.head_count_kv", "num_key_value_heads", required=False),
)
_RMS = (*_SIZES, Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"))
_WINDOW = Field("attention.sliding_window", "sliding_window", required=False)
_SOFT_CAP = Field("final_logit_softcapping", "final_logit_softcapping", "float32", required=False)
_EXPERTS_USED = Field("expert_used_count", "num_experts_per_tok")
_EXPERTS = (
    Field("expert_count", "num_experts"),
    _EXPERTS_USED,
    Field("expert_feed_forward_length", "moe_intermediate_size"),
)
_GRANITE = (
    Field("attention.scale", "attention_multiplier", "float32", required=False),
    Field("embedding_scale", "embedding_multiplier", "float32", required=False),
    Field("residual_scale", "residual_multiplier", "float32", required=False),
    Field("logit_scale", "logits_scaling", "float32"),
)

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("llama", ("llama", "mistral"), _RMS, permuted=True),
        # Carried as `llama` too; told apart by expert_count.
        Arch("llama+experts", ("mixtral",), (*_RMS, Field("expert_count", "num_local_experts"), _EXPERTS_USED), True),
        Arch("qwen2", ("qwen2",), _RMS, head_dim=False),
        Arch(
            "qwen2moe",
            ("qwen2_moe",),
            (*_RMS, *_EXPERTS, Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
            head_dim=False,
        ),
        Arch("qwen3", ("qwen3",), _RMS),
        Arch("qwen3moe", ("qwen3_moe",), (*_RMS, *_EXPERTS)),
        Arch("gemma", ("gemma",), _RMS, norm_plus_one=True),
        Arch(
            "gemma2",
            ("gemma2",),
            (*_RMS, _WINDOW, Field("attn_logit_softcapping", "attn_logit_softcapping", "float32", False), _SOFT_CAP),
            norm_plus_one=True,
        ),
        Arch("gemma3", ("gemma3_text",), (*_RMS, _WINDOW, _SOFT_CAP), norm_plus_one=True),
        Arch("phi3", ("phi3",), (*_RMS, _WINDOW), partial_rotary=True, head_dim=False),
        Arch(
            "starcoder2",
            ("starcoder2",),
            (*_SIZES, Field("attention.layer_norm_epsilon", "norm_epsilon", "float32")),
            head_dim=False,
        ),
        Arch(
            "stablelm",
            ("stablelm",),
            (
                *_SIZES,
                Field("attention.layer_norm_epsilon", "layer_norm_eps", "float32"),
                Field("use_parallel_residual", "use_parallel_residual", "bool", False),
            ),
            partial_rotary=True,
            head_dim=False,
        ),
        Arch("gpt-oss", ("gpt_oss",), (*_RMS, Field("expert_count", "num_local_experts"), _EXPERTS_USED, _WINDOW)),
        Arch("olmo2", ("olmo2",), _RMS, head_dim=False),
        Arch("granite", ("granite",), (*_RMS, *_GRANITE), permuted=True, head_dim=False),
    )
}


def arch_of_file(architecture: object, experts: bool, where: str) -> Arch:
    """The entry of a file's general.architecture; UserError listing the accepted ones."""
    name = "llama+experts" if architecture == "llama" and experts else architecture
    if isinstance(name, str) and name in ARCHS:
        return ARCHS[name]
    raise UserError(
        f"{where}: general.architecture is {architecture!r}, which bitsmith does not read from GGUF; accepted: "
        f"{', '.join(sorted(name for name in ARCHS if '+' not in name))}. Fix: use the model's safetensors checkpoint"
    )


def arch_of_model(model_type: str, where: str) -> Arch:
    """The entry that carries a transformers model type; UserError listing the accepted ones."""
    for arch in ARCHS.values():
        if model_type in arch.model_types:
            return arch
    accepted = sorted(t for arch in ARCHS.values() for t in arch.model_types)
    raise UserError(
        f"{where}: model_type {model_type!r} cannot be written as GGUF; accepted: {', '.join(accepted)}. "
        f"Fix: use another format"
    )
