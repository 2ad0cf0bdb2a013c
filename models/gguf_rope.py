"""Rotary embeddings between GGUF and transformers: metadata keys and frequency tensors <-> rope_parameters."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import UserError
from .gguf_archs import Arch

if TYPE_CHECKING:
    from .gguf_config import Metadata

FREQS, LONG, SHORT = (f"rope_{kind}.weight" for kind in ("freqs", "factors_long", "factors_short"))


def rope_parameters(metadata: "Metadata", arch: Arch, head_dim: int, positions: int) -> dict[str, Any]:
    """transformers' rope_parameters of a file. UserError for a scaling that transformers does not have."""
    found: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": metadata.get("arch.rope.freq_base", "float32", 10000.0),
    }
    rotated = metadata.get("arch.rope.dimension_count", "uint32", head_dim)
    if arch.partial_rotary:
        found["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise UserError(
            f"{metadata.where}: rope.dimension_count is {rotated}, but {arch.model_types[0]} rotates whole heads "
            f"of {head_dim}. Fix: use the model's safetensors checkpoint"
        )
    kind = metadata.get("arch.rope.scaling.type", "string", "linear")
    factor = metadata.get("arch.rope.scaling.factor", "float32", metadata.get("arch.rope.scale_linear", "float32", 0.0))
    original = metadata.get("arch.rope.scaling.original_context_length", "uint32")
    if LONG in metadata.file.tensors or SHORT in metadata.file.tensors:
        return found | _longrope(metadata, original or positions, positions)
    if FREQS in metadata.file.tensors:
        return found | _llama3(metadata, _floats(metadata, FREQS), found["rope_theta"], rotated)
    if kind == "yarn" and factor > 0:
        return found | _yarn(metadata, factor, original, arch)
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise UserError(
            f"{metadata.where}: rope.scaling.type is {kind!r}; accepted: none, linear, yarn, longrope. "
            "Fix: use the model's safetensors checkpoint"
        )
    return found | {"rope_type": "linear", "factor": factor} if kind == "linear" and factor not in (0, 1) else found


def _floats(metadata: "Metadata", name: str) -> Tensor:
    info = metadata.file.tensors.get(name)
    if info is None or info.type_name != "F32" or len(info.shape) != 1:
        raise metadata.damaged(f"tensor {name} is missing or no vector of F32")
    return info.raw().view(torch.float32)[0]


def _yarn(metadata: "Metadata", factor: float, original: int | None, arch: Arch) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original is not None:
        found["original_max_position_embeddings"] = original
    keys = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    for key, name in keys.items():
        value = metadata.get(f"arch.rope.scaling.{key}", "float32")
        if value is not None:
            found[name] = value
    if arch.name == "gpt-oss":
        # Its checkpoints say so; the file has no key for it.
        found["truncate"] = False
    return found


def _longrope(metadata: "Metadata", original: int, positions: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _floats(metadata, LONG).tolist(),
        "short_factor": _floats(metadata, SHORT).tolist(),
        "original_max_position_embeddings": original,
    }
    said = metadata.get("arch.rope.scaling.attn_factor", "float32")
    if said is not None and not math.isclose(said, longrope_attention_factor(positions, original), rel_tol=1e-5):
        found["attention_factor"] = said
    return found


def longrope_attention_factor(positions: int, original: int) -> float:
    """What cos and sin are multiplied by (LongRoPE, arXiv:2402.13753), unless a config says otherwise."""
    scale = positions / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: what Llama 3.1's scaling divides each frequency by."""
    factor, low, high = (float(parameters[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(parameters["original_max_position_embeddings"])
    theta = float(parameters["rope_theta"])
    turns = original / (2 * math.pi) * theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _llama3(metadata: "Metadata", factors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters that give these factors, which is all a file keeps of them.

    Between the unscaled and the fully scaled frequencies, how much of the scaling applies is linear in the frequency:
    two points give the line. Of its three parameters one is free, chosen as Llama's own low_freq_factor of 1.
    """
    if factors.numel() != head_dim // 2 or not bool((factors >= 0.999).all()):
        raise metadata.damaged(f"tensor {FREQS} has {factors.numel()} factors, expected {head_dim // 2} of at least 1")
    factor = float(factors.max())
    if factor == 1:
        return {}
    usual = {"rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    candidates = [usual | {"original_max_position_embeddings": 8192}]
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    smooth = (1 / factors.double() - 1 / factor) / (1 - 1 / factor)
    between = ((smooth > 1e-4) & (smooth < 1 - 1e-4)).nonzero().flatten()
    if len(between) >= 2:
        first, last = int(between[0]), int(between[-1])
        slope = float((smooth[first] - smooth[last]) / (frequency[first] - frequency[last]))
        below = slope * float(frequency[first]) - float(smooth[first])
        original = round(slope / below)
        candidates.append(
            usual | {"original_max_position_embeddings": original, "high_freq_factor": round(1 + 1 / below, 3)}
        )
    for each in candidates:
        if torch.allclose(llama3_factors(each, head_dim), factors, rtol=1e-4):
            return {"rope_type": "llama3", **each}
    raise UserError(
        f"{metadata.where}: the factors in {FREQS} are not those of Llama 3.1's frequency scaling, the only one "
        "bitsmith reads from that tensor. Fix: use the model's safetensors checkpoint"
    )


def plain_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """rope_parameters of the layers that see everything, where a config tells kinds of layers apart."""
    found: dict[str, Any] = dict(config.rope_parameters)
    return dict(found.get("full_attention", found))


def head_dim_of(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated_dims(config: PretrainedConfig) -> int:
    """How many numbers of a head are rotated."""
    return int(head_dim_of(config) * plain_parameters(config).get("partial_rotary_factor", 1.0))


def factor_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Frequency factors that a file keeps as tensors, float32 [rotated dims / 2]."""
    parameters = plain_parameters(config)
    if parameters["rope_type"] == "llama3":
        return {FREQS: llama3_factors(parameters, rotated_dims(config))}
    if parameters["rope_type"] == "longrope":
        return {LONG: torch.tensor(parameters["long_factor"]), SHORT: torch.tensor(parameters["short_factor"])}
    return {}


def rope_metadata(config: PretrainedConfig, where: str) -> dict[str, tuple[str, Any]]:
    """Keys below the architecture's prefix; the inverse of `rope_parameters`. UserError for a scaling that GGUF does
    not have.
    """
    parameters = plain_parameters(config)
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    found: dict[str, tuple[str, Any]] = {
        "rope.dimension_count": ("uint32", rotated_dims(config)),
        "rope.freq_base": ("float32", theta),
    }
    local = dict(config.rope_parameters).get("sliding_attention")
    if local is not None:
        found["rope.freq_base_swa"] = ("float32", float(local["rope_theta"]))
    if kind in ("default", "llama3"):
        return found
    if kind not in ("linear", "yarn", "longrope"):
        raise UserError(
            f"{where}: rope_type {kind!r} cannot be written as GGUF; accepted: default, linear, yarn, llama3, longrope"
        )
    found["rope.scaling.type"] = ("string", kind)
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind != "linear":
        found["rope.scaling.original_context_length"] = ("uint32", original)
    if kind == "longrope":
        usual = longrope_attention_factor(config.max_position_embeddings, original)
        factor = parameters.get("attention_factor") or usual
        return found | {"rope.scaling.attn_factor": ("float32", float(factor))}
    found["rope.scaling.factor"] = ("float32", float(parameters["factor"]))
    return found | (_yarn_metadata(parameters) if kind == "yarn" else {})


def _yarn_metadata(parameters: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    keys = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    found = {
        f"rope.scaling.{key}": ("float32", float(parameters[name]))
        for key, name in keys.items()
        if parameters.get(name) is not None
    }
    if "rope.scaling.yarn_attn_factor" in found:
        # What llama.cpp reads instead: a factor on top of YaRN's own.
        own = 1 + 0.1 * math.log(parameters["factor"])
        found["rope.scaling.attn_factor"] = ("float32", parameters["attention_factor"] / own)
    return found
