# mypy: allow-untyped-defs
"""Attention over the paged cache, one template for decode rows and prefill chunks; kernels/attention.py is its twin.

  q            float16 | bfloat16 | float32 [T, H, D], any strides but the last, which is 1
  parts_k, _v  tuples of pointers, arrays [slots * Hkv, ...] whose meaning only CODEC (kv_device.KVDevice) knows
  cu_q         int32 [B + 1], context_len int32 [B], block_table int32 [B, P] with a row stride
  sinks        any float [H] or None
  out          q's dtype [T, H, DV], contiguous; with SPLIT float32 [S, rows, H, DV], and lse float32 [S, rows, H]

The rows of a tile are (query, head) pairs of one sequence and one KV head, query by query: K and V are read once for
all query heads that share them, and a decode row is a chunk of one query. Key tiles are gathered through the block
table, so any block size runs. D = D0 + D1 where D1 is 0 for a power of two (80 = 64 + 16, 576 = 512 + 64): `tl.arange`
knows powers of two only, and padding 576 to 1024 would not fit in shared memory; DV likewise.

The softmax is online (https://arxiv.org/abs/1805.02867), in float32 and base 2. Few tiles split their keys over
programs and `combine` merges the parts by their log-sum-exp (Flash-Decoding), in the order of the split: no atomics,
a run repeats bit for bit. Left out: a second loop without masks for tiles far from the diagonal.
"""

from .lang import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
# Sequences looked at together in search of a tile's own.
_SEARCH = tl.constexpr(128)


@jit
def _owner(cu_q, first, seqs, tile, G: tl.constexpr, BM: tl.constexpr):
    """(sequence, tile within it) of a tile number.

    Sequence i has floor(rows before it * G / BM) + i tiles before it: at most one too many each, and no table.
    """
    found = 0
    for i in range(0, seqs, _SEARCH):
        index = i + tl.arange(0, _SEARCH)
        before = (tl.load(cu_q + first + index, mask=index < seqs, other=0) - first) * G // BM + index
        found += tl.sum(((before <= tile) & (index < seqs)).to(tl.int32), 0)
    seq = first + found - 1
    return seq, tile - ((tl.load(cu_q + seq) - first) * G // BM + found - 1)


@jit
def _load_q(q, live, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    d = START + tl.arange(0, WIDTH)
    return tl.load(q[:, None] + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0)


@jit
def _store_out(out, x, live, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    d = START + tl.arange(0, WIDTH)
    mask = live[:, None] & (d < DIM)[None, :]
    tl.store(out[:, None] + d[None, :], x.to(out.dtype.element_ty), mask=mask)


@jit
def _finite(x):
    """-inf becomes 0, so that subtracting it from -inf is no NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@jit
def _tanh(x):
    """1 - 2 / (e**2x + 1): no overflow at either end, 1e-7 off."""
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@jit
def _keys(
    past, length, tile, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr
):
    """First and past-the-last key that a tile's rows see, of this program's share."""
    low = 0
    if WINDOW is not None:
        low = tl.maximum(past + tile * BM // G - WINDOW + 1, 0)
    high = tl.minimum(past + (tile * BM + BM - 1) // G + 1, length)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, BN), tl.num_programs(2)) * BN
        low += tl.program_id(2) * share
        high = tl.minimum(low + share, high)
    return low, high


@jit
def _start(sinks, head, live, BM: tl.constexpr):
    """Largest logit [BM] and sum of weights [BM] before any key."""
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    # One more key, of value 0, in the first share alone. Its presence is known when compiling, the share is not.
    if sinks is not None:  # noqa: SIM102
        if tl.program_id(2) == 0:
            m = tl.load(sinks + head, mask=live, other=0).to(tl.float32) * LOG2E
            l = tl.full((BM,), 1, tl.float32)  # noqa: E741
    return m, l


@jit
def _logits(s, key, inside, position, scale, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products [BM, BN] -> logits in base 2, -inf where hidden."""
    if SOFTCAP is not None:
        s = _tanh(s * (scale / SOFTCAP)) * (SOFTCAP * LOG2E)
    else:
        s *= scale * LOG2E
    visible = inside[None, :] & (key[None, :] <= position[:, None])
    if WINDOW is not None:
        visible &= key[None, :] > position[:, None] - WINDOW
    return tl.where(visible, s, float("-inf"))


@jit(do_not_specialize=["first", "seqs", "rows", "stride_table"])
def attend(
    q, parts_k, parts_v, out, lse, sinks, cu_q, context_len, block_table,
    first, seqs, rows, stride_row, stride_head, stride_table, scale,
    CODEC: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sequences first ... first + seqs - 1, which own packed rows first ... first + rows - 1: the sequences before
    have one row each. Grid (tiles, Hkv, S); tiles is seqs * ceil(G / BM) with DECODE, where each has one row, else
    rows * G // BM + seqs. WINDOW and SOFTCAP may be None.
    """
    if DECODE:
        seq = first + tl.program_id(0) // ((G + BM - 1) // BM)
        tile = tl.program_id(0) % ((G + BM - 1) // BM)
    else:
        seq, tile = _owner(cu_q, first, seqs, tl.program_id(0), G, BM)
    row = tl.load(cu_q + seq)
    count = tl.load(cu_q + seq + 1) - row
    if tile * BM >= count * G:
        return
    length = tl.load(context_len + seq)
    past = length - count
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    r = tile * BM + tl.arange(0, BM)
    live = r < count * G
    head = kv_head * G + r % G
    position = past + r // G

    low, high = _keys(past, length, tile, G, BM, BN, WINDOW, SPLIT)
    m, l = _start(sinks, head, live, BM)  # noqa: E741
    rows_q = q + (row + r // G).to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    q0 = _load_q(rows_q, live, 0, D0, D)
    if D1:
        q1 = _load_q(rows_q, live, D0, D1, D)
    acc0 = tl.zeros((BM, V0), tl.float32)
    if V1:
        acc1 = tl.zeros((BM, V1), tl.float32)

    table = block_table + seq.to(tl.int64) * stride_table
    for start in range(low, high, BN):
        key = start + tl.arange(0, BN)
        inside = key < high
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = (block * BLOCK_SIZE + key % BLOCK_SIZE) * kv_heads + kv_head
        s = tl.dot(q0, tl.trans(CODEC[0](parts_k, at, inside, 0, D0, D).to(q0.dtype)), input_precision="ieee")
        if D1:
            k1 = tl.trans(CODEC[0](parts_k, at, inside, D0, D1, D).to(q0.dtype))
            s = tl.dot(q1, k1, s, input_precision="ieee")
        s = _logits(s, key, inside, position, scale, WINDOW, SOFTCAP)
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - _finite(top)[:, None])
        fade = tl.exp2(m - _finite(top))
        l = l * fade + tl.sum(p, 1)  # noqa: E741
        m = top
        p = p.to(q0.dtype)
        v0 = CODEC[0](parts_v, at, inside, 0, V0, DV).to(q0.dtype)
        acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision="ieee")
        if V1:
            v1 = CODEC[0](parts_v, at, inside, V0, V1, DV).to(q0.dtype)
            acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision="ieee")

    # No visible key (a padded row, an empty share): l is 0 and the row is 0.
    total = tl.where(l == 0, 1.0, l)
    line = (row + r // G).to(tl.int64)
    if SPLIT:
        line += tl.program_id(2).to(tl.int64) * rows - first
        tl.store(lse + line * (kv_heads * G) + head, m + tl.log2(l), mask=live)
    rows_out = out + (line * (kv_heads * G) + head) * DV
    _store_out(rows_out, acc0 / total[:, None], live, 0, V0, DV)
    if V1:
        _store_out(rows_out, acc1 / total[:, None], live, V0, V1, DV)


@jit(do_not_specialize=["first", "splits"])
def combine(
    partial, lse, out, first, splits, DV: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Rows first ... of out [T, H, DV] from partial float32 [splits, rows, H, DV] and lse [splits, rows, H].

    Grid (rows, H, ceil(DV / BD)); splits <= BS. A share without keys has lse -inf and weight 0.
    """
    rows, heads = tl.num_programs(0), tl.num_programs(1)
    s = tl.arange(0, BS)
    line = (s.to(tl.int64) * rows + tl.program_id(0)) * heads + tl.program_id(1)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    sums = tl.load(lse + line, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(sums - _finite(tl.max(sums, 0)))
    total = tl.sum(weight, 0)
    x = tl.load(partial + line[:, None] * DV + d[None, :], mask=(s < splits)[:, None] & (d < DV)[None, :], other=0)
    y = tl.sum(x * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    line = (first + tl.program_id(0)).to(tl.int64) * heads + tl.program_id(1)
    tl.store(out + line * DV + d, y.to(out.dtype.element_ty), mask=d < DV)


@jit(do_not_specialize=["tokens"])
def store(
    key, value, slots, parts_k, parts_v, tokens,
    stride_key, stride_key_head, stride_value, stride_value_head,
    CODEC: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WD: tl.constexpr, WV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """key [tokens, HEADS, D] and value [tokens, HEADS, DV] -> the cache parts at slots int64 [tokens].

    WD and WV are the powers of two from D and DV on. Grid (ceil(tokens * HEADS / BR),), BR vectors a program.
    """
    index = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = index < tokens * HEADS
    token, head = (index // HEADS).to(tl.int64), (index % HEADS).to(tl.int64)
    at = tl.load(slots + token, mask=inside, other=0) * HEADS + head
    x = _load_q(key + token * stride_key + head * stride_key_head, inside, 0, WD, D)
    CODEC[1](x, parts_k, at, inside, D, WD)
    x = _load_q(value + token * stride_value + head * stride_value_head, inside, 0, WV, DV)
    CODEC[1](x, parts_v, at, inside, DV, WV)
