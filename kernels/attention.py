"""Paged attention in plain torch: the CPU path, and the oracle for the Triton kernels.

The cache of one layer is a tuple of parts per K and per V (one tensor for plain values, codes + scales for a
quantized codec), each `[slots, heads, width]`; block b owns slots b * block_size ... A sequence finds its keys
through its row of the block table.

Rows of the packed batch are cut into groups that share one gather and one attention call: decode rows of similar
length together (the query heads of one KV head become the query rows; `enable_gqa` is 14 times slower on CPU),
prefill chunks in pieces of QUERY_CHUNK queries. A gather repeats a sequence's own first key where rows are padded, so
whatever other slots hold, NaN included, cannot reach the result. Copying K and V costs half of the attention of decode
rows, and torch computes what the mask hides: over bfloat16 and int8 caches decode rows, and with AVX-512 chunks, take
the native library's walk of the block table where it is installed.

Measured on one Zen 5 thread, bf16, 32/4 heads of 64, 8 sequences of 1024: gather 0.29 ms, SDPA 0.92 ms, matmul +
softmax 3.7 ms.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native_layer

Parts = tuple[Tensor, ...]

# Bounds the mask to QUERY_CHUNK * context booleans and a gather's share of the work to under 1 %.
QUERY_CHUNK = 256


class KVShape(NamedTuple):
    """What one layer stores per token:

    `heads` key vectors of `key_dim` numbers and as many value vectors of `value_dim`.
    """

    heads: int
    key_dim: int
    value_dim: int


class Group(NamedTuple):
    """`batch` sequences with `queries` rows each, rows `start` to `start + batch * queries` of the packed q."""

    start: int
    batch: int
    queries: int
    slots: Tensor  # [batch, S] int64: the cache slots to gather
    mask: Tensor | None  # [batch, 1, queries, S] bool, True where visible; None if everything is


# Groups by window and the sequences before them.
Memo = dict[tuple[int | None, int], list[Group]]


def store(parts: Parts, x: Tensor, slots: Tensor, encode: Callable[[Tensor], Parts]) -> None:
    """Encode `x[T, heads, dim]` and write it to `slots[T]` (int64) of every cache part, in place."""
    for part, encoded in zip(parts, encode(x), strict=True):
        if native_layer.scatters(part, encoded, slots):
            native_layer.scatter(part, encoded, slots)
        else:
            part.index_copy_(0, slots, encoded)


def paged_attention(
    q: Tensor,
    cache_k: Parts,
    cache_v: Parts,
    *,
    cu_q: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_decode: int,
    block_size: int,
    decode: Callable[[Parts], Tensor],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    memo: Memo | None = None,
) -> Tensor:
    """Causal attention of the packed queries over the paged cache -> `[T, H, Dv]` in q's dtype.

    q `[T, H, D]`; cache parts `[slots, Hkv, ...]`, the batch's own keys already stored; cu_q `[B + 1]`; context_len
    `[B]` counts cached tokens including this batch's; block_table `[B, P]`; the first `num_decode` sequences have one
    query each; `decode` turns gathered parts `[N, Hkv, ...]` into `[N, Hkv, D]` of q's dtype; `window` hides key k
    from query q unless k > q - window; `softcap` c replaces a score s by c * tanh(s / c); `sinks` `[H]` adds one more
    logit per head whose value is zero. `memo` is a dict that lives as long as the batch does and shares gather
    indices and masks between layers.
    """
    memo = {} if memo is None else memo
    pieces: list[Tensor] = []
    grouped = 0
    if native(q, cache_k, cache_v):
        more = (block_size, scale, window, softcap, None if sinks is None else sinks.float())
        pieces, grouped = _by_library(q, cache_k, cache_v, cu_q, context_len, block_table, num_decode, more)
    groups: list[Group] = []
    if grouped < len(context_len):
        if (window, grouped) not in memo:
            memo[window, grouped] = group_rows(cu_q, context_len, block_table, num_decode, block_size, window, grouped)
        groups = memo[window, grouped]
    for group in groups:
        stop = group.start + group.batch * group.queries
        flat = group.slots.reshape(-1)
        k = decode(tuple(part.index_select(0, flat) for part in cache_k)).unflatten(0, group.slots.shape)
        v = decode(tuple(part.index_select(0, flat) for part in cache_v)).unflatten(0, group.slots.shape)
        rows = q[group.start : stop].unflatten(0, (group.batch, group.queries))
        pieces.append(_attend(rows, k, v, group.mask, scale, softcap, sinks).flatten(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def native(q: Tensor, cache_k: Parts, cache_v: Parts) -> bool:
    """Whether the native library takes them: bfloat16 queries on the CPU, keys and values that it `reads`."""
    dims = q.shape[-1], cache_v[0].shape[-1]
    return native_layer.usable(q) and all(map(native_layer.reads, (cache_k, cache_v), dims))


def _by_library(
    q: Tensor,
    k: Parts,
    v: Parts,
    cu_q: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_decode: int,
    more: tuple[int, float, int | None, float | None, Tensor | None],
) -> tuple[list[Tensor], int]:
    """The first rows' results, as far as the library computes them, and how many sequences those are: decode rows, and
    chunks on a machine for which it has them."""
    dense = q if q.stride(1) == q.shape[2] else q.contiguous()
    pieces = []
    if num_decode:
        table, lengths = block_table[:num_decode], context_len[:num_decode]
        pieces.append(native_layer.attend(dense[:num_decode], k, v, table, lengths, *more))
    if num_decode == q.shape[0] or not native_layer.takes_chunks(k[0].shape[2], v[0].shape[2]):
        return pieces, num_decode
    starts = cu_q.tolist()
    for row in range(num_decode, len(starts) - 1):
        own, at = slice(starts[row], starts[row + 1]), slice(row, row + 1)
        pieces.append(native_layer.attend_chunk(dense[own], k, v, block_table[at], context_len[at], *more))
    return pieces, len(starts) - 1


def group_rows(
    cu_q: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    num_decode: int,
    block_size: int,
    window: int | None,
    first: int = 0,
) -> list[Group]:
    """Cut the packed rows from sequence `first` on (one decode row each before it) into groups; see the module
    docstring. Arguments as in `paged_attention`."""
    starts, lengths = cu_q.tolist(), context_len.tolist()
    groups = []
    while first < num_decode:
        # Padding to twice the shortest row at most: one long sequence must not make thirty short ones pay for its
        # length.
        stop = first + 1
        shortest = longest = lengths[first]
        while stop < num_decode:
            shortest, longest = min(shortest, lengths[stop]), max(longest, lengths[stop])
            if longest > 2 * shortest + 64:
                break
            stop += 1
        groups.append(_decode_group(starts[first], lengths[first:stop], block_table[first:stop], block_size, window))
        first = stop
    for row in range(num_decode, len(lengths)):
        past = lengths[row] - (starts[row + 1] - starts[row])
        for start in range(starts[row], starts[row + 1], QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, starts[row + 1])
            low, high = past + start - starts[row], past + stop - starts[row]
            groups.append(_prefill_group(start, low, high, block_table[row : row + 1], block_size, window))
    return groups


def _slots(positions: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    return block_table.long().gather(1, positions // block_size) * block_size + positions % block_size


def _decode_group(start: int, lengths: list[int], block_table: Tensor, block_size: int, window: int | None) -> Group:
    """One query per sequence, at position length - 1; its keys backwards: column j is position length - 1 - j."""
    width = max(lengths) if window is None else min(max(lengths), window)
    last = torch.tensor(lengths, device=block_table.device).unsqueeze(1) - 1
    positions = last - torch.arange(width, device=block_table.device)
    mask = (positions >= 0).view(len(lengths), 1, 1, width) if min(lengths) < width else None
    return Group(start, len(lengths), 1, _slots(positions.clamp_min(0), block_table, block_size), mask)


def _prefill_group(start: int, low: int, high: int, block_table: Tensor, block_size: int, window: int | None) -> Group:
    """Queries at positions low ... high - 1 of one sequence."""
    first_key = 0 if window is None else max(0, low - window + 1)
    keys = torch.arange(first_key, high, device=block_table.device)
    queries = torch.arange(low, high, device=block_table.device).unsqueeze(1)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    slots = _slots(keys.unsqueeze(0), block_table, block_size)
    return Group(start, 1, high - low, slots, mask.view(1, 1, high - low, -1) if high - low > 1 else None)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q `[B, n, H, D]`, k `[B, S, Hkv, D]`, v `[B, S, Hkv, Dv]`, mask `[B, 1, n, S]` -> `[B, n, H, Dv]`.

    B or n is 1.
    """
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    if queries == 1:
        # [B, Hkv, G, D]: the G query heads of a KV head are its query rows.
        q, k, v = q.view(batch, kv_heads, group, -1), k.transpose(1, 2), v.transpose(1, 2)
    else:
        # [Hkv, G, n, D]: batch 1, so KV heads take its place and K is expanded over G without a copy.
        q = q[0].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        k, v = (x[0].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        per_row = None if sinks is None else sinks.float().view(kv_heads, group, 1)
        if per_row is not None and queries > 1:
            per_row = per_row.unsqueeze(2)
        out = _softmax_attention(q, k, v, mask, scale, softcap, per_row)
    if queries == 1:
        return out.reshape(batch, 1, heads, -1)
    return out.permute(2, 0, 1, 3).reshape(1, queries, heads, -1)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """What SDPA cannot do: soft-capped scores and sinks.

    Scores and softmax in float32; `sinks` broadcasts to `[..., rows, 1]`.
    """
    scores = (q.float() @ k.float().transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ v.float()).to(q.dtype)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
