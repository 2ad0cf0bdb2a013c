"""The hook that turns a transformers model into a paged one: attention reads and writes the engine's KV cache.

`make_paged(model, max_model_len)` is all a caller needs: it refuses what cannot work, switches the attention
implementation, freezes rotary embeddings whose frequencies would depend on the other sequences of a batch, narrows the
last layer's MLP to the rows whose logits are wanted, and runs one warm-up forward that must call the attention function
exactly once per layer. A model that ignores the interface
(bloom) would otherwise produce garbage in silence.

No mask function is registered under our name, so transformers builds no mask at all; causality, sliding windows, soft
caps and sinks are honoured here, and a keyword argument that is neither known nor neutral is an error. Left out:
models with chunked attention (llama4), recurrent state (mamba and hybrids) or attention of their own (falcon, bloom,
mpt, gptj). Each needs code of its own; all are refused.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UserError
from ..kernels import paged
from ..kernels.attention import KVShape, paged_attention
from .batch import Step, WarmUp, current_step, paged_step, running

ATTENTION = "bitsmith_paged"

# Arguments that say nothing the batch does not know: positions are already in the keys, nothing here caches or trains.
_IRRELEVANT = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal"})


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query `[1, H, T, D]`, key and value `[1, Hkv, T, D or Dv]` -> `[1, T, H, Dv]`.

    Raises UserError on an argument whose effect would be lost.
    """
    _refuse_unknown(module, {"attention_mask": attention_mask, **kwargs})
    step = current_step()
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(step, WarmUp):
        step.calls.append((layer, KVShape(key.shape[1], key.shape[3], value.shape[3])))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    batch = step.batch
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    step.cache.store(layer, k, v, batch.slots)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(step, layer, q, v.shape[-1], scale, sliding_window, softcap, s_aux).unsqueeze(0), None


def attend(
    step: Step,
    layer: int,
    q: Tensor,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q `[T, H, D]` over the layer's cache, which holds the batch's own keys and values already -> `[T, H, Dv]`."""
    batch, cache = step.batch, step.cache
    if cache.kernels:
        attended: Tensor = paged.paged_attention(
            q, *cache.parts(layer), batch.cu_q, batch.context_len, batch.block_table, batch.num_decode,
            cache.block_size, value_dim, cache.kernels, scale, window, softcap, sinks,
        )  # fmt: skip
        return attended
    cache_k, cache_v = cache.parts(layer)
    return paged_attention(
        q,
        cache_k,
        cache_v,
        cu_q=batch.cu_q,
        context_len=batch.context_len,
        block_table=batch.block_table,
        num_decode=batch.num_decode,
        block_size=cache.block_size,
        decode=cache.decode,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        memo=step.memo,
    )


AttentionInterface.register(ATTENTION, paged_forward)


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _IRRELEVANT or value is None or (isinstance(value, bool | int | float) and not value):
            continue
        raise UserError(
            f"{type(module).__name__} passes {name}={_short(value)} to its attention function, which paged attention "
            f"does not implement; serve another model, or teach bitsmith.models.attention what {name} means"
        )


def _short(value: object) -> str:
    return f"<tensor {list(value.shape)}>" if isinstance(value, Tensor) else repr(value)


def make_paged(model: PreTrainedModel, max_model_len: int, warm_up_tokens: int = 2) -> dict[int, KVShape]:
    """Prepare `model` in place for paged steps of sequences up to `max_model_len` tokens -> what each layer caches.

    `warm_up_tokens` is the length of the one forward this runs. UserError names the model_type and the reason where
    this model cannot be served.
    """
    check_supported(model)
    # transformers validates the name against its interface and passes it to every sub-config.
    model.set_attn_implementation(ATTENTION)
    model.eval()
    freeze_rope(model, max_model_len)
    narrow_last_mlp(model)
    return warm_up(model, warm_up_tokens)


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by what breaks, models whose attention or state the hook would miss without any error."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        reason = f"it has layers of type {', '.join(sorted(kinds))}"
    elif getattr(model, "_is_stateful", False):
        reason = "its layers keep a recurrent state"
    elif not model._can_set_attn_implementation():
        reason = "its attention does not go through transformers' AttentionInterface"
    else:
        return
    raise UserError(
        f"model_type {config.model_type!r} cannot be served: {reason}. Served are models whose every layer is full or "
        "sliding-window attention through AttentionInterface; use a plain forward (load_model, eval) for this one"
    )


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Fix the frequencies of `longrope` and `dynamic` rotary embeddings to those of `max_model_len` tokens.

    transformers chooses them in each forward from the largest position of the whole batch, so one long request would
    change the others, and keys already cached would no longer fit. Naming the type "default" afterwards keeps that
    update from running.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if kind in ("longrope", "dynamic")]:
                _freeze(module, kinds[layer_type], max_model_len, f"{layer_type}_", {"layer_type": layer_type})
                kinds[layer_type] = "default"
        elif kinds in ("longrope", "dynamic"):
            _freeze(module, kinds, max_model_len, "", {})
            module.rope_type = "default"  # type: ignore[assignment]


def _freeze(module: nn.Module, kind: str, max_model_len: int, prefix: str, kwargs: dict[str, str]) -> None:
    buffer = getattr(module, f"{prefix}inv_freq")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, buffer.device, seq_len=max_model_len, **kwargs)
    buffer.copy_(inv_freq)
    setattr(module, f"{prefix}attention_scaling", scaling)


def narrow_last_mlp(model: PreTrainedModel) -> None:
    """Let the last layer's MLP compute only rows whose logits are wanted: nobody reads the others.

    Of a prompt that is its last token: of 512 tokens of a 1.1 B Llama 3.5 % of the multiplications are gone (llama.cpp
    does the same). A decoder without `layers`, or a layer without `mlp`, stays as it is.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is not None:
        mlp.forward = partial(_of_last_rows, mlp.forward)


def _of_last_rows(forward: Callable[[Tensor], Any], x: Tensor) -> Any:
    """x `[1, T, W]` -> what `forward` gives, zeros in rows that are not among the step's last ones."""
    step = paged_step()
    if step is None or x.shape[:2] != (1, len(step.batch.ids)) or len(step.batch.last) == x.shape[1]:
        return forward(x)
    found = forward(x[:, step.batch.last])
    # Experts give their scores too.
    rows, *others = found if isinstance(found, tuple) else (found,)
    wide = x.new_zeros(*x.shape[:2], rows.shape[-1]).index_copy_(1, step.batch.last, rows)
    return (wide, *others) if isinstance(found, tuple) else wide


@torch.inference_mode()
def warm_up(model: PreTrainedModel, tokens: int = 2) -> dict[int, KVShape]:
    """One forward of `tokens` tokens -> KVShape per layer index.

    UserError unless attention was called once for each layer, and logits came back for the one row asked for.
    """
    config = model.config.get_text_config()
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    record = WarmUp()
    with running(record):
        positions = torch.arange(tokens, device=ids.device).unsqueeze(0)
        last = positions[0, -1:]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last).logits
    calls = Counter(layer for layer, _ in record.calls)
    if calls != Counter(range(config.num_hidden_layers)):
        raise UserError(
            f"model_type {config.model_type!r} cannot be served: of its {config.num_hidden_layers} layers "
            f"{len(calls)} called the paged attention function ({sum(calls.values())} calls in one forward, one per "
            "layer expected), so attention would not see the KV cache; use a plain forward (load_model, eval) for it"
        )
    if logits.shape[1] != 1:
        raise UserError(
            f"model_type {config.model_type!r} cannot be served: it ignores logits_to_keep ({logits.shape[1]} rows of "
            "logits, 1 asked for); use a plain forward (load_model, eval) for it"
        )
    return dict(sorted(record.calls))
