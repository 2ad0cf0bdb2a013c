"""The metadata of a GGUF file from a checkpoint's config: the inverse of gguf_config.py, and checked against it."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..errors import UserError
from .checkpoint import AnyCheckpoint
from .gguf_archs import Arch
from .gguf_config import read_config
from .gguf_file import GGUF, TYPES, TensorInfo
from .gguf_plan import Planned
from .gguf_rope import head_dim_of, plain_parameters, rope_metadata
from .gguf_write import ALIGNMENT, Metadata, as_read

_LOG = logging.getLogger(__name__)
_VERSION = 2
# What changes nothing in what a model computes, or is said by other keys (rotary embeddings by several, token ids by
# the tokenizer), or follows from a key that is compared.
_NOT_COMPARED = {
    *(
        "transformers_version",
        "architectures",
        "dtype",
        "_name_or_path",
        "model_type",
        "initializer_range",
        "use_cache",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "pretraining_tp", "max_window_layers"),
    *("router_aux_loss_coef", "output_router_logits", "_sliding_window_pattern", "quantization_config", "bitsmith"),
    *("id2label", "label2id"),
}
# Dropouts do nothing when a model is not trained.
_DROPOUT = ("_dropout", "_pdrop")


def metadata_of(source: AnyCheckpoint, arch: Arch, planned: list[Planned], file_type: int, name: str) -> Metadata:
    """general.* and the architecture's keys; the tokenizer's are gguf_vocab.py's.

    `file_type` is llama.cpp's number of a mixture (LLAMA_FTYPE). UserError where the config has something that a GGUF
    file cannot say, naming it.
    """
    config = source.pretrained_config()
    where = str(source.config_file)
    architecture = arch.name.partition("+")[0]
    keys: dict[str, tuple[str, Any]] = {}
    for field in arch.fields:
        value = getattr(config, field.field, None)
        if value is not None:
            keys[field.key] = (field.kind, float(value) if field.kind == "float32" else value)
    keys |= rope_metadata(config, where)
    if arch.head_dim:
        keys |= dict.fromkeys(("attention.key_length", "attention.value_length"), ("uint32", head_dim_of(config)))
    keys["vocab_size"] = ("uint32", config.vocab_size)
    keys |= _MORE.get(arch.name, _nothing)(config)
    found: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", architecture),
        "general.type": ("string", "model"),
        "general.name": ("string", name),
        "general.file_type": ("uint32", file_type),
        "general.quantization_version": ("uint32", _VERSION),
        "general.alignment": ("uint32", ALIGNMENT),
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }
    _refuse_loss(config, found, planned, where)
    window = getattr(config, "sliding_window", None)
    if architecture == "llama" and window and window < config.max_position_embeddings:
        _LOG.warning("GGUF does not keep the sliding window of %s: it matters beyond %d tokens", where, window)
    return found


def _nothing(config: PretrainedConfig) -> dict[str, tuple[str, Any]]:
    return {}


def _phi3(config: PretrainedConfig) -> dict[str, tuple[str, Any]]:
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {
        "rope.scaling.original_context_length": ("uint32", original),
        # llama.cpp tells Phi-4, which has no window, by a zero.
        "attention.sliding_window": ("uint32", config.sliding_window or 0),
    }


def _gpt_oss(config: PretrainedConfig) -> dict[str, tuple[str, Any]]:
    return {"expert_feed_forward_length": ("uint32", config.intermediate_size)}


def _windows(config: PretrainedConfig) -> dict[str, tuple[str, Any]]:
    """Which layers see a window only, layer by layer."""
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window_pattern": ("bools", pattern)}


_MORE: dict[str, Callable[[PretrainedConfig], dict[str, tuple[str, Any]]]] = {
    "phi3": _phi3,
    "gpt-oss": lambda config: {**_gpt_oss(config), **_windows(config)},
    "gemma2": _windows,
    "gemma3": _windows,
}


def _refuse_loss(config: PretrainedConfig, metadata: Metadata, planned: list[Planned], where: str) -> None:
    """Read the metadata back as a file's; UserError where the config that comes out computes something else."""
    tensors = {p.name: _info(p, where) for p in planned}
    back = AutoConfig.for_model(**read_config(GGUF([Path(where)], as_read(metadata), tensors))[0])
    one, two = _compared(config), _compared(back)
    for key in sorted(one.keys() & two.keys()):
        if not _same(one[key], two[key]):
            raise UserError(
                f"{where}: {key} is {one[key]!r:.80}, which a GGUF file of this architecture cannot say: it would be "
                f"read as {two[key]!r:.80}. Fix: use another format"
            )


def _compared(config: PretrainedConfig) -> dict[str, Any]:
    found = {k: v for k, v in config.to_dict().items() if k not in _NOT_COMPARED and not k.endswith(_DROPOUT)}
    rope = plain_parameters(config)
    exact = rope["rope_type"] == "yarn" and not rope.get("truncate", True)
    found |= {"head_dim": head_dim_of(config), "rope_type": rope["rope_type"], "rope_parameters.truncate": not exact}
    return found


def _info(planned: Planned, where: str) -> TensorInfo:
    kind = next(number for number, (name, _, _) in TYPES.items() if name == "F32")
    data = bytearray() if planned.value is None else bytearray(planned.value.numpy().tobytes())
    return TensorInfo(planned.name, kind, planned.shape, Path(where), data, 0, len(data))


def _same(one: Any, two: Any) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (one, two))
    return math.isclose(one, two, rel_tol=1e-5) if numbers else one == two or not (one or two)
