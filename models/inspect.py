"""What a checkpoint holds, without building the model: format, spec of every tensor, bytes, memory to serve it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .checkpoint import AnyCheckpoint, open_checkpoint
from .load import build, source_shapes
from .names import placements


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Keys: format, bpw (over the quantized weights; over all where none is), weight_bytes (resident), file_bytes,
    parameters, kv_bytes_per_token (at two bytes a number), tensors {name: spec, or dtype and shape of an unquantized
    tensor}.

    Every quantized weight is read, since its contents and not the config decide its spec.
    """
    ckpt = open_checkpoint(path)
    model = build(ckpt, torch.float16)
    tensors: dict[str, str] = {}
    resident = parameters = quantized_bytes = quantized_weights = 0
    for source, shape in weights(model, ckpt):
        if shape is not None:
            q = ckpt.qtensor(source, shape)
            tensors[source], count, size = str(q.spec), q.shape[0] * q.shape[1], q.nbytes
            quantized_bytes, quantized_weights = quantized_bytes + size, quantized_weights + count
        else:
            tensor = ckpt(source)
            tensors[source] = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            count, size = tensor.numel(), tensor.nbytes
        resident, parameters = resident + size, parameters + count
    all_bits = 8 * resident / max(parameters, 1)
    return {
        "format": ckpt.recipe.format if ckpt.recipe else "unquantized",
        "bpw": round(8 * quantized_bytes / quantized_weights, 4) if quantized_weights else round(all_bits, 4),
        "weight_bytes": resident,
        "file_bytes": sum(f.stat().st_size for f in ckpt.files),
        "parameters": parameters,
        "kv_bytes_per_token": _kv_bytes(model.config.get_text_config()),
        "tensors": dict(sorted(tensors.items())),
    }


def weights(model: PreTrainedModel, ckpt: AnyCheckpoint) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """(checkpoint name, [out_features, in_features] of a quantized weight, None for another) of every weight."""
    for placement in placements(model, ckpt.weights):
        shapes = source_shapes(model, placement) if any(ckpt.weights[s] for s in placement.sources) else {}
        for source in placement.sources:
            yield source, shapes[source] if ckpt.weights[source] else None


def _kv_bytes(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * dim)
