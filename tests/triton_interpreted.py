"""The device templates against their torch twins, in Triton's interpreter on CPU tensors.

Run by test_triton.py in a process of its own with TRITON_INTERPRET=1, because triton decides at the first import.
By hand: TRITON_INTERPRET=1 pytest tests/triton_interpreted.py

Every buffer starts as NaN (integers: the largest), and every part of a weight lies in front of such poison, so an
output left unwritten and a read past an end both show.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsmith.kernels import bits, codebook, cuda, repack
from bitsmith.kernels.affine import zero_dtype
from bitsmith.kernels.cuda import CudaMatmul
from bitsmith.kernels.families import scale_dtype, scale_shape
from bitsmith.kernels.minifloat import FLOATS
from bitsmith.kernels.qtensor import QTensor, matrix_shape
from bitsmith.kernels.spec import Spec
from torch import Tensor

# Relative RMS error of a product whose weights and result are rounded to the dtype: 0.3 ulp each on average.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        found = real(*size, **options)
        return found.fill_(poison(found.dtype))

    monkeypatch.setattr(torch, "empty", empty)


def poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def before_nan(t: Tensor) -> Tensor:
    """The same numbers with poison right behind them in memory."""
    tail = torch.full((64,), poison(t.dtype), dtype=t.dtype)
    return torch.cat([t.reshape(-1), tail])[: t.numel()].view(t.shape)


def poisoned(matmul: CudaMatmul) -> CudaMatmul:
    packed = matmul.packed
    parts = packed.parts._make(None if t is None else before_nan(t) for t in packed.parts)
    object.__setattr__(packed, "parts", parts)
    return matmul


def random_qtensor(text: str, shape: tuple[int, int]) -> QTensor:
    """Every code possible (but NaN and infinity), scales and zero points at random."""
    spec = Spec.parse(text)
    matrix = matrix_shape(spec, shape)
    grid = scale_shape(spec, matrix)
    codes = torch.randint(0, 1 << spec.bits, matrix, dtype=torch.uint8)
    if spec.table in FLOATS:
        codes[~codes.view(FLOATS[spec.table]).float().isfinite()] = 0
    parts = {"codes": bits.pack(codes, spec.bits), **random_scales(spec, grid)}
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 1 << spec.bits, grid, dtype=torch.uint8)
    elif spec.zero.startswith("z"):
        parts["zeros"] = (torch.rand(grid) * (1 << spec.bits)).to(zero_dtype(spec))
    if spec.family == "codebook":
        parts["table"] = codebook.table(spec)
    if "perm" in spec.pre:
        parts["perm"] = torch.randperm(shape[1]).int()
    return QTensor(spec, shape, parts)


def random_scales(spec: Spec, grid: tuple[int, int]) -> dict[str, Tensor]:
    level = spec.two_level
    # FP8 codes reach 57344: keep products inside float16.
    size = 2.0**-16 if spec.table == "e5m2" else 2.0**-9 if spec.table == "e4m3" else 1.0
    if spec.scale == "e8m0":
        return {"scales": torch.randint(115, 120, grid, dtype=torch.uint8)}
    if spec.scale == "ue4m3":
        # From a subnormal number to 1.875.
        return {"scales": torch.randint(1, 64, grid, dtype=torch.uint8)}
    if level is None:
        return {"scales": ((torch.rand(grid) + 0.5) * size).to(scale_dtype(spec.scale))}
    super_scales = torch.rand(-(-grid[0] * grid[1] // level[1])) + 0.5
    width = spec.scale_code[0]
    codes = torch.randint(0, 1 << width, grid, dtype=torch.uint8)
    found = {
        "scales": codes if width == 8 else bits.pack(codes, width),
        "super_scales": super_scales.to(scale_dtype(level[0])),
    }
    if spec.family == "codebook":
        found |= {"scale_table": codebook.dynamic_map(), "scale_offset": torch.rand(())}
    return found


def check_decode(text: str, shape: tuple[int, int]) -> None:
    """Repacking is invertible and the decoded weight equals the torch twin's, bit for bit."""
    q = random_qtensor(text, shape)
    assert repack.supported(q) == ""
    matmul = CudaMatmul(q, torch.float16)
    back = matmul.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    for name, part in q.parts.items():
        assert torch.equal(back.parts[name], part), name
    wanted = q.dequantize()
    if "perm" in q.spec.pre:
        wanted = wanted[:, q.parts["perm"]]
    found = poisoned(matmul).weight(torch.float32)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("group", ["g32", "g64", "g128", "channel"])
@pytest.mark.parametrize("zero", ["sym", "asym", "zf16"])
@pytest.mark.parametrize("width", range(1, 9))
def test_affine_decodes_as_its_twin(width: int, zero: str, group: str) -> None:
    """37 outputs: no multiple of a tile. 160 inputs: not of 64 or 128 either."""
    check_decode(f"affine{width}.{group}.{zero}", (37, 160))


@pytest.mark.parametrize("scale", ["tensor", "channel", "g32", "g128", "g128x128", "g16x32"])
@pytest.mark.parametrize("table", ["e4m3", "e5m2"])
def test_minifloat_decodes_as_its_twin(table: str, scale: str) -> None:
    check_decode(f"minifloat8.{table}.{scale}.f32", (150, 200))


def test_every_finite_fp8_code_and_nan() -> None:
    for table, dtype in FLOATS.items():
        codes = torch.arange(256, dtype=torch.uint8)[None]
        spec = Spec.parse(f"minifloat8.{table}.tensor.f32")
        q = QTensor(spec, (1, 256), {"codes": bits.pack(codes, 8), "scales": torch.ones(1, 1)})
        found = CudaMatmul(q, torch.float16).weight(torch.float32)
        torch.testing.assert_close(found, codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit()[0, :128], torch.zeros(128, dtype=torch.bool))
        assert found[0, 128].signbit(), "minus zero"


@pytest.mark.parametrize(
    "text",
    [
        "codebook4.nf4.g64.f32",
        "codebook4.fp4.g32.f16",
        "codebook4.nf4.g64.u8:f32:256",
        "codebook4.nf4.g64.f32.flat",
        "codebook4.nf4.g64.u8:f32:256.flat",
        "affine4.g32.asym.u8:f16:8",
        "affine4.g64.sym.bf16",
        "affine3.g64.zf32.f32",
        "minifloat8.e4m3.g32.e8m0",
        "affine4.g32.asym.perm",
        # Neither divides nor is divided by any tile.
        "affine5.g48.asym",
        "affine4.g20.zf16",
    ],
)
def test_other_decodes_as_their_twins(text: str) -> None:
    check_decode(text, (70, 192) if ".flat" in text else (37, 172))


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("sign", ["u", "s"])
@pytest.mark.parametrize("groups", ["g16", "g32", "g48", "g2x32", "channel"])
def test_narrow_codes_of_scales(width: int, sign: str, groups: str) -> None:
    """22 groups, or 8 or 1: they end inside a word. A group of 48 neither divides nor is divided by any tile."""
    group = int(groups.removeprefix("g2x").lstrip("g")) if groups != "channel" else 40
    count = 1 if groups == "channel" else 22
    check_decode(f"affine4.{groups}.sym.{sign}{width}:f16:{count}", (38, count * group))


def test_narrow_codes_of_a_flat_view() -> None:
    check_decode("affine4.g32.sym.s6:f16:1.flat", (37, 160))


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 33), (65, 129), (64, 128)])
@pytest.mark.parametrize("text", ["affine3.g32.asym", "affine4.channel.sym", "codebook4.nf4.g64.u8:f32:256"])
def test_any_size(text: str, shape: tuple[int, int]) -> None:
    check_decode(text, shape)


def test_e8m0_extremes() -> None:
    spec = Spec.parse("minifloat8.e4m3.g32.e8m0")
    codes = torch.full((1, 96), 0x38, dtype=torch.uint8)
    scales = torch.tensor([[0, 1, 254]], dtype=torch.uint8)
    q = QTensor(spec, (1, 96), {"codes": bits.pack(codes, 8), "scales": scales})
    found = CudaMatmul(q, torch.float16).weight(torch.float32)
    assert found[0, ::32].tolist() == [2.0**-127, 2.0**-126, 2.0**127]


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check_product(text: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    q = random_qtensor(text, shape)
    x = before_nan(torch.randn(rows, shape[1]).to(dtype))
    found = poisoned(CudaMatmul(q, dtype))(x)
    assert found.shape == (rows, shape[0]) and found.dtype == dtype
    assert relative_rms(found, x.double() @ q.dequantize().double().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(
    "text",
    [
        "affine4.g32.asym",
        "affine4.channel.sym",
        "affine3.g128.zf16",
        "affine4.g128.asym.perm",
        "affine7.g48.sym",
        "minifloat8.e4m3.g128x128.f32",
        "minifloat8.e5m2.tensor.f32",
        "codebook4.nf4.g64.u8:f32:256",
    ],
)
def test_product(text: str, rows: int) -> None:
    """gemv, gemv and gemm on 39 outputs and 172 inputs: a multiple of nothing."""
    check_product(text, (39, 172), rows, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
def test_product_dtypes_and_thresholds(rows: int, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and cuda.plan(rows, (33, 96)).kernel == "gemm":
        pytest.skip("the interpreter's dot multiplies the bits of bfloat16 (triton-lang/triton#11584)")
    check_product("affine4.g64.asym", (33, 96), rows, dtype)


@pytest.mark.parametrize(("rows", "shape"), [(1, (40, 1030)), (2, (7, 1152)), (9, (17, 2400))])
def test_split_of_the_inputs(rows: int, shape: tuple[int, int]) -> None:
    """K long enough for several programs per output, the last with less to do."""
    assert cuda.plan(rows, shape).split > 1
    check_product("affine4.g128.asym", shape, rows, torch.float16)


def test_more_programs_than_steps() -> None:
    """A program left without a step must still write its zeros."""
    q = random_qtensor("affine4.g32.asym", (8, 96))
    matmul = CudaMatmul(q, torch.float32)
    x = torch.randn(2, 96)
    how = cuda.Plan("gemv", {"BM": 2, "BN": 32, "BK": 32}, 4, 1, split=5)
    found = cuda.launch(x, matmul.packed.parts, matmul.packed.spec, 8, how)
    assert relative_rms(found, x.double() @ q.dequantize().double().T) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.view(2, 3, -1).transpose(0, 1),
        lambda x: x[0],
        lambda x: x[:0],
    ],
)
def test_any_strides_and_leading_dims(view: Callable[[Tensor], Tensor]) -> None:
    q = random_qtensor("affine4.g32.asym", (5, 64))
    x = view(torch.randn(6, 64))
    wanted = x.double() @ q.dequantize().double().T
    found = CudaMatmul(q, torch.float32)(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_input_keeps_its_dtype_where_products_run_in_another() -> None:
    q = random_qtensor("affine4.g32.sym", (5, 64))
    x = torch.randn(2, 64).bfloat16()
    found = CudaMatmul(q, torch.float16)(x)
    assert found.dtype == torch.bfloat16
    assert relative_rms(found, x.double() @ q.dequantize().double().T) < TOLERANCE[torch.bfloat16]


def test_a_second_run_gives_the_same_bits() -> None:
    q = random_qtensor("affine4.g128.asym", (40, 1030))
    matmul, x = CudaMatmul(q, torch.float16), torch.randn(1, 1030).half()
    assert torch.equal(matmul(x), matmul(x))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("group", ["g32", "g64", "g128", "channel"])
@pytest.mark.parametrize("zero", ["sym", "asym", "zf16"])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_affine_product(width: int, zero: str, group: str, rows: int) -> None:
    check_product(f"affine{width}.{group}.{zero}", (39, 172), rows, torch.float16)
