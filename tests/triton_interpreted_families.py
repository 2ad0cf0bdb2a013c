"""Vector codebooks, trellises and the Hadamard transform against their torch twins, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is, which also has the helpers.
"""

import pytest
import torch
from bitsmith.kernels import bits, grouped, repack, transform, transform_device
from bitsmith.kernels.cuda import CudaMatmul
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.families import scale_shape
from bitsmith.kernels.qtensor import QTensor, core
from bitsmith.kernels.spec import GRIDS, STATE_VALUES, Spec
from bitsmith.kernels.tiles import Parts
from bitsmith.quant_formats import gguf_blocks
from torch import Tensor

from . import gguf_bytes
from . import test_codebook_vector as codebooks
from . import test_transform as steps
from . import test_trellis as trellises
from . import triton_interpreted as helpers

_poison = helpers._poison
EXL3 = trellises.EXL3


def check_decode(q: QTensor) -> None:
    """Repacking is invertible and the decoded weight equals the torch twin's, bit for bit."""
    assert repack.supported(q) == ""
    matmul = CudaMatmul(q, torch.float16)
    back = matmul.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    assert all(torch.equal(back.parts[name], part) for name, part in q.parts.items())
    found = helpers.poisoned(matmul).weight(torch.float32)
    wanted = core(q).dequantize()
    assert found.shape == wanted.shape and torch.equal(found.view(torch.int32), wanted.contiguous().view(torch.int32))


def check_product(q: QTensor, rows: int, dtype: torch.dtype, roundings: float = 1.0) -> None:
    x = helpers.before_nan(torch.randn(rows, q.shape[1]).to(dtype))
    found = helpers.poisoned(CudaMatmul(q, dtype))(x)
    assert found.shape == (rows, q.shape[0]) and found.dtype == dtype
    wanted = x.double() @ q.dequantize().double().T
    assert helpers.relative_rms(found, wanted) < roundings * helpers.TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (37, 75), (70, 192)])
@pytest.mark.parametrize("text", codebooks.SPECS)
def test_codebook_decodes_as_its_twin(text: str, shape: tuple[int, int]) -> None:
    check_decode(codebooks.random_codebook(text, shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["codebook8.v8.x2.channel", "codebook4.rowtable.channel", "codebook4.channel"])
def test_table_of_any_dtype(text: str, dtype: torch.dtype) -> None:
    check_decode(codebooks.random_codebook(text, (37, 75), dtype))


@pytest.mark.parametrize("books", range(1, 5))
@pytest.mark.parametrize("vec", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 3, 6, 8])
def test_every_width_of_vector(width: int, vec: int, books: int) -> None:
    text = f"codebook{width}.v{vec}" + (f".x{books}" if books > 1 else "") + ".channel"
    check_decode(codebooks.random_codebook(text, (5, 100)))


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(
    "text", ["codebook16.v8.channel", "codebook8.v8.x2.channel", "codebook12.v8.channel", "codebook4.rowtable.g64"]
)
def test_codebook_product(text: str, rows: int) -> None:
    check_product(codebooks.random_codebook(text, (39, 172)), rows, torch.float16)


def random_grid(name: str, shape: tuple[int, int], scale: str) -> QTensor:
    spec = Spec.parse(f"codebook{GRIDS[name].bits}.{name}.v8.g32.{scale}")
    codes = torch.randint(0, 1 << spec.bits, (shape[0], -(-shape[1] // 8)))
    scales = helpers.random_scales(spec, scale_shape(spec, shape))
    kept = {part: scales[part] for part in scales.keys() & {"scales", "super_scales"}}
    return QTensor(spec, shape, {"codes": bits.pack(codes, spec.bits), **kept})


# A shift of the group needs a scale code to be in.
SCALED = [(name, scale) for name, code in GRIDS.items() for scale in ["f16", "u8:f16:8"][code.group_shift :]]


@pytest.mark.parametrize("shape", [(1, 1), (37, 75), (70, 192)])
@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_grid_decodes_as_its_twin(name: str, scale: str, shape: tuple[int, int]) -> None:
    """Inputs that end inside a vector, where files have whole blocks of 256."""
    check_decode(random_grid(name, shape, scale))


@pytest.mark.parametrize("name", GRIDS)
def test_every_vector_and_sign_of_a_grid(name: str) -> None:
    """Every vector in each of its places, and every pattern of signs."""
    code, each = GRIDS[name], torch.arange(2048)
    codes = 5 * each % (1 << max(code.signs, 1)) << (code.indices * code.index_bits)
    for i in range(code.indices):
        codes |= (2 * i + 1) * each % (1 << code.index_bits) << (i * code.index_bits)
    spec = Spec.parse(f"codebook{code.bits}.{name}.v8.channel.u8:f16:1")
    scales = {"scales": torch.tensor([[0], [255]] * 4, dtype=torch.uint8), "super_scales": torch.ones(8).half()}
    check_decode(QTensor(spec, (8, 2048), {"codes": bits.pack(codes.view(8, 256).int(), code.bits), **scales}))


def random_gguf(name: str, shape: tuple[int, int]) -> QTensor:
    return gguf_blocks.unpack(name, gguf_bytes.random_rows(name, *shape, calm=True), shape)


@pytest.mark.parametrize("name", gguf_blocks.BLOCKS)
def test_gguf_blocks_decode_as_their_twin(name: str) -> None:
    """37 outputs: no multiple of a tile."""
    q = random_gguf(name, (37, 512))
    check_decode(q)
    for rows in (1, 17):
        check_product(q, rows, torch.float16)


def test_experts_share_the_table_of_a_grid() -> None:
    tensors = [random_gguf("IQ3_S", (39, 256)) for _ in range(3)]
    product = grouped.stack([CudaMatmul(q, torch.float16) for q in tensors])
    assert product is not None and Parts(*product.parts).table.stride(0) == 0
    experts = torch.tensor([[2, 0]])
    x = torch.randn(1, 256).half()
    found = product(x, grouped.route(experts, 3), 2)
    wanted = torch.cat([x.double() @ tensors[e].dequantize().double().T for e in (2, 0)])
    assert helpers.relative_rms(found, wanted) < helpers.TOLERANCE[torch.float16]


def test_scale_of_a_whole_tensor() -> None:
    q = random_gguf("NVFP4", (37, 128))
    check_decode(QTensor(q.spec, q.shape, {**q.parts, "global_scale": torch.tensor(0.37)}))


@pytest.mark.parametrize("name", STATE_VALUES)
@pytest.mark.parametrize("width", range(1, 9))
def test_trellis_decodes_as_its_twin(width: int, name: str) -> None:
    """80 outputs and 112 inputs: tiles, but no multiple of a program's."""
    check_decode(trellises.random_trellis(f"trellis{width}.{name}", (80, 112)))


def test_every_state() -> None:
    """8-bit symbols in order: each state of the 65536 occurs in one of the tiles."""
    codes = torch.arange(256 * 64).mul(0x9E3779B1).to(torch.int32).view(16, 16, 64)
    for name in STATE_VALUES:
        check_decode(QTensor(Spec.parse(f"trellis8.{name}"), (256, 256), {"codes": codes}))


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (30, 200)])
def test_trellis_of_any_size(shape: tuple[int, int]) -> None:
    """Sizes that are no whole tiles: weights of the padding are decoded and dropped."""
    q = trellises.random_trellis("trellis3.mul1", shape)
    check_decode(q)
    for rows in (1, 9):
        x = torch.randn(rows, shape[1])
        found = CudaMatmul(q, torch.float32)(x)
        assert found.shape == (rows, shape[0])
        assert helpers.relative_rms(found, x.double() @ q.dequantize().double().T) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("text", ["trellis4.mul1", f"trellis3.mcg.{EXL3}", f"trellis2.3inst.{EXL3}"])
def test_trellis_product(text: str, rows: int) -> None:
    """Transformed inputs and outputs are rounded on the way: three roundings instead of one."""
    check_product(trellises.random_trellis(text, (100, 250)), rows, torch.float16, 1.7)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("text", steps.SPECS)
def test_steps_around_the_product(text: str, rows: int) -> None:
    check_product(steps.random_stepped(text, (37, 96)), rows, torch.float16, 1.7)


def test_dispatch_takes_the_device_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    for q in (
        trellises.random_trellis(f"trellis3.mcg.{EXL3}", (100, 250)),
        codebooks.random_codebook("codebook8.v8.x2.channel", (9, 80)),
    ):
        product = prepare(q, torch.float32)
        assert product.name == "triton" and product.nbytes <= 1.1 * q.nbytes
        x = torch.randn(2, 3, q.shape[1]).transpose(0, 1)
        assert helpers.relative_rms(product(x), x.double() @ q.dequantize().double().T) < 2e-6


def twin(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    found = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block))
    if vector is not None and first:
        found = found * vector.float()
    found = transform.hadamard(found, block)
    return found * vector.float() if vector is not None and not first else found


@pytest.mark.parametrize("vector", [None, "before", "after"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("block", [2, 8, 32, 128, 1024, 4096])
def test_hadamard(block: int, rows: int, vector: str | None) -> None:
    """Inputs that end inside a block, rows that end inside a program."""
    k = 2 * block - 1
    x = torch.randn(rows, k).half()
    factors = None if vector is None else torch.randn(2 * block).half()
    given = None if factors is None else helpers.before_nan(factors)
    found = transform_device.launch(helpers.before_nan(x), given, block, vector == "before")
    assert found.shape == (rows, 2 * block) and found.dtype is torch.float16
    torch.testing.assert_close(found.float(), twin(x, factors, block, vector == "before"), rtol=1e-3, atol=1e-3)


def test_hadamard_in_float32_is_its_own_inverse() -> None:
    x = torch.randn(3, 256)
    there = transform_device.launch(x, None, 128, True)
    torch.testing.assert_close(there, transform.hadamard(x, 128), rtol=0, atol=2e-6)
    torch.testing.assert_close(transform_device.launch(there, None, 128, True), x, rtol=0, atol=2e-6)


def test_steps_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of larger blocks torch's products; strided input, no rows."""
    calls = []
    real = transform_device.launch
    monkeypatch.setattr(transform_device, "launch", lambda *a: calls.append(a[2]) or real(*a))
    spec = Spec.parse("affine4.g32.sym.had64.outhad8192")
    x = torch.randn(70, 3).T
    found = transform.apply_pre(spec, {}, x, 128)
    torch.testing.assert_close(found, twin(x, None, 64, True), rtol=0, atol=2e-6)
    assert transform.apply_pre(spec, {}, x[:0], 128).shape == (0, 128)
    y = torch.randn(1, 8192)
    torch.testing.assert_close(transform.apply_post(spec, {}, y, 100), twin(y, None, 8192, True)[:, :100])
    assert calls == [64, 64]
