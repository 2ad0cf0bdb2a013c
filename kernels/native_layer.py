"""The native CPU library's small steps (cpp/layer.h): norm, rotary embedding, gated activation and decode attention,
in bfloat16 with float32 inside.

One call each where torch needs four to twenty operators, which at one token a step is what the time goes to. The
operators of kernels/fused.py take them where `usable`; their torch twins are the oracle.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native, ops

LARGEST_KEY_DIM = 256


class _Attention(ctypes.Structure):
    """`Attention` of cpp/layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "table", "context", "sinks")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "key_dim", "value_dim", "pages")),
        *((name, ctypes.c_int64) for name in ("block_size", "window", "q_stride")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    lib = native.library()
    if lib is None:
        return None
    p, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    lib.bitsmith_norm.argtypes = [p, p, p, size, size, size, size, size, real, number, number]
    lib.bitsmith_gated.argtypes = [p, p, p, size, size, size, size, number, number]
    lib.bitsmith_rope.argtypes = [p, p, p, p, size, size, size, size, size, size, number, number]
    lib.bitsmith_attend.argtypes = [p, number, number]
    for name in ("norm", "gated", "rope", "attend"):
        getattr(lib, f"bitsmith_{name}").restype = None
    return lib


def usable(*tensors: Tensor) -> bool:
    """Whether the library is there and all of `tensors` are what it takes: bfloat16 on the CPU, rows contiguous."""
    return _library() is not None and not any(map(_strange, tensors))


def _strange(t: Tensor) -> bool:
    return t.dtype is not torch.bfloat16 or t.stride(-1) != 1 or not t.is_cpu


def norm(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    """x [.., W], weight [W], both `usable`; form: its place in fused.FORMS -> x's shape, contiguous."""
    lib = _library()
    assert lib is not None
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = _matrix(x)
    lib.bitsmith_norm(
        rows.data_ptr(), weight.data_ptr(), y.data_ptr(), rows.shape[0] * rows.shape[1], x.shape[-1], rows.shape[1],
        rows.stride(0), rows.stride(1), eps, form, torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """gate and up [.., W], both `usable`; act: its place in fused.ACTS -> [.., W], contiguous."""
    lib = _library()
    assert lib is not None
    y = torch.empty(gate.shape, dtype=gate.dtype)
    a, b = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    lib.bitsmith_gated(
        a.data_ptr(), b.data_ptr(), y.data_ptr(), *a.shape, a.stride(0), b.stride(0), act, torch.get_num_threads()
    )
    return y


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of one of q and k: x [T, H, D], `usable`; cos and sin [T, R], contiguous."""
    lib = _library()
    assert lib is not None
    y = torch.empty(x.shape, dtype=x.dtype)
    lib.bitsmith_rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *x.shape, cos.shape[1], x.stride(0), x.stride(1),
        interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _matrix(x: Tensor) -> Tensor:
    """[A, B, W] of a tensor of any dimensions: a view where the leading ones can be merged."""
    return x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, context_len: Tensor, block_size: int, scale: float,
    window: int | None, softcap: float | None, sinks: Tensor | None, plain: bool = False,
) -> Tensor:  # fmt: skip
    lib = _library()
    assert lib is not None
    rows, heads, _ = q.shape
    out = torch.empty(rows, heads, v.shape[2], dtype=q.dtype)
    what = _Attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), table=block_table.data_ptr(),
        context=context_len.data_ptr(), sinks=None if sinks is None else sinks.data_ptr(), rows=rows, heads=heads,
        kv_heads=k.shape[1], key_dim=k.shape[2], value_dim=v.shape[2], pages=block_table.shape[1],
        block_size=block_size, window=window or 0, q_stride=q.stride(0), scale=scale, softcap=softcap or 0.0,
    )  # fmt: skip
    lib.bitsmith_attend(ctypes.byref(what), torch.get_num_threads(), plain)
    return out


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


# Decode rows: q [B, H, D], heads dense; caches [slots, Hkv, D or Dv]; int32 [B, P] and [B], contiguous; sinks float32
# [H] -> [B, H, Dv]. D at most LARGEST_KEY_DIM. plain: the loops of any processor, for tests.
attend = ops.define(
    "native_attend(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor context_len, int block_size, float scale, "
    "int? window, float? softcap, Tensor? sinks, bool plain=False) -> Tensor",
    _attend,
    _attend_fake,
)
