"""A transformers config from the metadata and the tensor table of a GGUF file."""

import math
from collections.abc import Callable
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import UserError
from .gguf_archs import Arch, arch_of_file
from .gguf_file import GGUF, TYPES
from .gguf_rope import rope_parameters

_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


class Metadata:
    """Typed access to a file's keys; `arch.KEY` stands for the key below the architecture's prefix."""

    def __init__(self, file: GGUF) -> None:
        self.file = file
        self.where = str(file.files[0])
        self.architecture = file.metadata.get("general.architecture")

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """The value, `default` where there is no such key; UserError where it is of another kind."""
        key = key.replace("arch.", f"{self.architecture}.", 1) if key.startswith("arch.") else key
        if key not in self.file.metadata:
            return default
        found = self.file.metadata[key]
        sound = {
            "uint32": type(found) is int and 0 <= found < 2**31,
            "float32": type(found) in (int, float) and math.isfinite(found),
            "bool": type(found) is bool,
            "string": type(found) is str,
        }[kind]
        if not sound:
            raise UserError(
                f"{self.where}: metadata key {key} is {_shown(found)}, expected one {kind}. Fix: fetch the file again; "
                "a value per layer is not read"
            )
        return found

    def need(self, key: str, kind: str) -> Any:
        """The value; UserError where it is missing."""
        found = self.get(key, kind)
        if found is None:
            key = key.replace("arch.", f"{self.architecture}.", 1)
            raise UserError(f"{self.where}: metadata key {key} is missing. Fix: convert the model again")
        return found

    def strings(self, key: str) -> list[str] | None:
        """An array of strings, None where there is none."""
        found = self.file.metadata.get(key)
        if found is not None and not isinstance(found, list):
            raise UserError(f"{self.where}: metadata key {key} is {_shown(found)}, expected an array of strings")
        return found

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}. Fix: fetch the file again, or convert the model again")


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, int | float | str) else f"an array of {len(value)}"


def read_config(file: GGUF) -> tuple[dict[str, Any], Arch]:
    """(config.json's content, architecture). UserError for an unknown architecture, a missing or damaged key, and
    metadata that contradicts the tensors.
    """
    metadata = Metadata(file)
    metadata.need("general.architecture", "string")
    arch = arch_of_file(metadata.architecture, bool(metadata.get("arch.expert_count", "uint32", 0)), metadata.where)
    config: dict[str, Any] = {"model_type": arch.model_types[0]}
    for field in arch.fields:
        value = metadata.get(f"arch.{field.key}", field.kind)
        if value is None and field.required:
            metadata.need(f"arch.{field.key}", field.kind)
        if value is not None:
            config[field.field] = value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    _check_sizes(metadata, config)
    embedding = file.tensors["token_embd.weight"].shape
    head_dim = metadata.get(
        "arch.attention.key_length", "uint32", config["hidden_size"] // config["num_attention_heads"]
    )
    if arch.head_dim:
        config["head_dim"] = head_dim
    elif head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise metadata.damaged(
            f"attention.key_length {head_dim} times {config['num_attention_heads']} heads is not "
            f"embedding_length {config['hidden_size']}"
        )
    config |= {
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": rope_parameters(metadata, arch, head_dim, config["max_position_embeddings"]),
        "dtype": _dtype(file),
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]],
    }
    for key, name in _TOKEN_IDS.items():
        config[name] = metadata.get(f"tokenizer.ggml.{key}_token_id", "uint32")
    if arch.name in _MORE:
        config |= _MORE[arch.name](metadata, config)
    return config, arch


def _check_sizes(metadata: Metadata, config: dict[str, Any]) -> None:
    """Before a model of these sizes is built: what the tensors say about them."""
    tensors = metadata.file.tensors
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blk.") and name.split(".")[1].isdecimal()}
    if "token_embd.weight" not in tensors:
        raise metadata.damaged("tensor token_embd.weight is missing")
    found = {
        "block_count": (config["num_hidden_layers"], max(blocks, default=-1) + 1),
        "embedding_length": (config["hidden_size"], tensors["token_embd.weight"].shape[-1]),
    }
    experts = tensors.get("blk.0.ffn_down_exps.weight")
    if experts is not None:
        found["expert_count"] = (config.get("num_local_experts", config.get("num_experts")), experts.shape[0])
    for key, (said, seen) in found.items():
        if said != seen:
            raise metadata.damaged(f"metadata says {key} {said}, the tensors say {seen}")
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        if not 1 <= config[key] < 2**24:
            raise metadata.damaged(f"{key} is {config[key]}, expected 1 to {2**24}")


def _dtype(file: GGUF) -> str:
    """What the model runs in where nobody says: that of an unquantized file, bfloat16 for a quantized one (the range
    of float16 is too small for some of these models, and no GGUF says which).
    """
    kinds = {TYPES[t.type][0] for t in file.tensors.values() if len(t.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(
        frozenset(kinds - {"F32"} or kinds), "bfloat16"
    )


def _layer_types(metadata: Metadata, layers: int, period: int) -> list[str]:
    """Which layers attend to a window only: every one but each `period`-th, unless the file says otherwise."""
    key = f"{metadata.architecture}.attention.sliding_window_pattern"
    said = metadata.file.metadata.get(key, period)
    if isinstance(said, int):
        windowed = [bool(said) and layer % said < said - 1 for layer in range(layers)]
    else:
        windowed = [bool(each) for each in said]
    if len(windowed) != layers:
        raise metadata.damaged(f"{key} has {len(windowed)} entries for {layers} layers")
    return ["sliding_attention" if each else "full_attention" for each in windowed]


def _biases(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    tensors = metadata.file.tensors
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _attention_bias(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors}


def _qwen3_moe(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp always renormalises the chosen experts' weights (src/models/qwen3moe.cpp).
    return {**_attention_bias(metadata, config), "norm_topk_prob": True}


def _gemma2(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return {
        "query_pre_attn_scalar": gemma_query_scalar(config, 46),
        "layer_types": _layer_types(metadata, layers, 2),
        "attn_logit_softcapping": config.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": config.get("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    windowed = bool(config.get("sliding_window"))
    local = {"rope_type": "default", "rope_theta": metadata.get("arch.rope.freq_base_swa", "float32", 10000.0)}
    return {
        "query_pre_attn_scalar": gemma_query_scalar(config, 62),
        "layer_types": _layer_types(metadata, layers, 6) if windowed else ["full_attention"] * layers,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def gemma_query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """What llama.cpp scales queries by (to the power -1/2): the file does not say; the 27B models differ."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    original = metadata.get("arch.rope.scaling.original_context_length", "uint32", config["max_position_embeddings"])
    return {"sliding_window": config.get("sliding_window") or None, "original_max_position_embeddings": original}


def _starcoder2(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in metadata.file.tensors, "sliding_window": None}


def _stablelm(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    tensors = metadata.file.tensors
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        # As llama.cpp decides it.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
    }


def _gpt_oss(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_attention_bias(metadata, config),
        "layer_types": _layer_types(metadata, config["num_hidden_layers"], 2),
    }


def _olmo2(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    if metadata.get("arch.attention.sliding_window", "uint32", 0):
        raise UserError(
            f"{metadata.where}: this olmo2 file has attention.sliding_window (an OLMo 3), which bitsmith does not "
            "read from GGUF. Fix: use the model's safetensors checkpoint"
        )
    return _attention_bias(metadata, config)


_MORE: dict[str, Callable[[Metadata, dict[str, Any]], dict[str, Any]]] = {
    "llama": _biases,
    "qwen3": _attention_bias,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "gpt-oss": _gpt_oss,
    "olmo2": _olmo2,
    "granite": _biases,
}
