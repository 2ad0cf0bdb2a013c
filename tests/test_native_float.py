"""The native library's float products against their torch twins: every weight bit for bit, and sums as close as float32 is."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from bitsmith.kernels import bits, codebook, dispatch, native, native_float
from bitsmith.kernels.affine import zero_dtype
from bitsmith.kernels.families import one_level_parts, scale_shape
from bitsmith.kernels.minifloat import FLOATS
from bitsmith.kernels.qtensor import QTensor, matrix_shape
from bitsmith.kernels.recording import record
from bitsmith.kernels.spec import STATE_VALUES, Spec
from torch import Tensor

from .test_codebook_vector import random_codebook
from .test_trellis import EXL3, random_trellis

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        native.best_path() in ("", "generic"),
        reason="no native library for this processor, or built without a C++ compiler",
    ),
]

SCALARS = (
    "affine1.g8.sym", "affine2.g16.min", "affine2.g32.one", "affine3.g16.asym", "affine4.g16.zf16", "affine5.g24.zbf16.bf16",
    "affine6.g64.none.f32", "affine7.g128.asym", "affine8.channel.sym.f32", "affine4.g64.zf32.f32.flat", "affine3.g32x64.asym",
    "minifloat8.e4m3.g128x128.f32", "minifloat8.e5m2.tensor.f32", "minifloat8.e4m3.g32.e8m0", "minifloat8.e4m3.channel.f32",
    "minifloat4.e2m1.g16.ue4m3", "minifloat4.e2m1.g32.e8m0",
    "codebook4.nf4.g64.f32", "codebook4.nf4.g64.u8:f32:256", "codebook4.nf4.g32.u8:f32:8", "codebook4.nf4.g64.u8:f32:256.flat",
    "codebook4.fp4.g64.bf16", "codebook4.iq4nl.g32", "codebook1.sign.g16",
)  # fmt: skip
TABLES = (
    "codebook5.channel", "codebook3.channel", "codebook2.g16", "codebook4.rowtable.channel", "codebook3.rowtable.g32",
    "codebook8.rowtable.g64", "codebook16.v8.channel", "codebook8.v8.x2.channel", "codebook12.v8.channel",
    "codebook8.v4.x4.g64.f32", "codebook3.v4.x3.channel", "codebook6.v2.g24.bf16", "codebook8.v8.x2.g16x32",
    "codebook10.channel",
)  # fmt: skip
TRELLIS = tuple(f"trellis{bits}.{states}" for bits, states in itertools.product(range(1, 9), STATE_VALUES))
# Whether weights are rounded for bfloat16 activations.
ROUNDED = native.best_path() in ("avx512", "amx")
# Rows and inputs that fill blocks and panels (256 inputs) and that do not.
SHAPES = ((48, 512), (33, 160), (16, 128), (1, 64), (40, 608), (17, 72))
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 64)


def native_paths() -> list[str]:
    """The best of this machine, plain loops, and what a machine without AVX-512 takes, where that differs."""
    return ["", "generic", *(["avx2"] if native.best_path() in ("avx512", "amx") else [])]


def random_qtensor(text: str, shape: tuple[int, int]) -> QTensor:
    spec = Spec.parse(text)
    if spec.family == "trellis":
        return random_trellis(text, shape)
    if text in TABLES:
        return random_codebook(text, shape)
    matrix = matrix_shape(spec, shape)
    codes = torch.randint(0, 1 << spec.bits, matrix, dtype=torch.uint8)
    if spec.table in FLOATS:
        finite = torch.arange(256, dtype=torch.uint8).view(FLOATS[spec.table]).float().isfinite()
        codes = torch.where(finite[codes.long()], codes, 0)
    return QTensor(spec, shape, {"codes": bits.pack(codes, spec.bits), **random_scales(spec, matrix)})


def random_scales(spec: Spec, matrix: tuple[int, int]) -> dict[str, Tensor]:
    grid = scale_shape(spec, matrix)
    parts = {}
    if spec.two_level:
        parts["scales"] = torch.randint(0, 256, grid, dtype=torch.uint8)
        parts["super_scales"] = torch.rand(-(-grid[0] * grid[1] // spec.two_level[1])) + 0.5
        parts["scale_table"], parts["scale_offset"] = codebook.dynamic_map(), torch.tensor(2.0)
    elif spec.scale in ("e8m0", "ue4m3"):
        parts["scales"] = one_level_parts(spec, torch.randint(-9, 9, grid).float().exp2())
    else:
        parts["scales"] = one_level_parts(spec, torch.rand(grid) + 0.5)
    if spec.scale == "ue4m3":
        parts["scales"] = torch.randint(0, 0x7F, grid, dtype=torch.uint8)
        parts["global_scale"] = torch.tensor(0.0123)
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 1 << spec.bits, grid, dtype=torch.uint8)
    elif spec.zero.startswith("z"):
        parts["zeros"] = (torch.rand(grid) * (1 << spec.bits)).to(zero_dtype(spec))
    elif spec.zero == "min":
        parts["mins"] = one_level_parts(spec, torch.randn(grid))
    if spec.family == "codebook" and spec.table not in codebook.FIXED:
        parts["table"] = codebook.table(spec)
    return parts


def cases() -> list[tuple[str, tuple[int, int]]]:
    """Trellis tensors are whole tiles; the group of a flat view does not straddle rows."""
    found = []
    for text, (n, k) in itertools.product((*SCALARS, *TABLES), SHAPES):
        spec = Spec.parse(text)
        if spec.view != "flat" or k % spec.group == 0:
            found.append((text, (n, k)))
    return found + [(text, shape) for text in TRELLIS for shape in ((32, 288), (16, 16))]


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative to the size of a sum of products with independent errors."""
    assert y.shape == (x.shape[0], weight.shape[0]) and bool(y.isfinite().all())
    terms = (x.double().square() @ weight.double().square().T).sqrt()
    return float((y.double() - x.double() @ weight.double().T).norm() / terms.norm())


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("text", "shape"), cases())
def test_every_weight_and_every_sum(text: str, shape: tuple[int, int], path: str) -> None:
    """The product with the identity is the weight: no value may differ in any bit."""
    q = random_qtensor(text, shape)
    assert native_float.supports(q)
    product, weight = partial(native_float.pack(q), path=path), q.dequantize()
    assert torch.equal(product(torch.eye(shape[1])).T, weight)
    for m in ROWS:
        x = torch.randn(m, shape[1])
        x[0, 0] = 30.0
        assert error(product(x), x, weight) < 1e-6
    for dtype in (torch.float16,) if path == "" and ROUNDED else (torch.bfloat16, torch.float16):
        short = x.to(dtype)
        assert torch.equal(product(short), product(short.float()).to(dtype))


@pytest.mark.skipif(not ROUNDED, reason="needs avx512 with bfloat16")
@pytest.mark.parametrize(("text", "shape"), cases())
def test_weights_in_bfloat16(text: str, shape: tuple[int, int]) -> None:
    """With AVX-512, weights meet bfloat16 activations as what the reference makes of them, but for one row of most."""
    q = random_qtensor(text, shape)
    product, weight = native_float.pack(q), q.dequantize()
    near = weight.bfloat16()
    assert torch.equal(product(torch.eye(shape[1]).bfloat16()).T, near)
    for m in (*ROWS, 600):
        x = torch.randn(m, shape[1]).bfloat16()
        used = (near if m > 1 or q.spec.family == "trellis" else weight).double()
        wanted = x.double() @ used.T
        terms = (x.double().square() @ used.square().T).sqrt()
        # Half a unit in the last place of the result, and of float32 sums what the test above grants.
        assert bool(((product(x).double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6 * terms).all())


@pytest.mark.parametrize(("text", "shape"), cases())
def test_the_same_tensor_comes_back(text: str, shape: tuple[int, int]) -> None:
    q = random_qtensor(text, shape)
    product = native_float.pack(q)
    back = product.qtensor()
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    for name, part in q.parts.items():
        assert torch.equal(back.parts[name], part) and back.parts[name].dtype == part.dtype, name
    if shape == (48, 512) or "trellis" in text:
        assert product.nbytes <= 1.03 * q.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["codebook8.v8.x2.channel", "codebook8.v4.x4.g64.f32", "codebook4.rowtable.channel"])
def test_tables_of_any_dtype(text: str, dtype: torch.dtype) -> None:
    q = random_codebook(text, (33, 320), dtype)
    for path in native_paths():
        assert torch.equal(native_float.pack(q)(torch.eye(320), path=path).T, q.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["codebook8.v8.x2.channel", "codebook16.v8.g8.f32", "codebook5.v8.x3.g24"])
def test_vectors_by_few_rows(text: str, dtype: torch.dtype) -> None:
    """Up to 8 rows meet the entries of a table themselves (cpp/dots.h): the weights once more bit for bit, and sums."""
    q = random_codebook(text, (33, 328), dtype)
    weight, product = q.dequantize(), native_float.pack(q)
    for path, m in itertools.product(native_paths(), range(1, 9)):
        found = torch.cat([product(rows.contiguous(), path) for rows in torch.eye(328).split(m)])
        assert torch.equal(found.T, weight)
        x = torch.randn(m, 328)
        assert error(product(x, path), x, weight) < 1e-6


@pytest.mark.parametrize("states", STATE_VALUES)
def test_all_states_of_a_trellis(states: str) -> None:
    """Symbols of 8 bits: 65536 of them, each pair of bytes once as a state, in rings of a de Bruijn-like walk."""
    first = torch.arange(1 << 16)
    # Weights 2 i and 2 i + 1 of the stream end with the low and high byte of i, so every i is a state.
    symbols = torch.stack([first >> 8, first & 0xFF], 1).flatten().view(-1, 4)
    words = (symbols << torch.tensor([24, 16, 8, 0])).sum(1)
    codes = torch.where(words >= 1 << 31, words - (1 << 32), words).int().view(16, -1, 64)
    q = QTensor(Spec.parse(f"trellis8.{states}"), (256, 16 * codes.shape[1]), {"codes": codes})
    product = native_float.pack(q)
    weight = q.dequantize()
    for path in native_paths():
        assert torch.equal(product(torch.eye(weight.shape[1]), path).T, weight)


def test_numbers_at_the_edges() -> None:
    """All bytes as E4M3 scales, E5M2 and E4M3 codes (NaN and infinity too), and the smallest and largest E8M0."""
    every = torch.arange(256, dtype=torch.uint8)
    wanted = torch.zeros(1, 4096)
    wanted[0, ::16] = 1.0
    scales = QTensor(
        Spec.parse("minifloat4.e2m1.g16.ue4m3"), (1, 4096),
        {"codes": bits.pack(torch.full((1, 4096), 2), 4), "scales": every[None], "global_scale": torch.tensor(1.0)},
    )  # fmt: skip
    e8m0 = QTensor(
        Spec.parse("minifloat4.e2m1.g32.e8m0"), (1, 8192),
        {"codes": bits.pack(torch.full((1, 8192), 2), 4), "scales": every[None]},
    )  # fmt: skip
    codes = [
        QTensor(Spec.parse(f"minifloat8.{table}.channel.f32"), (1, 256),
                {"codes": bits.pack(every[None], 8), "scales": torch.ones(1, 1)})
        for table in FLOATS
    ]  # fmt: skip
    for q, path in itertools.product((scales, e8m0, *codes), native_paths()):
        weight, product = q.dequantize(), native_float.pack(q)
        kept = torch.where(weight.isfinite(), torch.eye(q.shape[1]), 0.0)
        found = torch.cat([product(row[None], path=path) for row in torch.eye(q.shape[1])[:: q.shape[1] // 256]])
        finite = weight[0, :: q.shape[1] // 256].isfinite()
        if bool(weight.isfinite().all()):
            assert torch.equal(found[:, 0], weight[0, :: q.shape[1] // 256])
        else:
            # Something times zero is in every sum.
            assert not finite.all() and bool(found.isnan().all()) and kept.any()


def test_dispatch_takes_what_int8_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, shape in (
        ("trellis4.mcg", (64, 96)),
        ("codebook8.v8.x2.channel", (48, 160)),
        ("affine2.g16.min", (48, 160)),
    ):
        q = random_qtensor(text, shape)
        assert isinstance(dispatch.prepare(q, torch.bfloat16).core, native_float.FloatLinear)  # type: ignore[attr-defined]
        assert dispatch.prepare(q, torch.bfloat16).nbytes <= 1.03 * q.nbytes
        assert dispatch.prepare(q, torch.bfloat16, exact=True).name == "reference"
        assert dispatch.prepare(q, torch.float32).name == "reference"
    q = random_trellis(f"trellis3.mcg.{EXL3}", (200, 250))
    x = torch.randn(5, 250).bfloat16()
    wanted = x.double() @ q.dequantize().double().T
    assert (dispatch.prepare(q, torch.bfloat16)(x).double() - wanted).norm() / wanted.norm() < 8e-3


@pytest.mark.parametrize(
    "text", ["affine4.g20", "affine4.g16.sym.axis0", "codebook15.iq2xxs.v8.g32.u4:f16:8", "affine2.g16.min.u4:f16:16"]
)
def test_what_is_left_to_torch(text: str) -> None:
    spec = Spec.parse(text)
    assert not native_float.supports(QTensor(spec, (32, 160), {"codes": torch.zeros(1, dtype=torch.int32)}))


def test_threads_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    product = native_float.pack(random_qtensor("codebook4.nf4.g64.f32", (700, 320)))
    x = torch.randn(300, 320)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results += [product(x) for _ in range(5)]
    assert all(torch.equal(y, results[0]) for y in results)
    # Slabs of 240 rows.
    assert torch.equal(product(x[:240].contiguous()), results[0][:240])


def test_recorded_and_compiled() -> None:
    """A recording repeats the product for other contents."""
    q = random_qtensor("trellis3.mul1", (32, 64))
    product = native_float.pack(q)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        recording = record(lambda: product(x))
        x.copy_(torch.randn(2, 64))
        recording.output.fill_(torch.nan)
        assert torch.equal(recording(), product(x))
    assert torch.equal(torch.compile(product, fullgraph=True, backend="eager")(x), product(x))
    assert replace(product).nbytes == q.nbytes
