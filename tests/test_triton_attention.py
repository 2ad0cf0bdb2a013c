"""Paged-attention kernels without a device: tiles, splits, dispatch, operators. Interpreted: triton_interpreted_attention.py."""

import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import aot, attention, paged
from bitsmith.kernels.attention import KVShape
from bitsmith.kernels.paged_tiles import MAX_SPLITS, Gpu, Heads, pieces, splits, tile
from bitsmith.kv_quant.base import KVCache, codec_names, load_codec
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
# KB of shared memory a block may have, by the CUDA and ROCm documentation.
SHARED = {"sm_60": 48, "sm_70": 48, "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}
SHARED |= {"sm_120": 99, "gfx942": 64, "gfx1100": 64}
OURS = ("attend_decode", "attend_prefill", "kv_combine", "kv_store")
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not aot.HAVE_TRITON, reason="needs triton, and TRITON_INTERPRET unset"
)


@pytest.mark.parametrize("dim", [1, 16, 24, 64, 80, 96, 112, 128, 192, 256, 576])
def test_pieces_cover_a_dim_without_much_waste(dim: int) -> None:
    first, second = pieces(dim)
    assert first + second >= dim and first + second < max(17, 1.6 * dim)
    assert all(width & (width - 1) == 0 and (width >= 16 or not width) for width in (first, second))


def test_a_decode_tile_holds_the_query_heads_of_a_kv_head() -> None:
    a100, pascal = Gpu(80, 108), Gpu(60, 56)
    assert [tile(Heads(g, 128, 128), 2, True, a100).BM for g in (1, 4, 16, 17, 71, 200)] == [16, 16, 16, 32, 128, 128]
    # No tensor core, no padding.
    assert [tile(Heads(g, 128, 128), 2, True, pascal).BM for g in (1, 4, 6)] == [1, 4, 8]
    assert tile(Heads(4, 128, 128), 4, True, a100) == tile(Heads(4, 128, 128), 2, True, pascal)
    assert tile(Heads(4, 128, 128), 2, False, a100).BM == 128


def test_splits_fill_the_gpu_and_no_more() -> None:
    """programs, key tiles of the longest context, processors."""
    assert splits(8, 128, 132) == 33
    assert splits(8, 4, 132) == 2
    assert splits(8, 1, 132) == 1
    assert splits(264, 1000, 132) == 1
    assert splits(1, 10000, 132) == MAX_SPLITS


@pytest.mark.parametrize("name", codec_names())
def test_every_codec_names_its_own_device_functions(name: str) -> None:
    codec = load_codec(name, torch.float16)
    assert codec.device == f"bitsmith.kv_quant.{name}"
    assert len(paged.device_functions(codec.device)) == 2


def test_torch_runs_on_a_cpu_and_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load_codec("none", torch.float32)
    assert KVCache(codec, {0: KVShape(1, 16, 16)}, 1, 4, CPU).kernels == ""
    for path in ("reference", "cpu"):
        monkeypatch.setenv("BITSMITH_KERNELS", path)
        assert not paged.use_kernels(torch.device("cuda"), "none", codec.device)
    monkeypatch.setenv("BITSMITH_KERNELS", "turbo")
    with pytest.raises(UserError, match="BITSMITH_KERNELS is 'turbo'; accepted: reference, triton, cpu, or unset"):
        paged.use_kernels(CPU, "none", codec.device)


def test_kernels_that_cannot_run_are_refused_if_forced_and_replaced_if_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged, "interpreted", lambda: False)
    monkeypatch.setattr(paged, "HAVE_TRITON", True)
    monkeypatch.setattr(paged, "gpu", lambda device: Gpu(52, 16))
    cuda, device = torch.device("cuda", 0), "bitsmith.kv_quant.none"
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    with pytest.raises(UserError, match=r"'triton' but the KV cache is on cpu: set TRITON_INTERPRET=1 .*; or unset it"):
        paged.use_kernels(CPU, "none", device)
    with pytest.raises(UserError, match="'triton' but the KV codec 'q3' has no device functions"):
        paged.use_kernels(cuda, "q3", "")
    monkeypatch.delenv("BITSMITH_KERNELS")
    paged._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(paged.use_kernels(cuda, "none", device) for _ in range(3))
        assert not paged.use_kernels(cuda, "q3", "")
        monkeypatch.setattr(paged, "HAVE_TRITON", False)
        assert not paged.use_kernels(cuda, "none", device)
    assert [record.getMessage() for record in caplog.records] == [
        "the kernels need sm_60 or newer and cuda:0 is sm_52; attention runs in torch, which is slower",
        "the KV codec 'q3' has no device functions: choose another kv_cache_dtype; attention runs in torch, which is "
        "slower",
        "triton is not installed: pip install 'bitsmith[triton]' (Linux); attention runs in torch, which is slower",
    ]
    monkeypatch.setattr(paged, "HAVE_TRITON", True)
    monkeypatch.setattr(paged, "gpu", lambda device: Gpu(60, 56))
    assert paged.use_kernels(cuda, "none", device)


def test_fakes_have_the_shapes_of_the_real_thing() -> None:
    with FakeTensorMode():
        q = torch.empty(5, 8, 192, dtype=torch.bfloat16)
        parts = [torch.empty(16, 2, 192, dtype=torch.bfloat16)]
        ints = torch.empty(3, dtype=torch.int32)
        found = paged.paged_attention(q, parts, parts, ints, ints, ints[None], 1, 4, 128, "m", 1.0, None, None, None)
        assert found.shape == (5, 8, 128) and found.dtype == torch.bfloat16 and found.is_contiguous()
        assert paged.kv_store(q, q, ints, parts, parts, "m") is None


@needs_compiler
@pytest.mark.parametrize("target", ["sm_60", "sm_75", "sm_86", "gfx1100"])
def test_compiles_within_shared_memory(target: str) -> None:
    wanted = {"kv.none.d128", "kv.int8.d64", "d128"}
    rows = [aot.compile_case(case, target) for case in aot.cases(target) if case.kernel in OURS and case.spec in wanted]
    assert len(rows) == 6
    for row in rows:
        assert row.ok, row
        assert row.shared_bytes is not None and row.shared_bytes <= SHARED[target] << 10, row


def test_every_recorded_row_fits_its_target() -> None:
    rows = json.loads((Path(__file__).resolve().parents[1] / "results" / "aot.json").read_text())["rows"]
    assert {row["target"] for row in rows} == set(SHARED)
    assert not [row for row in rows if not row["ok"] or row["shared_bytes"] > SHARED[row["target"]] << 10]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a CUDA device and triton"
)
@pytest.mark.parametrize("features", [{}, {"window": 40, "softcap": 20.0, "sinks": True}], ids=["plain", "all"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)], ids=str)
@pytest.mark.parametrize("codec", codec_names())
def test_on_a_device(codec: str, dims: tuple[int, int], features: dict[str, Any]) -> None:
    """The torch twin on the same device, from the parts that the store kernel wrote."""
    lengths, counts, device = [3000, 17, 1, 600, 70], [1, 1, 1, 200, 70], torch.device("cuda")
    made = load_codec(codec, torch.float16)
    blocks = [-(-n // 16) for n in lengths]
    cache = KVCache(made, {0: KVShape(2, *dims)}, sum(blocks), 16, device)
    assert cache.kernels
    table = torch.zeros(5, max(blocks), dtype=torch.int32)
    order = torch.randperm(sum(blocks), dtype=torch.int32).split(blocks)
    for row, (n, own) in enumerate(zip(lengths, order, strict=True)):
        table[row, : len(own)] = own
        slots = (own.long()[:, None] * 16 + torch.arange(16)).flatten()[:n].to(device)
        key, value = (torch.randn(n, 2, dim, device=device).half() for dim in dims)
        cache.store(0, key, value, slots)
        for parts, x in zip(cache.parts(0), (key, value), strict=True):
            wanted = made.encode(x.cpu())
            assert all(torch.equal(part[slots].cpu(), w) for part, w in zip(parts, wanted, strict=True))
    q = torch.randn(sum(counts), 8, dims[0], device=device).half()
    options = {**features, "sinks": torch.randn(8, device=device)} if "sinks" in features else features
    where = {"cu_q": torch.tensor([0, *counts]).cumsum(0).int(), "context_len": torch.tensor(lengths).int()}
    where = {name: t.to(device) for name, t in {**where, "block_table": table}.items()}
    (k, v), scale = cache.parts(0), dims[0] ** -0.5
    wanted = attention.paged_attention(
        q, k, v, **where, num_decode=3, block_size=16, decode=cache.decode, scale=scale, **options
    )
    found = paged.paged_attention(
        q, k, v, *where.values(), 3, 16, dims[1], cache.kernels, scale,
        *(options.get(name) for name in ("window", "softcap", "sinks")),
    )  # fmt: skip
    assert (found.double() - wanted.double()).norm() / wanted.double().norm() < 2e-3
