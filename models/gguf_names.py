"""Which tensor of a GGUF file is which weights of a checkpoint, and what llama.cpp does to them on the way.

Names come from gguf's own map, asked about the names a checkpoint of the architecture has on the hub: transformers
gives those by reverting its conversions (experts one by one, `block_sparse_moe` for mixtral ...), so that a GGUF file
and a safetensors checkpoint look the same from outside.
"""

import re
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import UserError
from .gguf_archs import Arch

# What the file has besides weights: frequencies, which the config says in transformers.
NO_WEIGHTS = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight$")
# Stacked in GGUF along a new first axis, one by one in a checkpoint.
_STACKED = re.compile(r"\.(experts|norms)\.\d+\.")


@dataclass(frozen=True)
class Link:
    """One GGUF tensor and the checkpoint weights it holds."""

    tensor: str
    # One weight, or the members of a stack in order.
    weights: tuple[str, ...]
    # Of each of them, in the checkpoint.
    shape: tuple[int, ...]
    # Rows are interleaved within each of that many heads; 0: as they are.
    heads: int = 0
    # Added to the checkpoint's numbers in the file.
    offset: float = 0.0
    # gpt-oss keeps gate and up as the "even" and "odd" outputs of one weight, and experts transposed; "" elsewhere.
    part: str = ""
    transposed: bool = False

    @property
    def quantizable(self) -> bool:
        """Whether the weights, too, may stay packed: their rows are rows of the tensor."""
        return not self.part and not self.transposed and not self.offset and len(self.shape) == 2


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model with every tensor on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def checkpoint_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model's checkpoint on the hub, the tied ones left out."""
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def links(model: PreTrainedModel, arch: Arch) -> list[Link]:
    """Every tensor a GGUF file of this model has, in the model's order. `model` may be on the meta device."""
    name_map = gguf.get_tensor_name_map(_gguf_arch(arch), model.config.num_hidden_layers)
    gathered: dict[str, list[str]] = {}
    shapes = checkpoint_shapes(model)
    parts: dict[str, tuple[str, bool]] = {}
    for name in shapes:
        for single, part, transposed in _spelled(_STACKED.sub(r".\1.", name).replace(".norms.", "."), arch):
            tensor = name_map.get_name(single, try_suffixes=(".weight", ".bias"))
            if tensor is None:
                raise UserError(
                    f"a {model.config.model_type} model with {name} cannot be a GGUF file: {arch.name} has no name for "
                    "it. Fix: use the safetensors checkpoint, or another format"
                )
            gathered.setdefault(tensor, []).append(name)
            parts[tensor] = part, transposed
    return [
        Link(
            tensor,
            tuple(names),
            shapes[names[0]],
            _heads(tensor, model.config, arch),
            float(arch.norm_plus_one and tensor.endswith("norm.weight")),
            *parts[tensor],
        )
        for tensor, names in gathered.items()
    ]


def _gguf_arch(arch: Arch) -> gguf.MODEL_ARCH:
    name = arch.name.partition("+")[0]
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _spelled(name: str, arch: Arch) -> list[tuple[str, str, bool]]:
    """(a name as gguf's map has it, part, transposed) for each tensor that holds something of the weight."""
    if arch.name != "gpt-oss":
        return [(name, "", False)]
    stem, bias, suffix = name.removesuffix("_bias"), name.endswith("_bias"), ".weight"
    if bias:
        suffix = ".bias"
    if stem.endswith("gate_up_proj"):
        stem = stem.removesuffix("gate_up_proj")
        return [(f"{stem}{which}_proj{suffix}", part, not bias) for which, part in (("gate", "even"), ("up", "odd"))]
    if stem.endswith("experts.down_proj"):
        return [(stem + suffix, "", not bias)]
    return [(name + ".weight" if name.endswith("sinks") else name, "", False)]


def _heads(tensor: str, config: PretrainedConfig, arch: Arch) -> int:
    if not arch.permuted:
        return 0
    if ".attn_q." in tensor:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in tensor else 0


def interleaved(rows: int, heads: int) -> Tensor:
    """int64 [rows]: row i of the file is row `interleaved[i]` of the checkpoint."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def halved(rows: int, heads: int) -> Tensor:
    """int64 [rows]: row i of the checkpoint is row `halved[i]` of the file; the inverse of `interleaved`."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)
