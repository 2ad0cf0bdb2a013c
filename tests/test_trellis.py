"""Trellis tensors: states bit by bit, values against the published numbers, cuts, and what cannot be done with them."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import trellis
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.families import family
from bitsmith.kernels.qtensor import QTensor, can_concat, codes_of, concat
from bitsmith.kernels.spec import STATE_VALUES, Spec
from torch import Tensor

EXL3 = "inscale.had128.outhad128.outscale"


def random_trellis(text: str, shape: tuple[int, int]) -> QTensor:
    spec = Spec.parse(text)
    n, k = (-(-size // unit) * unit for size, unit in zip(shape, (spec.out_block, spec.in_block), strict=True))
    codes = torch.randint(-(2**31), 2**31, (-(-n // 16), -(-k // 16), 8 * spec.bits)).int()
    parts = {"codes": codes}
    if "inscale" in spec.pre:
        parts["in_scale"] = torch.randn(k).half()
    if "outscale" in spec.post:
        parts["out_scale"] = torch.randn(n).half()
    return QTensor(spec, shape, parts)


def test_first_entries_of_the_tables() -> None:
    """float16 bits of states 0 to 5, and what is known of each function's distribution."""
    first = {
        "3inst": (14885, 47963, 15220, 13494, 14628, 11440),
        "mcg": (16224, 12366, 47635, 15032, 14674, 46943),
        "mul1": (49896, 14625, 46893, 12857, 47913, 46089),
    }
    rms = {"3inst": (1.243711, 10598), "mcg": (1.244112, 10746), "mul1": (1.000312, 913)}
    for name in STATE_VALUES:
        found = trellis.table(name)
        assert found.dtype is torch.float16 and found.shape == (65536,)
        assert tuple(int(bits) & 0xFFFF for bits in found[:6].view(torch.int16)) == first[name]
        size, distinct = rms[name]
        assert abs(found.double().square().mean().sqrt().item() - size) < 1e-6 and found.unique().numel() == distinct


@pytest.mark.parametrize("width", range(1, 9))
def test_states_bit_by_bit(width: int) -> None:
    """By the definition: a ring of bits, most significant first in each word, a window of 16 that ends with symbol t."""
    q = random_trellis(f"trellis{width}.mcg", (32, 48))
    states = codes_of(q)
    assert states.shape == (32, 48)
    for row, column in ((0, 0), (0, 2), (1, 1)):
        words = [int(word) & 0xFFFFFFFF for word in q.parts["codes"][row, column]]
        ring = "".join(f"{word:032b}" for word in words)
        for t in (0, 1, 2, 5, 17, 63, 100, 255):
            end = (t + 1) * width
            wanted = int("".join(ring[bit % len(ring)] for bit in range(end - 16, end)), 2)
            lane, j = divmod(t, 8)
            k, n = 2 * (lane % 4) + j % 2 + 8 * (j // 2 % 2), lane // 4 + 8 * (j // 4)
            assert states[16 * row + n, 16 * column + k] == wanted
            assert q.dequantize()[16 * row + n, 16 * column + k] == trellis.table("mcg")[wanted]


def test_places_are_a_permutation() -> None:
    """Every weight of a tile has a state of its own: no place is written twice."""
    codes = torch.zeros(1, 1, 64, dtype=torch.int32)
    seen = set()
    for word in range(64):
        for byte in range(4):
            marked = codes.clone()
            marked[0, 0, word] = 1 << (24 - 8 * byte)
            low = codes_of(QTensor(Spec.parse("trellis8.mcg"), (16, 16), {"codes": marked})) & 0xFF
            seen.add(tuple(low.nonzero()[0].tolist()))
    assert len(seen) == 256


def test_golden_vectors(shared: Callable[[str], Path]) -> None:
    """Published digests of tables and decoded tiles, [K / 16, N / 16, 16 * bits] int16 as in a file."""
    golden = json.loads(shared("specs/exl3_golden.json").read_text())
    for name in STATE_VALUES:
        assert digest(trellis.table(name)) == golden[f"{name}.codebook.sha256"]
        for width in range(1, 9):
            numbers = torch.arange(2 * 8 * 16 * width) * 40503 + 12345 * width + 7
            file = numbers.to(torch.int16).view(2, 8, 16 * width)
            codes = file.view(torch.int32).transpose(0, 1).contiguous()
            q = QTensor(Spec.parse(f"trellis{width}.{name}"), (128, 32), {"codes": codes})
            weight = q.dequantize()
            assert torch.equal(weight.half().float(), weight)
            assert digest(weight.half().T.contiguous()) == golden[f"{name}.K{width}"]["sha256"], (name, width)
            assert torch.equal(q.parts["codes"].transpose(0, 1).contiguous().view(torch.int16), file)


def digest(t: Tensor) -> str:
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()


def walsh(size: int) -> Tensor:
    """float64, by the definition: (-1)**popcount(i & j) / sqrt(size)."""
    rows = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / size**0.5


def test_original_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """W = diag(out_scale) H What H diag(in_scale), of a weight padded to whole blocks and decoded in several pieces."""
    monkeypatch.setattr(trellis, "_PIECE", 16 * 256)
    q = random_trellis(f"trellis3.mul1.{EXL3}", (100, 250))
    plain = QTensor(Spec.parse("trellis3.mul1"), (128, 256), {"codes": q.parts["codes"]}).dequantize().double()
    block = walsh(128)
    wanted = block @ plain @ torch.block_diag(block, block)
    wanted = wanted * q.parts["in_scale"].double() * q.parts["out_scale"].double()[:, None]
    found = q.dequantize()
    assert found.dtype is torch.float32 and found.shape == (100, 250)
    torch.testing.assert_close(found.double(), wanted[:100, :250], rtol=0, atol=1e-6 * wanted.abs().max().item())
    assert torch.equal(q.dequantize(torch.bfloat16), found.to(torch.bfloat16))
    assert q.nbytes == 128 * 256 * 3 // 8 + 2 * (128 + 256)


@pytest.mark.parametrize("text", ["trellis3.mcg", f"trellis2.mul1.{EXL3}"])
def test_cuts(text: str) -> None:
    q = random_trellis(text, (384, 512))
    whole = q.dequantize()
    close = {"rtol": 0, "atol": 2e-6 * whole.abs().max().item()}
    torch.testing.assert_close(q.rows(128, 384).dequantize(), whole[128:], **close)
    torch.testing.assert_close(torch.cat([q.shard(0, r, 3).dequantize() for r in range(3)]), whole, **close)
    torch.testing.assert_close(torch.cat([q.shard(1, r, 4).dequantize() for r in range(4)], 1), whole, **close)
    halves = [q.rows(0, 128), q.rows(128, 384)]
    assert can_concat(halves)
    joined = concat(halves)
    assert all(torch.equal(joined.parts[name], t) for name, t in q.parts.items())


def test_refused_cuts() -> None:
    q = random_trellis(f"trellis2.mul1.{EXL3}", (256, 256))
    with pytest.raises(ValueError, match=re.escape("rows 16..128 of 256 cut a tile of 128 rows")):
        q.rows(16, 128)
    with pytest.raises(ValueError, match="256 inputs cannot be cut into 4 whole groups and words"):
        q.shard(1, 0, 4)
    other = random_trellis(f"trellis2.mul1.{EXL3}", (256, 256))
    assert not can_concat([q, other]), "different input vectors"
    padded = random_trellis("trellis2.mul1", (20, 64))
    assert not can_concat([padded, padded]), "rows of padding in the middle"


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("text", [f"trellis4.mcg.{EXL3}", "trellis4.mcg", "trellis4.mcg.had8"])
def test_product_on_the_cpu(text: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are no whole tiles or blocks."""
    monkeypatch.setenv("BITSMITH_KERNELS", kernels)
    q = random_trellis(text, (200, 250))
    product = prepare(q, torch.bfloat16)
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and product.nbytes == q.nbytes
    assert all(torch.equal(back.parts[name], t) for name, t in q.parts.items())
    for x in (torch.randn(2, 3, 250), torch.randn(250), torch.randn(250, 6).T, torch.randn(0, 250)):
        x = x.bfloat16()
        wanted = x.double() @ q.dequantize().double().T
        found = product(x)
        assert found.shape == wanted.shape and found.dtype is torch.bfloat16
        assert not x.numel() or (found.double() - wanted).norm() / wanted.norm() < 8e-3


def test_quantizing_is_refused() -> None:
    grid, spec = family(Spec.parse("trellis3.mcg")).grid, Spec.parse("trellis3.mcg")
    message = re.escape("trellis3.mcg: trellis weights are read but not made yet; to quantize, take the affine, ")
    with pytest.raises(UserError, match=message):
        grid.fit(torch.randn(16, 16), spec)
