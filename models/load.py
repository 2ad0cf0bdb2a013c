"""Load any checkpoint, quantized or not, into transformers' own modelling code.

The model is built on the meta device (no memory), its non-persistent buffers are computed, then each weight is read,
placed (models/names.py) and either assigned or turned into a quantized module. Whatever is left without a weight is an
error: a model is never returned with random numbers in it.
"""

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import UserError
from ..kernels.dispatch import Reference, check_act, prepare
from ..kernels.int8_copy import check as check_copy
from ..kernels.paths import forced
from ..kernels.qtensor import QTensor, concat
from .checkpoint import AnyCheckpoint, open_checkpoint, read_ahead, resolve
from .embedding import can_quantize, quantize_embedding, read_table, share_tied
from .fused import fuse
from .gguf_config import Metadata
from .gguf_file import read_gguf
from .gguf_tokenizer import build_tokenizer
from .linear import (
    EXPERTS,
    QuantLinear,
    is_experts,
    is_linear,
    prepack_linears,
    prepare_linears,
    set_expert_weight,
)
from .names import Placement, placements

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking all of torch and transformers meanwhile: 0.2 seconds a time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@_no_collection()
def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    exact: bool = False,
    act: str = "",
    int8_copy: bool = False,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A transformers model in eval mode whose quantized weights stay quantized; `model(input_ids).logits` works.

    `dtype` is that of activations and unquantized weights; None takes float32 on the CPU (where logits then equal the
    producing library's up to float rounding) and the checkpoint's own on a GPU. `exact=True` forces the reference
    path: every weight is dequantized in float32 and rounded once to `dtype`, and activations are never rounded, not
    even where the checkpoint says so. `act="a8"` asks for 8-bit activations where a weight has one scale a row, "a4"
    for FP4 ones where it is NVFP4 (kernels/activation.py). `int8_copy=True` keeps an int8 copy of each quantized weight
    for products of many rows (bfloat16 on a CPU with AVX-512; kernels/int8_copy.py): faster prefill and batches for a
    byte a weight.

    Raises UserError for a checkpoint that is missing, damaged, of an unknown format, or incomplete, for `act` beside
    `exact=True`, and for an int8 copy that nothing would use.
    """
    check_act(act, exact)
    path = resolve(path)
    # A GGUF file begins with what is read first. Headers of several files would wait for all before them.
    begun = [path] if path.is_file() else []
    read_ahead(begun)
    ckpt = open_checkpoint(path)
    read_ahead(file for file in ckpt.files if file not in begun)
    device = torch.device(device)
    wanted = pick_dtype(ckpt, device, dtype)
    if int8_copy:
        check_copy(device, wanted, exact)
    model = build(ckpt, wanted, attn_implementation)
    loader = _Loader(model, ckpt, device, wanted, exact, act, int8_copy)
    loader.fill()
    if model.config.get_text_config().tie_word_embeddings:
        share_tied(model)
    read_table(model)
    if not exact:
        _specialize(model, device, wanted)
    model.eval()
    return model


def _specialize(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Put the small steps of this machine in, as far as BITSMITH_KERNELS allows: under `reference` what runs is
    transformers' code, weight by weight."""
    path = forced()
    if path == "reference":
        return
    native = device.type == "cpu" and dtype is torch.bfloat16
    if native and path != "triton":
        prepack_linears(model)
    if native or device.type != "cpu" or path == "triton":
        fuse(model, device)


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer. UserError naming what is missing where it has none."""
    directory = resolve(path)
    if directory.suffix == ".gguf":
        return build_tokenizer(Metadata(read_gguf(directory)))
    if not any(
        (directory / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(
            f"{directory} holds no tokenizer.json. Fix: copy the tokenizer files of the model it was made from into it"
        )
    return AutoTokenizer.from_pretrained(directory)


def pick_dtype(ckpt: AnyCheckpoint, device: torch.device, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype asked for; else float32 on the CPU, the checkpoint's on a GPU (float16 for bfloat16 where the GPU has
    none).
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        if dtype not in _DTYPES:
            raise UserError(f"dtype {dtype!r} is not known; accepted: {', '.join(_DTYPES)}, auto")
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    found = _DTYPES.get(str(ckpt.config.get("dtype", ckpt.config.get("torch_dtype"))), torch.float16)
    if found is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        _LOG.warning("this GPU has no bfloat16: the model runs in float16 with float32 accumulation")
        return torch.float16
    return found


def serving_dtype(path: str | Path, device: str | torch.device) -> torch.dtype | None:
    """What to serve in where nobody says: bfloat16 for a quantized checkpoint on the CPU, whose fast products are in
    it (float32 dequantizes every weight at every step); None, load_model's own choice, otherwise."""
    quantized = open_checkpoint(path).recipe is not None
    return torch.bfloat16 if quantized and torch.device(device).type == "cpu" else None


def build(ckpt: AnyCheckpoint, dtype: torch.dtype, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The model with every parameter on the meta device and its non-persistent buffers (rotary frequencies ...)
    computed. Where it has no "sdpa" (soft caps, sinks), its attention is "eager".
    """
    config = ckpt.pretrained_config()
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if attn_implementation == "sdpa" and not getattr(kind, "_supports_sdpa", True):
        attn_implementation = "eager"
    with torch.device("meta"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, dtype=dtype
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{ckpt.config_file}: model_type {config.model_type!r} is no causal language model of "
                f"transformers ({error})"
            ) from error
    _compute_buffers(model)
    generation = ckpt.generation_config()
    if generation is not None:
        model.generation_config = generation
    return model


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Must run before weights are loaded: `_init_weights` would overwrite them (seen with gemma's embeddings)."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        owners[parent] = model.get_submodule(parent)
        # Some buffers are filled by the enclosing model's branch of _init_weights (falcon_h1's mup_vector).
        while parent:
            parent = parent.rpartition(".")[0]
            module = model.get_submodule(parent)
            if isinstance(module, PreTrainedModel):
                owners.setdefault(parent, module)
    for module in owners.values():
        model._init_weights(module)


class _Loader:
    """Fills one meta model from one checkpoint, one weight in memory at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        ckpt: AnyCheckpoint,
        device: torch.device,
        dtype: torch.dtype,
        exact: bool,
        act: str,
        copy: bool,
    ) -> None:
        self.model, self.ckpt, self.device, self.dtype = model, ckpt, device, dtype
        self.exact, self.act, self.copy = exact, act, copy
        # Whether weights may stay in the blocks of the file until they are packed.
        self.in_place = device.type == "cpu" and dtype is torch.bfloat16 and not exact

    def fill(self) -> None:
        # Layer by layer, as files are written: one is packed while the disk reads the next. The head may be in the last
        # file, and the last layer's norms behind all others.
        plan = placements(self.model, self.ckpt.weights)
        plan.sort(key=lambda p: (not self._quantized(p), not _layer(p.target)))
        unexpected: list[str] = []
        for (quantized, layer), group in groupby(plan, lambda p: (self._quantized(p), _layer(p.target))):
            refused = [p for p in group if not self._place(p)]
            unexpected += [source for placement in refused for source in placement.sources]
            if quantized and not self.exact and not refused:
                prepare_linears(self.model.get_submodule(layer), self.dtype, self.act, self.copy)
        self._refuse_unexpected(unexpected)
        tie(self.model)
        if any("quantized_experts" in m.__dict__ for m in self.model.modules()):
            self.model.set_experts_implementation(EXPERTS)
        refuse_meta(self.model, str(self.ckpt.path))
        self.model.to(self.device)  # type: ignore[arg-type]

    def _quantized(self, placement: Placement) -> bool:
        return any(self.ckpt.weights[s] for s in placement.sources)

    def _place(self, placement: Placement) -> bool:
        if not self._quantized(placement):
            tensors = [self.ckpt(s) for s in placement.sources]
            return all(assign(self.model, n, t) for n, t in placement.convert(tensors, self.model).items())
        module, leaf = owner(self.model, placement.target)
        if module is None:
            return False
        if placement.converter is None and is_linear(module):
            self._linear(placement.target.removesuffix(".weight"), module, placement.sources[0])
            return True
        if placement.converter is None and isinstance(module, nn.Embedding) and leaf == "weight":
            q = self._qtensor(placement.sources[0], (module.num_embeddings, module.embedding_dim))
            if can_quantize(module, q):
                quantize_embedding(module, q, self.dtype)
                return True
        if (
            is_experts(module)
            and all(self.ckpt.weights[s] for s in placement.sources)
            and placement.stack
            and not module.is_transposed
        ):
            self._experts(module, leaf, placement.stack)
            return True
        _LOG.info("%s is quantized but no plain linear: it is dequantized", placement.target)
        shapes = source_shapes(self.model, placement)
        tensors = [self.ckpt.dense(s, shapes[s]) for s in placement.sources]
        return all(assign(self.model, n, t) for n, t in placement.convert(tensors, self.model).items())

    def _qtensor(self, source: str, shape: tuple[int, int]) -> QTensor:
        q = self.ckpt.qtensor(source, shape)
        return q if self.in_place else q.to(self.device)

    def _linear(self, path: str, old: nn.Module, source: str) -> None:
        shape = (old.out_features, old.in_features)
        q = self._qtensor(source, shape)  # type: ignore[arg-type]
        # Siblings are stacked before anything is packed: see prepare_linears.
        matmul = prepare(q, self.dtype, exact=True) if self.exact else Reference(q)
        # The bias is its own checkpoint tensor: it is assigned (perhaps later) to the parameter made here.
        new = QuantLinear(matmul, shape, old.bias, self.dtype)  # type: ignore[arg-type]
        self.model.set_submodule(path, new)

    def _experts(self, module: nn.Module, leaf: str, stack: list[list[str]]) -> None:
        parameter: Tensor = module._parameters[leaf]  # type: ignore[assignment]
        matmuls = []
        for sources in stack:
            shape = (parameter.shape[1] // len(sources), parameter.shape[2])
            joined = concat([self._qtensor(s, shape) for s in sources])
            matmuls.append(prepare(joined, self.dtype, exact=self.exact, act=self.act, copy=self.copy))
        set_expert_weight(module, leaf, matmuls)

    def _refuse_unexpected(self, names: list[str]) -> None:
        ignore = self.model._keys_to_ignore_on_load_unexpected or []
        # Rotary tables that old checkpoints carry; computed here.
        known = [*ignore, r"rotary_emb\.inv_freq$", r"attn\.masked_bias$", r"attn\.bias$"]
        names = [n for n in names if not any(re.search(p, n) for p in known)]
        if names:
            raise UserError(
                f"{self.ckpt.path}: {len(names)} tensors have no place in a {self.model.config.model_type} "
                "model, the first being "
                f"{', '.join(names[:3])}. Nothing was loaded. Fix: config.json must describe this checkpoint "
                f"(a quantized one needs the quantization_config it was written with)"
            )


def _layer(target: str) -> str:
    """Path of the layer that a model tensor is in: up to the first number, "" if there is none."""
    found = re.match(r"(.*?\.\d+)\.", target)
    return found[1] if found else ""


def owner(model: nn.Module, target: str) -> tuple[nn.Module | None, str]:
    """The module that holds `target` (a parameter or buffer name) and the leaf name; None where there is no such
    module.
    """
    path, _, leaf = target.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None, leaf
    return (module if leaf in module._parameters or leaf in module._buffers else None), leaf


def assign(model: nn.Module, target: str, tensor: Tensor) -> bool:
    """Put a dense tensor in its place, cast to the dtype the model was built with; False where there is no such place.

    Raises UserError on a wrong shape, and on packed integers where numbers belong.
    """
    module, leaf = owner(model, target)
    if module is None:
        return False
    old = module._parameters.get(leaf, module._buffers.get(leaf))
    assert old is not None
    if tensor.shape != old.shape:
        raise UserError(
            f"tensor {target} has shape {tuple(tensor.shape)}, the model needs {tuple(old.shape)}. "
            f"Fix: config.json must describe this checkpoint"
        )
    if old.dtype.is_floating_point and (not tensor.dtype.is_floating_point or tensor.element_size() == 1):
        raise UserError(
            f"tensor {target} has dtype {tensor.dtype}, which is packed or quantized data, where the model needs "
            f"{old.dtype}. "
            "Fix: config.json lacks the quantization_config this was written with, or bitsmith does not read "
            "that format yet"
        )
    value = tensor.to(old.dtype).contiguous()
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
    return True


def source_shapes(model: nn.Module, placement: Placement) -> dict[str, tuple[int, int]]:
    """Shape [out_features, in_features] of each quantized source of a placement."""
    module, leaf = owner(model, placement.target)
    assert module is not None
    parameter = module._parameters[leaf]
    assert parameter is not None
    if placement.converter is None:
        return {placement.sources[0]: (parameter.shape[0], parameter.shape[1])}
    stack = placement.stack
    if stack is None:
        raise UserError(
            f"{placement.target} is built from {placement.sources[0]} by a conversion that quantized weights do "
            "not fit "
            f"({', '.join(type(o).__name__ for o in placement.converter.operations)}). Fix: leave these modules "
            "unquantized (--skip)"
        )
    rows = parameter.shape[1] // len(stack[0])
    return {source: (rows, parameter.shape[2]) for expert in stack for source in expert}


def tie(model: PreTrainedModel) -> None:
    """Share tied parameters: whichever of the two the checkpoint held serves both; a quantized one stays apart."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [owner(model, name) for name in (target, source)]
        held = [m._parameters.get(leaf) if m is not None else None for m, leaf in pair]
        for (module, leaf), mine, other in zip(pair, held, reversed(held), strict=True):
            if module is not None and mine is not None and mine.is_meta and other is not None and not other.is_meta:
                module._parameters[leaf] = other


def refuse_meta(model: nn.Module, where: str) -> None:
    """UserError listing the parameters that got no value."""
    state = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in state if tensor is not None and tensor.is_meta]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} tensors the model needs are missing, the first being {', '.join(missing[:3])}. "
            f"Nothing was loaded. Fix: fetch the checkpoint again, or check that config.json belongs to it"
        )
