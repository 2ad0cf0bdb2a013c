"""Steps around the product: the transform against its definition, the product against the folded weight."""

import itertools
import re
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import bits, native, transform
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.families import scale_shape
from bitsmith.kernels.grid import Params
from bitsmith.kernels.qtensor import QTensor, build, core, matrix_shape, with_steps
from bitsmith.kernels.recording import record
from bitsmith.kernels.spec import Spec
from torch import Tensor

SPECS = [
    "affine4.g32.asym.inscale",
    "affine4.g32.asym.inscale.perm",
    "affine4.g64.sym.had64",
    "affine8.channel.sym.inscale.perm.had32.outhad16.outscale",
    "affine3.g32.asym.outscale",
    "affine4.g32.sym.outhad128",
    "minifloat8.e4m3.channel.f32.inscale.had128.outhad128.outscale",
    "affine4.g32.asym.inscale.flat",
]


def random_stepped(text: str, shape: tuple[int, int]) -> QTensor:
    spec = Spec.parse(text)
    matrix = matrix_shape(spec, shape)
    r, c = shape if spec.view else matrix
    codes = torch.randint(0, 100 if spec.family == "minifloat" else 1 << spec.bits, matrix, dtype=torch.uint8)
    parts = {"codes": bits.pack(codes, spec.bits)}
    dtype = torch.float32 if spec.scale == "f32" else torch.float16
    grid = scale_shape(spec, matrix)
    parts["scales"] = (torch.rand(grid) + 0.5).to(dtype)
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 1 << spec.bits, grid, dtype=torch.uint8)
    if "inscale" in spec.pre:
        parts["in_scale"] = (torch.rand(c) + 0.5).half()
    if "perm" in spec.pre:
        parts["perm"] = torch.randperm(c).int()
    if "outscale" in spec.post:
        parts["out_scale"] = torch.randn(r).half()
    return QTensor(spec, shape, parts)


def walsh(size: int) -> Tensor:
    """float64, by the definition: (-1)**popcount(i & j) / sqrt(size)."""
    rows = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("block", [2, 4, 64, 128, 256, 512])
def test_hadamard(block: int) -> None:
    """Against the definition, and its own inverse, for any leading shape and strides."""
    x = torch.randn(2, 3 * block, 3).transpose(1, 2)
    found = transform.hadamard(x, block)
    wanted = (x.reshape(-1, block).double() @ walsh(block)).view(x.shape)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.hadamard(found, block), x, rtol=0, atol=1e-5)


def test_hadamard_of_4096() -> None:
    """One input is a row of the matrix; the norm stays."""
    x = torch.zeros(4096)
    x[1234] = 1.0
    signs = torch.tensor([(-1.0) ** (i & 1234).bit_count() for i in range(4096)])
    assert torch.equal(transform.hadamard(x, 4096), signs / 64)


def steps_as_matrices(q: QTensor) -> tuple[Tensor, Tensor]:
    """float64 A, B with y = ((x @ A) @ core.T) @ B, built from the definition of every step."""
    spec, (n, k) = q.spec, q.shape
    r, c = (n, k) if spec.view else matrix_shape(spec, q.shape)
    a = torch.eye(c, dtype=torch.float64)[:k]
    if "inscale" in spec.pre:
        a = a * q.parts["in_scale"].double()
    if "perm" in spec.pre:
        a = a[:, q.parts["perm"].long()]
    if spec.in_block > 1:
        a = a @ torch.block_diag(*[walsh(spec.in_block)] * (c // spec.in_block))
    b = torch.eye(r, dtype=torch.float64)
    if spec.out_block > 1:
        b = torch.block_diag(*[walsh(spec.out_block)] * (r // spec.out_block))
    if "outscale" in spec.post:
        b = b * q.parts["out_scale"].double()
    return a, b[:, :n]


@pytest.mark.parametrize("shape", [(96, 192), (37, 100), (1, 64)])
@pytest.mark.parametrize("text", SPECS)
def test_dequantize_is_the_plain_weight(text: str, shape: tuple[int, int]) -> None:
    q = random_stepped(text, shape)
    a, b = steps_as_matrices(q)
    wanted = b.T @ core(q).dequantize().double() @ a.T
    found = q.dequantize()
    assert found.shape == shape and found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())
    assert torch.equal(q.dequantize(torch.float16), found.half())


@pytest.mark.parametrize("shape", [(96, 192), (37, 100), (1, 64)])
@pytest.mark.parametrize("text", SPECS)
def test_steps_are_the_folded_weight(text: str, shape: tuple[int, int]) -> None:
    """pre, product and post in float32 against x @ dequantize().T."""
    q = random_stepped(text, shape)
    x = torch.randn(2, 3, shape[1])
    y = transform.apply_pre(q.spec, q.parts, x, core(q).shape[1]) @ core(q).dequantize().T
    found = transform.apply_post(q.spec, q.parts, y, shape[0])
    wanted = x.double() @ q.dequantize().double().T
    assert found.shape == wanted.shape and found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("text", SPECS)
def test_product_on_the_cpu(text: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any shape of input; the tensor comes back bit for bit; nothing is held twice."""
    monkeypatch.setenv("BITSMITH_KERNELS", kernels)
    q = random_stepped(text, (144, 192))
    product = prepare(q, torch.bfloat16)
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    assert all(torch.equal(back.parts[name], t) for name, t in q.parts.items())
    side_bytes = sum(t.nbytes for t in transform.sides(q.parts).values())
    assert product.nbytes == prepare(core(q), torch.bfloat16).nbytes + side_bytes
    for x in (torch.randn(2, 3, 192), torch.randn(192, 5).T, torch.randn(192), torch.randn(0, 192)):
        x = x.bfloat16()
        found, wanted = product(x), x.double() @ q.dequantize().double().T
        assert found.shape == wanted.shape and found.dtype is torch.bfloat16
        assert not x.numel() or (found.double() - wanted).norm() / wanted.norm() < 1.2e-2


@pytest.mark.parametrize("text", [text for text in SPECS if "flat" not in text])
def test_cuts(text: str) -> None:
    q = random_stepped(text, (256, 256))
    whole = q.dequantize()
    close = {"rtol": 0, "atol": 2e-6 * whole.abs().max().item()}
    torch.testing.assert_close(q.rows(128, 256).dequantize(), whole[128:], **close)
    if "perm" not in q.spec.pre:
        torch.testing.assert_close(torch.cat([q.shard(1, r, 2).dequantize() for r in range(2)], 1), whole, **close)


def test_core_and_back() -> None:
    q = random_stepped(SPECS[3], (37, 100))
    inner = core(q)
    assert str(inner.spec) == "affine8.channel.sym" and inner.shape == (48, 128)
    again = with_steps(inner, q.spec, q.shape, transform.sides(q.parts))
    assert again.parts.keys() == q.parts.keys() and again.shape == q.shape


def test_as_an_operator() -> None:
    """Registered with torch: fake tensors know the padded shape."""
    x, vector = torch.randn(3, 100), torch.randn(128)
    arguments: tuple[Any, ...] = (x, vector, 64, True)
    torch.library.opcheck(torch.ops.bitsmith.hadamard.default, arguments)
    torch.library.opcheck(torch.ops.bitsmith.hadamard.default, (x, None, 64, False))


@pytest.mark.skipif(not native.best_path(), reason="built without a C++ compiler")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_bfloat16_by_the_native_library(dtype: torch.dtype | None, first: bool) -> None:
    """Its twin in float32 but for one rounding; rows end inside a block; a recording repeats it for other contents."""
    for rows, block in itertools.product((1, 33), (2, 8, 64, 128, 1024)):
        x = torch.randn(rows, 1000).bfloat16()
        vector = None if dtype is None else (torch.randn(-(-1000 // block) * block)).to(dtype)
        with torch.inference_mode():
            recording = record(lambda x=x, vector=vector, block=block: transform.rotate(x, vector, block, first))
            x.copy_(torch.randn(rows, 1000))
            found = recording()
        assert found.dtype is torch.bfloat16 and torch.equal(found, transform.rotate(x, vector, block, first))
        wanted = transform._rotate_plain(x.float(), vector, block, first)
        torch.testing.assert_close(found.float(), wanted, rtol=0.51 * 2**-7, atol=2e-6)


def test_quantizing_is_refused() -> None:
    spec = Spec.parse("affine4.g32.sym.had128")
    message = (
        "affine4.g32.sym.had128: weights are not quantized onto transformed inputs or outputs yet, only read; "
        "use affine4.g32.sym"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        build(torch.zeros(1, 128, dtype=torch.uint8), Params(torch.ones(1, 4)), spec, (1, 128))
