"""The torch paged attention against attention written out sequence by sequence."""

import math
from dataclasses import dataclass

import pytest
import torch
from bitsmith.kernels import attention
from bitsmith.kernels.attention import paged_attention
from torch import Tensor

HEADS, KV_HEADS, BLOCK, BLOCKS = 6, 2, 4, 64


@dataclass(frozen=True)
class Case:
    """Sequences over shuffled blocks of a cache that holds NaN elsewhere; decode rows first."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    cache_k: Tensor
    cache_v: Tensor
    cu_q: Tensor
    context_len: Tensor
    block_table: Tensor
    num_decode: int

    def run(self, **options: object) -> Tensor:
        fields = {name: getattr(self, name) for name in ("cu_q", "context_len", "block_table", "num_decode")}
        options = {"scale": 0.3, "decode": lambda parts: parts[0], "block_size": BLOCK, **options}
        return paged_attention(self.q, (self.cache_k,), (self.cache_v,), **fields, **options)


def make_case(lengths: list[tuple[int, int]], dtype: torch.dtype, dim: int = 16, value_dim: int = 16) -> Case:
    cache_k = torch.full((BLOCKS * BLOCK, KV_HEADS, dim), math.nan, dtype=dtype)
    cache_v = torch.full((BLOCKS * BLOCK, KV_HEADS, value_dim), math.nan, dtype=dtype)
    free = torch.randperm(BLOCKS).tolist()
    width = max(math.ceil(total / BLOCK) for total, _ in lengths)
    # Entries past a sequence's blocks are never read, so they may be anything.
    table = torch.full((len(lengths), width), 10**6, dtype=torch.int32)
    k, v = [], []
    for row, (total, _) in enumerate(lengths):
        blocks = torch.tensor([free.pop() for _ in range(math.ceil(total / BLOCK))])
        table[row, : len(blocks)] = blocks
        slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:total]
        k.append(torch.randn(total, KV_HEADS, dim).to(dtype))
        v.append(torch.randn(total, KV_HEADS, value_dim).to(dtype))
        cache_k[slots], cache_v[slots] = k[-1], v[-1]
    counts = [queries for _, queries in lengths]
    q = torch.randn(sum(counts), HEADS, dim).to(dtype)
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    decode = next((row for row, count in enumerate(counts) if count > 1), len(counts))
    return Case(q, k, v, cache_k, cache_v, cu_q, torch.tensor([n for n, _ in lengths]).int(), table, decode)


def expected(case: Case, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    rows = []
    for row, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        q = case.q[case.cu_q[row] : case.cu_q[row + 1]].double()
        k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))
        hidden = (key > position) | (key <= position - window if window else False)
        scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.double().exp().view(-1, 1, 1)
        rows.append(torch.einsum("hqk,khd->qhd", weights / total, v))
    return torch.cat(rows)


LENGTHS = {
    "decode": [(1, 1), (5, 1), (33, 1), (8, 1)],
    "decode-equal": [(9, 1), (9, 1)],
    "decode-very-uneven": [(3, 1), (100, 1), (4, 1)],
    "prefill": [(13, 13)],
    "chunk": [(21, 6)],
    "mixed": [(7, 1), (12, 1), (30, 30), (19, 5), (2, 2)],
    "one-token-prompt": [(1, 1)],
}
OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 2.0, "sinks": True},
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_written_out_attention(lengths: list[tuple[int, int]], options: dict, dtype: torch.dtype) -> None:
    case = make_case(lengths, dtype)
    options = {**options, "sinks": torch.randn(HEADS) if "sinks" in options else None}
    got = case.run(**options)
    want = expected(case, options.get("window"), options.get("softcap"), options["sinks"])
    assert got.dtype == dtype and got.shape == want.shape
    # NaN anywhere outside the sequences' own slots would show up here.
    assert (got.double() - want).norm() / want.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["sdpa", "softmax"])
def test_value_heads_may_be_narrower(options: dict) -> None:
    case = make_case(LENGTHS["mixed"], torch.float32, dim=24, value_dim=10)
    want = expected(case, None, options.get("softcap"), None)
    assert (case.run(**options).double() - want).norm() / want.norm() < 2e-6


def test_prefill_in_query_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(LENGTHS["mixed"], torch.float32)
    whole = case.run(window=5)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    assert torch.allclose(case.run(window=5), whole, atol=1e-6)


def test_uneven_decode_rows_are_not_padded_to_the_longest() -> None:
    case = make_case([(3, 1), (4, 1), (200, 1)], torch.float32)
    groups = attention.group_rows(case.cu_q, case.context_len, case.block_table, 3, BLOCK, None)
    assert [tuple(group.slots.shape) for group in groups] == [(2, 4), (1, 200)]


def test_a_window_bounds_what_is_gathered() -> None:
    case = make_case([(90, 1), (80, 1), (64, 32)], torch.float32)
    groups = attention.group_rows(case.cu_q, case.context_len, case.block_table, 2, BLOCK, 8)
    assert [tuple(group.slots.shape) for group in groups] == [(2, 8), (1, 39)]


def test_layers_share_indices_per_window() -> None:
    case = make_case(LENGTHS["mixed"], torch.float32)
    memo: dict = {}
    first = case.run(memo=memo)
    assert set(memo) == {(None, 0)}
    groups = memo[None, 0]
    assert torch.equal(case.run(memo=memo), first) and memo[None, 0] is groups
    case.run(memo=memo, window=5)
    assert set(memo) == {(None, 0), (5, 0)}
