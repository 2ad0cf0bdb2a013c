"""The native CPU library's small steps (cpp/layer.h): norm, rotary embedding, gated activation, Hadamard transform
(cpp/rotate.h), decode attention (cpp/attend.h), prefill attention (cpp/chunk512.h) and the residual's sum, in bfloat16
with float32 inside; and rows copied to and from their places.

One call each where torch needs four to twenty operators, which at one token a step is what the time goes to. The
operators of kernels/fused.py take them where `usable`; their torch twins are the oracle. Each function here gives the
call that fills `y`, to be made while its tensors live: once, or again and again (recording.py).
"""

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import native, ops
from .paths import native_allowed

# Numbers of a key or a value at most: DIM of cpp/attend.h.
LARGEST_DIM = 512


class _Attention(ctypes.Structure):
    """`Attention` of cpp/attend.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "k_scales", "v_scales", "out", "table", "context", "sinks")
        ),
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
    lib.bitsmith_attend_chunk.argtypes = [p, number]
    lib.bitsmith_chunk_taken.argtypes = [size, size]
    lib.bitsmith_add.argtypes = [p, p, p, size, number]
    lib.bitsmith_scatter.argtypes = [p, size, p, p, size, size, size]
    lib.bitsmith_gather.argtypes = [p, size, size, p, p, size, size]
    lib.bitsmith_rotate.argtypes = [p, size, size, size, p, number, number, p, number]
    for name in ("norm", "gated", "rope", "attend", "attend_chunk", "add", "scatter", "gather", "rotate"):
        getattr(lib, f"bitsmith_{name}").restype = None
    return lib


def _functions() -> ctypes.CDLL:
    lib = _library()
    assert lib is not None
    return lib


def usable(*tensors: Tensor) -> bool:
    """Whether the library is there and wanted, and all of `tensors` are what it takes: bfloat16 on the CPU, rows
    contiguous."""
    return native_allowed() and _library() is not None and not any(map(_strange, tensors))


def _strange(t: Tensor) -> bool:
    return t.dtype is not torch.bfloat16 or t.stride(-1) != 1 or not t.is_cpu


def norm(y: Tensor, rows: Tensor, weight: Tensor, eps: float, form: int) -> ops.Call:
    """rows [A, B, W], weight [W], both `usable`; form: its place in fused.FORMS -> y of as many numbers, contiguous."""
    return partial(
        _functions().bitsmith_norm, rows.data_ptr(), weight.data_ptr(), y.data_ptr(), rows.shape[0] * rows.shape[1],
        rows.shape[2], rows.shape[1], rows.stride(0), rows.stride(1), eps, form, torch.get_num_threads(),
    )  # fmt: skip


def gated(y: Tensor, gate: Tensor, up: Tensor, act: int) -> ops.Call:
    """gate and up [M, W], both `usable`; act: its place in fused.ACTS -> y of as many numbers, contiguous."""
    return partial(
        _functions().bitsmith_gated, gate.data_ptr(), up.data_ptr(), y.data_ptr(), *gate.shape, gate.stride(0),
        up.stride(0), act, torch.get_num_threads(),
    )  # fmt: skip


def rotate(y: Tensor, x: Tensor, vector: Tensor | None, block: int, first: bool) -> ops.Call:
    """transform.rotate: x [M, K], contiguous and `usable` -> y [M, K padded to whole blocks], contiguous."""
    address, dtype = (None, 0) if vector is None else (vector.data_ptr(), native.DTYPES[vector.dtype])
    return partial(
        _functions().bitsmith_rotate, x.data_ptr(), *x.shape, block, address, dtype, first, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def turn(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> ops.Call:
    """Rotary embedding of one of q and k: x [T, H, D], `usable`; cos and sin [T, R], contiguous -> y [T, H, D]."""
    return partial(
        _functions().bitsmith_rope, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *x.shape, cos.shape[1],
        x.stride(0), x.stride(1), interleaved, torch.get_num_threads(),
    )  # fmt: skip


def _add_call(results: Sequence[Tensor], a: Tensor, b: object, alpha: float = 1) -> ops.Call | None:
    """torch's own sum as a call of the library; None where it is another one than that of a residual."""
    y = results[0]
    if not isinstance(b, Tensor) or a.shape != b.shape or alpha != 1 or not usable(a, b, y):
        return None
    if not all(t.is_contiguous() for t in (a, b, y)):
        return None
    return partial(
        _functions().bitsmith_add, a.data_ptr(), b.data_ptr(), y.data_ptr(), y.numel(), torch.get_num_threads()
    )


# Modules add their residuals themselves. On two threads torch's sum of 32 rows of 2048 took 0.5 ms: its threads and the
# library's want the same cores.
ops.BINDS[torch.ops.aten.add.Tensor] = _add_call


def _rows_call(results: Sequence[Tensor], x: Tensor, dim: int, rows: Tensor) -> ops.Call | None:
    """torch's own index_select of rows of x as a call of the library; None where it is another one."""
    y = results[0]
    if dim or not native_allowed() or _library() is None or not x.is_cpu or rows.dtype is not torch.int64:
        return None
    if not (x[:1].is_contiguous() and y.is_contiguous() and rows.is_contiguous()):
        return None
    return partial(
        _functions().bitsmith_gather, x.data_ptr(), x.stride(0) * x.element_size(), x.shape[0], rows.data_ptr(),
        y.data_ptr(), rows.shape[0], y.stride(0) * y.element_size(),
    )  # fmt: skip


def _index_call(results: Sequence[Tensor], x: Tensor, indices: Sequence[Tensor | None]) -> ops.Call | None:
    """x[:, rows] of x [1, T, ...], as models take the rows whose logits are wanted."""
    rows = indices[-1]
    if len(indices) != 2 or indices[0] is not None or rows is None or rows.dim() != 1 or x.shape[0] != 1:
        return None
    return _rows_call([results[0][0]], x[0], 0, rows)


def _embedding_call(results: Sequence[Tensor], table: Tensor, ids: Tensor, *_: object) -> ops.Call | None:
    """torch's own embedding; what else it is told is about gradients."""
    y = results[0]
    if not ids.is_contiguous() or not y.is_contiguous():
        return None
    return _rows_call([y.view(-1, y.shape[-1])], table, 0, ids.view(-1))


# torch's took 80 to 200 us of one row of 2048, 370 of 32: its threads were asleep.
ops.BINDS[torch.ops.aten.embedding.default] = _embedding_call
ops.BINDS[torch.ops.aten.index_select.default] = _rows_call
ops.BINDS[torch.ops.aten.index.Tensor] = _index_call


def scatters(part: Tensor, x: Tensor, slots: Tensor) -> bool:
    """Whether `scatter` takes them: on the CPU, one dtype, rows dense, slots int64."""
    return (
        native_allowed()
        and _library() is not None
        and part.is_cpu
        and part.dtype is x.dtype
        and part[:1].is_contiguous()
        and x[:1].is_contiguous()
        and slots.dtype is torch.int64
        and slots.is_contiguous()
    )


def _scatter_call(part: Tensor, x: Tensor, slots: Tensor) -> ops.Call:
    row = part[0].numel() * part.element_size()
    return partial(
        _functions().bitsmith_scatter, x.data_ptr(), x.stride(0) * x.element_size(), slots.data_ptr(), part.data_ptr(),
        part.stride(0) * part.element_size(), x.shape[0], row,
    )  # fmt: skip


# part [slots, ...], x [T, ...] of its dtype, slots int64 [T], each below part's first dimension; `scatters` them: row t
# of x becomes row slots[t] of part.
scatter = ops.define(
    "native_scatter(Tensor(a!) part, Tensor x, Tensor slots) -> ()",
    lambda part, x, slots: _scatter_call(part, x, slots)(),
    lambda part, x, slots: None,
    lambda results, part, x, slots: _scatter_call(part, x, slots),
)


def reads(parts: Sequence[Tensor], dim: int) -> bool:
    """Whether these are keys or values of `dim` numbers as the library reads them: bfloat16 [slots, Hkv, dim], or int8
    codes and a bfloat16 scale [slots, Hkv, 1] for each vector, value = code * scale rounded to bfloat16."""
    if (
        dim > LARGEST_DIM
        or parts[0].shape[-1] != dim
        or not all(part.is_cpu and part.is_contiguous() for part in parts)
    ):
        return False
    dtypes = [part.dtype for part in parts]
    return dtypes == [torch.bfloat16] or (dtypes == [torch.int8, torch.bfloat16] and parts[1].shape[-1] == 1)


def _attention(
    out: Tensor, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], block_table: Tensor, context_len: Tensor,
    block_size: int, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Any:  # fmt: skip
    """What both kinds of attention take."""
    (codes_k, *scales_k), (codes_v, *scales_v) = k, v
    what = _Attention(
        q=q.data_ptr(), k=codes_k.data_ptr(), v=codes_v.data_ptr(),
        k_scales=scales_k[0].data_ptr() if scales_k else None, v_scales=scales_v[0].data_ptr() if scales_v else None,
        out=out.data_ptr(), table=block_table.data_ptr(),
        context=context_len.data_ptr(), sinks=None if sinks is None else sinks.data_ptr(), rows=q.shape[0],
        heads=q.shape[1], kv_heads=codes_k.shape[1], key_dim=codes_k.shape[2], value_dim=codes_v.shape[2],
        pages=block_table.shape[1], block_size=block_size, window=window or 0, q_stride=q.stride(0), scale=scale,
        softcap=softcap or 0.0,
    )  # fmt: skip
    return ctypes.byref(what)


def _attend_call(
    out: Tensor, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], block_table: Tensor, context_len: Tensor,
    block_size: int, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, plain: bool = False,
) -> ops.Call:  # fmt: skip
    what = _attention(out, q, k, v, block_table, context_len, block_size, scale, window, softcap, sinks)
    return partial(_functions().bitsmith_attend, what, torch.get_num_threads(), plain)


def _attend(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], *more: Any, **options: Any) -> Tensor:
    out = torch.empty(q.shape[0], q.shape[1], v[0].shape[2], dtype=q.dtype)
    _attend_call(out, q, k, v, *more, **options)()
    return out


def _attend_fake(q: Tensor, k: Any, v: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v[0].shape[2])


# Decode rows: q [B, H, D], `usable` and heads dense; parts of the caches that it `reads`; int32 [B, P] and [B],
# contiguous, at least one token each; sinks float32 [H] -> [B, H, Dv]. plain: the loops of any processor, for tests.
attend = ops.define(
    "native_attend(Tensor q, Tensor[] k, Tensor[] v, Tensor block_table, Tensor context_len, int block_size, "
    "float scale, int? window, float? softcap, Tensor? sinks, bool plain=False) -> Tensor",
    _attend,
    _attend_fake,
    lambda results, *arguments, **options: _attend_call(results[0], *arguments, **options),
)


def takes_chunks(key_dim: int, value_dim: int) -> bool:
    """Whether `attend_chunk` takes heads of these sizes, of up to LARGEST_DIM, on this machine. With AMX torch's own
    attention has the tiles, and the library has none for it."""
    return native.best_path() == "avx512" and bool(_functions().bitsmith_chunk_taken(key_dim, value_dim))


def _attend_chunk(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], *more: Any) -> Tensor:
    out = torch.empty(q.shape[0], q.shape[1], v[0].shape[2], dtype=q.dtype)
    _functions().bitsmith_attend_chunk(_attention(out, q, k, v, *more), torch.get_num_threads())
    return out


# The last q.shape[0] tokens of one sequence; otherwise as `attend`: block_table int32 [1, P], context_len int32 [1].
attend_chunk = ops.define(
    "native_attend_chunk(Tensor q, Tensor[] k, Tensor[] v, Tensor block_table, Tensor context_len, int block_size, "
    "float scale, int? window, float? softcap, Tensor? sinks) -> Tensor",
    _attend_chunk,
    _attend_fake,
)
