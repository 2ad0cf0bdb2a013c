"""Host side of the paged-attention kernels: launches, torch operators, and when they are used.

    bitsmith::paged_attention    attention of a packed batch over one layer's cache -> [T, H, Dv]
    bitsmith::kv_store           keys and values of a packed batch into one layer's cache, in place

Nothing here reads a tensor's values: what a launch must know on the host is in shapes and in Batch.num_decode, so a
step synchronizes nowhere and a decode step of a fixed batch can be captured in a CUDA graph. A mixed batch is two
launches, decode rows and prefill chunks, since their tiles differ. An operator takes no functions, so a codec is
named by the module that defines its `DEVICE` (a kv_device.KVDevice).

Keys are split over programs where there are too few tiles to fill the GPU twice (paged_tiles.py). With
TRITON_INTERPRET=1 all of this runs on CPU tensors, which is how it is tested. Left out: a tile between those of decode
and prefill, for the few rows a sequence that speculative decoding checks.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from . import ops
from . import paged_attention as kernels
from .attention import Parts
from .cases import Case, Target, Weight
from .cuda import power_of_two
from .kv_device import KVDevice
from .lang import EXACT, HAVE_TRITON, interpreted
from .paged_tiles import Gpu, Heads, Tile, gpu, splits, tile
from .paths import forced

log = logging.getLogger(__name__)

# Of the output, in a program of `combine`.
_COMBINE_DIMS = 128
# Numbers that a program of `store` encodes, 8 a thread.
_STORE_NUMBERS = 1024


@cache
def device_functions(codec: str) -> KVDevice:
    """`DEVICE` of the module of that name."""
    found: KVDevice = import_module(codec).DEVICE
    return found


@cache
def _plan(heads: Heads, itemsize: int, decode: bool, device: torch.device) -> tuple[Tile, dict[str, Any]]:
    """The tile of a launch, and the constexprs and options that follow from it."""
    how = tile(heads, itemsize, decode, gpu(device))
    return how, {"DECODE": decode, **heads.constants, **how._asdict(), **EXACT}


class _Layer(NamedTuple):
    """What the two launches of a batch share."""

    q: Tensor
    cache_k: Parts
    cache_v: Parts
    out: Tensor
    cu_q: Tensor
    context_len: Tensor
    block_table: Tensor
    sinks: Tensor | None
    codec: str
    block_size: int
    scale: float
    window: int | None
    softcap: float | None

    def attend(self, first: int, seqs: int, rows: int, decode: bool) -> None:
        """Sequences first ... first + seqs - 1, which own the packed rows first ... first + rows - 1."""
        q, table, kv_heads = self.q, self.block_table, self.cache_k[0].shape[1]
        heads = Heads(q.shape[1] // kv_heads, q.shape[2], self.out.shape[2])
        how, constants = _plan(heads, q.element_size(), decode, q.device)
        tiles = seqs * -(-heads.group // how.BM) if decode else rows * heads.group // how.BM + seqs
        split = splits(tiles * kv_heads, self._steps(heads, how), gpu(q.device).processors)
        out, lse = self.out, None
        if split > 1:
            out = torch.empty(split, rows, *out.shape[1:], dtype=torch.float32, device=q.device)
            lse = torch.empty(split, rows, q.shape[1], dtype=torch.float32, device=q.device)
        kernels.attend[(tiles, kv_heads, split)](
            q, self.cache_k, self.cache_v, out, lse, self.sinks, self.cu_q, self.context_len, table,
            first, seqs, rows, q.stride(0), q.stride(1), table.stride(0), self.scale,
            CODEC=device_functions(self.codec), BLOCK_SIZE=self.block_size, WINDOW=self.window, SOFTCAP=self.softcap,
            SPLIT=split > 1, **constants,
        )  # fmt: skip
        if split > 1:
            self._combine(out, lse, first)

    def _steps(self, heads: Heads, how: Tile) -> int:
        """Tiles of keys of the longest context the block table has room for."""
        keys = self.block_table.shape[1] * self.block_size
        if self.window is not None:
            keys = min(keys, self.window + how.BM // heads.group)
        return -(-keys // how.BN)

    def _combine(self, partial: Tensor, lse: Tensor | None, first: int) -> None:
        split, rows, heads, dim = partial.shape
        width = min(_COMBINE_DIMS, power_of_two(dim))
        kernels.combine[(rows, heads, -(-dim // width))](
            partial, lse, self.out, first, split, DV=dim, BS=power_of_two(split), BD=width, num_warps=4, **EXACT
        )


def _paged_attention(
    q: Tensor,
    cache_k: Sequence[Tensor],
    cache_v: Sequence[Tensor],
    cu_q: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_decode: int,
    block_size: int,
    value_dim: int,
    codec: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(*q.shape[:2], value_dim, dtype=q.dtype, device=q.device)
    layer = _Layer(
        q, tuple(cache_k), tuple(cache_v), out, cu_q, context_len, block_table, sinks, codec,
        block_size, scale, window, softcap,
    )  # fmt: skip
    seqs = context_len.shape[0]
    if num_decode:
        layer.attend(0, num_decode, num_decode, True)
    if num_decode < seqs:
        layer.attend(num_decode, seqs - num_decode, q.shape[0] - num_decode, False)
    return out


def _paged_attention_fake(
    q: Tensor, cache_k: Any, cache_v: Any, cu_q: Any, context_len: Any, block_table: Any, num_decode: Any,
    block_size: int, value_dim: int, codec: str, scale: float, window: Any, softcap: Any, sinks: Any,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], value_dim)


def _kv_store(
    key: Tensor, value: Tensor, slots: Tensor, parts_k: Sequence[Tensor], parts_v: Sequence[Tensor], codec: str
) -> None:
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    tokens, heads, dim = key.shape
    if not tokens:
        return
    widths = power_of_two(dim), power_of_two(value.shape[2])
    vectors = max(1, _STORE_NUMBERS // max(widths))
    kernels.store[(-(-tokens * heads // vectors),)](
        key, value, slots, tuple(parts_k), tuple(parts_v), tokens, *key.stride()[:2], *value.stride()[:2],
        CODEC=device_functions(codec), HEADS=heads, D=dim, DV=value.shape[2], WD=widths[0], WV=widths[1], BR=vectors,
        num_warps=4, **EXACT,
    )  # fmt: skip


def _kv_store_fake(key: Tensor, value: Tensor, slots: Tensor, parts_k: Any, parts_v: Any, codec: str) -> None:
    return None


# Arguments as of attention.paged_attention; q's last stride may be any but 1 costs a copy, codec is a module's name.
paged_attention = ops.define(
    "paged_attention(Tensor q, Tensor[] cache_k, Tensor[] cache_v, Tensor cu_q, Tensor context_len, "
    "Tensor block_table, SymInt num_decode, int block_size, SymInt value_dim, str codec, float scale, "
    "int? window, float? softcap, Tensor? sinks) -> Tensor",
    _paged_attention,
    _paged_attention_fake,
)
# Encodes key [T, heads, D] and value [T, heads, Dv] into slots int64 [T] of the parts, in one launch.
kv_store = ops.define(
    "kv_store(Tensor key, Tensor value, Tensor slots, Tensor(a!)[] parts_k, Tensor(b!)[] parts_v, str codec) -> ()",
    _kv_store,
    _kv_store_fake,
)


def use_kernels(device: torch.device, name: str, codec: str) -> bool:
    """Whether kernels run the attention over a cache of codec `name` on `device`; else torch does, logged once where
    that is slow.

    codec: module of its device functions, "" if it has none. UserError for an unknown BITSMITH_KERNELS, and where it
    asks for kernels that cannot run.
    """
    path = forced()
    if path in ("reference", "cpu") or (device.type != "cuda" and path != "triton"):
        return False
    problem = _problem(device, name, codec)
    if not problem:
        return True
    if path == "triton":
        raise UserError(f"BITSMITH_KERNELS is 'triton' but {problem}; or unset it")
    _say(f"{problem}; attention runs in torch, which is slower")
    return False


def _problem(device: torch.device, name: str, codec: str) -> str:
    if not codec:
        return f"the KV codec {name!r} has no device functions: choose another kv_cache_dtype"
    if not HAVE_TRITON:
        return "triton is not installed: pip install 'bitsmith[triton]' (Linux)"
    if device.type != "cuda":
        return "" if interpreted() else f"the KV cache is on {device}: set TRITON_INTERPRET=1 (slow, for debugging)"
    if (capability := gpu(device).capability) < 60:
        return f"the kernels need sm_60 or newer and {device} is sm_{capability}"
    return ""


@cache
def _say(message: str) -> None:
    log.warning(message)


# The last two are those of latent attention: as heads, and as the latent vectors themselves.
AOT_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128), (576, 512))
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """What no codec has a part in: the merge of a split."""
    del weights
    arguments = {"partial": "*fp32", "lse": "*fp32", "out": f"*{target.dtype}", "first": "i32", "splits": "i32"}
    constants = {"DV": 128, "BS": 16, "BD": _COMBINE_DIMS}
    options = {"num_warps": 4, **EXACT}
    yield Case("kv_combine", 1, "d128", "attention", kernels.combine, arguments, constants, options, target.dtype)


def codec_cases(name: str, codec: str, dtypes: Sequence[torch.dtype], target: Target) -> Iterator[Case]:
    """One codec's attention (decode rows with a split, prefill without, and once the other way round; 4 query heads per
    KV head) and store.

    dtypes: of the codec's parts.
    """
    parts = tuple(_POINTERS[dtype] for dtype in dtypes)
    for dims in AOT_DIMS:
        for decode in (True, False):
            yield _attend_case(f"kv.{name}.d{dims[0]}", parts, codec, Heads(4, *dims), decode, decode, target)
    heads, masks = Heads(4, 128, 128), (4096, 50.0, True)
    for decode in (True, False):
        spec = f"kv.{name}.d128." + ("whole" if decode else "split")
        yield _attend_case(spec, parts, codec, heads, decode, not decode, target)
        spec = f"kv.{name}.d128.window.softcap.sinks"
        yield _attend_case(spec, parts, codec, heads, decode, decode, target, *masks)
    for key_dim, value_dim in ((128, 128), (576, 512)):
        yield _store_case(f"kv.{name}.d{key_dim}", parts, codec, key_dim, value_dim, target)


def _store_case(spec: str, parts: tuple[str, ...], codec: str, key_dim: int, value_dim: int, target: Target) -> Case:
    widths = power_of_two(key_dim), power_of_two(value_dim)
    arguments = {
        **dict.fromkeys(("key", "value"), f"*{target.dtype}"),
        "slots": "*i64",
        "parts_k": parts,
        "parts_v": parts,
        **dict.fromkeys(("tokens", "stride_key", "stride_key_head", "stride_value", "stride_value_head"), "i32"),
    }
    constants = {
        "CODEC": device_functions(codec), "HEADS": 8, "D": key_dim, "DV": value_dim, "WD": widths[0], "WV": widths[1],
        "BR": max(1, _STORE_NUMBERS // max(widths)),
    }  # fmt: skip
    options = {"num_warps": 4, **EXACT}
    return Case("kv_store", 1, spec, "attention", kernels.store, arguments, constants, options, target.dtype)


def _attend_case(
    spec: str, parts: tuple[str, ...], codec: str, heads: Heads, decode: bool, split: bool, target: Target,
    window: int | None = None, softcap: float | None = None, sinks: bool = False,
) -> Case:  # fmt: skip
    how = tile(heads, 2, decode, Gpu(target.capability, 108, target.amd))
    arguments = {
        "q": f"*{target.dtype}",
        "parts_k": parts,
        "parts_v": parts,
        "out": "*fp32" if split else f"*{target.dtype}",
        "lse": "*fp32" if split else None,
        "sinks": f"*{target.dtype}" if sinks else None,
        **dict.fromkeys(("cu_q", "context_len", "block_table"), "*i32"),
        **dict.fromkeys(("first", "seqs", "rows", "stride_row", "stride_head", "stride_table"), "i32"),
        "scale": "fp32",
    }
    constants = {
        "CODEC": device_functions(codec), "BLOCK_SIZE": 16, "WINDOW": window, "SOFTCAP": softcap,
        "DECODE": decode, "SPLIT": split, **heads.constants, "BM": how.BM, "BN": how.BN,
    }  # fmt: skip
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages, **EXACT}
    kernel, rows = ("attend_decode", 1) if decode else ("attend_prefill", 512)
    return Case(kernel, rows, spec, "attention", kernels.attend, arguments, constants, options, target.dtype)
