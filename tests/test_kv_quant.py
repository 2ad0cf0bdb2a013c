"""KV codecs: every codec in the folder keeps the same promises, and INT8 rounds."""

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels.attention import KVShape
from bitsmith.kv_quant.base import KVCache, bytes_per_block, codec_names, load_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", codec_names())
def test_codec_contract(name: str, dtype: torch.dtype) -> None:
    codec = load_codec(name, dtype)
    x = torch.randn(5, 3, 24).to(dtype)
    parts, encoded = codec.alloc(7, 3, 24, CPU), codec.encode(x)
    assert codec.name == name and codec.dtype == dtype
    assert [part.dtype for part in parts] == [part.dtype for part in encoded]
    assert [part.shape[1:] for part in parts] == [part.shape[1:] for part in encoded]
    assert all(part.shape[0] == 7 for part in parts)
    assert sum(part.nbytes for part in parts) == 7 * codec.bytes_per_token(3, 24)
    decoded = codec.decode(encoded)
    assert decoded.shape == x.shape and decoded.dtype == dtype
    assert (decoded - x).float().norm() / x.float().norm() < 0.02


def test_auto_is_none_and_unknown_names_list_what_exists() -> None:
    assert load_codec("auto", torch.float32).name == "none"
    with pytest.raises(UserError, match=r"kv_cache_dtype 'int9' is unknown; choose one of: auto, int8, none"):
        load_codec("int9", torch.float32)
    with pytest.raises(UserError, match="'base' is unknown"):
        load_codec("base", torch.float32)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e8])
def test_int8_error_is_at_most_half_a_step(magnitude: float) -> None:
    codec = load_codec("int8", torch.float32)
    x = torch.randn(200, 2, 64) * magnitude
    step = x.abs().amax(-1, keepdim=True) / 127
    error = (codec.decode(codec.encode(x)) - x).abs() / step
    # Half a step of the stored scale, which may be 2^-8 larger than the ideal one.
    assert error.max() <= 0.5 * (1 + 2**-8)
    # Truncation would leave a mean error of half a step instead of a quarter, and a mean bias as large.
    assert error.mean() < 0.27


def test_int8_rounds_to_nearest() -> None:
    codes, scales = load_codec("int8", torch.float32).encode(torch.tensor([[[127.0, 1.6, -1.6, 0.4, -0.6, 126.7]]]))
    assert scales.tolist() == [[[1.0]]]
    assert codes.tolist() == [[[127, 2, -2, 0, -1, 127]]]


def test_int8_extremes() -> None:
    codec = load_codec("int8", torch.float32)
    assert torch.equal(codec.decode(codec.encode(torch.zeros(1, 1, 8))), torch.zeros(1, 1, 8))
    # In float16, where the scale itself would be subnormal.
    half = load_codec("int8", torch.float16)
    small = torch.tensor([[[1e-3, -5e-4]]])
    assert torch.allclose(half.decode(half.encode(small.half())).float(), small, atol=1e-3 / 127)


@pytest.mark.parametrize("name", codec_names())
def test_cache_stores_only_the_given_slots(name: str) -> None:
    codec = load_codec(name, torch.float32)
    shapes = {0: KVShape(2, 16, 12), 3: KVShape(1, 8, 8)}
    cache = KVCache(codec, shapes, num_blocks=3, block_size=4, device=CPU)
    assert cache.nbytes == 3 * bytes_per_block(codec, shapes, 4)
    for part in (part for layer in shapes for parts in cache.parts(layer) for part in parts):
        part.fill_(99)
    before = [part.clone() for parts in cache.parts(0) for part in parts]
    key, value, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 12), torch.tensor([11, 0, 6])
    cache.store(0, key, value, slots)
    untouched = torch.tensor([1, 2, 3, 4, 5, 7, 8, 9, 10])
    after = [part for parts in cache.parts(0) for part in parts]
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(after, before, strict=True))
    for parts, x in zip(cache.parts(0), (key, value), strict=True):
        got = cache.decode(tuple(part[slots] for part in parts))
        assert torch.equal(got, codec.decode(codec.encode(x)))
