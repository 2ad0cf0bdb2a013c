"""Device code without a device: the interpreted suite in a process of its own, and what surrounds the kernels."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from bitsmith.kernels import bits, cuda, repack
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec

HERE = Path(__file__).parent
INTERPRETED = sorted(map(str, HERE.glob("triton_interpreted*.py")))


def _run_interpreted(marker: str) -> str:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("triton 3.6's interpreter cannot loop to a run-time bound with numpy 2.4 or newer")
    command = [sys.executable, "-m", "pytest", *INTERPRETED, "-m", marker, "-p", "no:cacheprovider", "--tb=short"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_interpreted() -> None:
    assert " passed" in _run_interpreted("not slow")


@pytest.mark.slow
def test_interpreted_full_product() -> None:
    assert " passed" in _run_interpreted("slow")


def test_imports_and_messages_without_triton() -> None:
    """With triton hidden, every device module imports, and use says what to install."""
    code = """
import sys, importlib
sys.modules["triton"] = None
import torch
from bitsmith.errors import UserError
for name in "lang tiles affine_device minifloat_device codebook_device trellis_device transform_device matmul repack cuda grouped activation_device scaled fused sample ops plans tune aot".split():
    importlib.import_module(f"bitsmith.kernels.{name}")
from bitsmith.kernels import aot, bits, cuda, lang, matmul, repack
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec
assert not lang.HAVE_TRITON and not lang.interpreted()
q = QTensor(Spec.parse("affine4.g32.sym"), (1, 32), {"codes": bits.pack(torch.zeros(1, 32, dtype=torch.uint8), 4)})
make = lambda: cuda.CudaMatmul(q, torch.float16)
for use in (make, lambda: matmul.gemv[(1,)](), lambda: matmul.decode(), lambda: next(aot.table())):
    try:
        use()
    except UserError as error:
        print(error)
print(repack.supported(q))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    starts = ["running affine4.g32.sym weights on a GPU: ", "gemv: ", "decode: ", "compiling kernels ahead of time: "]
    starts.append("affine4.g32.sym: ")
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(
            start + "this needs triton 3.6 to 3.9, which is not installed: pip install 'bitsmith[triton]'"
        )


def test_plan_chooses_by_rows_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (4096, 4096)
    assert [cuda.plan(rows, shape, 80).kernel for rows in (1, 2, 3, 64, 65)] == ["gemv"] * 2 + ["gemm"] * 2 + [
        "dequant"
    ]
    assert [cuda.plan(rows, shape, 75).kernel for rows in (1, 8, 9, 64)] == ["gemv"] * 2 + ["dequant"] * 2
    assert cuda.plan(1, (4096, 4096), 90, 132).split == 4
    assert cuda.plan(1, (128256, 4096), 90, 132).split == 1
    for rows in range(1, 65):
        tile = cuda.plan(rows, shape).tile
        assert tile["BM"] >= min(rows, 64) and tile["BK"] % 32 == 0
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [cuda.plan(rows, shape, 80).kernel for rows in (8, 9, 64)] == ["gemv", "gemm", "gemm"]


def test_bfloat16_below_sm_80_runs_in_float16_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    cuda.compute_dtype.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [cuda.compute_dtype(torch.bfloat16, 75) for _ in range(3)] == [torch.float16] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "sm_75 has no bfloat16: running in float16 with float32 accumulation"
    ]
    assert cuda.compute_dtype(torch.bfloat16, 80) == torch.bfloat16
    assert cuda.compute_dtype(torch.float32, 60) == torch.float32


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("affine4.g64.zf16.axis0", (64, 64), "axis 0"),
        ("codebook4.nf4.g64.f32.flat", (64, 96), "straddle"),
    ],
)
def test_unsupported_says_why(text: str, shape: tuple[int, int], words: str) -> None:
    q = QTensor(Spec.parse(text), shape, {"codes": torch.zeros(1, 1, dtype=torch.int32)})
    assert words in repack.supported(q)
    assert text in repack.supported(q)


def test_a_gpu_older_than_the_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (5, 2))
    monkeypatch.setattr(repack, "HAVE_TRITON", True)
    q = QTensor(Spec.parse("affine4.g32.sym"), (1, 32), {"codes": OnDevice()})
    assert repack.supported(q) == "affine4.g32.sym: the kernels need sm_60 or newer and cuda:0 is sm_52"


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("k", [1, 32, 45, 160])
def test_planes_are_the_codes(width: int, k: int) -> None:
    """By the definition in tiles.py, bit by bit, with no help from `repack`."""
    codes = torch.randint(0, 1 << width, (3, k), dtype=torch.uint8)
    spec = Spec.parse(f"affine{width}.channel.sym")
    q = QTensor(spec, (3, k), {"codes": bits.pack(codes, width), "scales": torch.ones(3, 1, dtype=torch.float16)})
    packed = repack.pack(q)
    blocks = -(-k // 32)
    planes = packed.parts.codes
    assert planes.shape == (width * blocks, 3)
    found = torch.zeros(k, 3, dtype=torch.int64)
    below = row = 0
    for w in [w for w in (8, 4, 2, 1) if width & w]:
        for i in range(k):
            word = planes[row + i * w // 32].long() & 0xFFFFFFFF
            found[i] |= ((word >> (i * w % 32)) & ((1 << w) - 1)) << below
        below, row = below + w, row + w * blocks
    assert torch.equal(found.T, codes.long())
    assert torch.equal(repack.unpack(packed).parts["codes"], q.parts["codes"])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a CUDA device and triton"
)
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
@pytest.mark.parametrize("text", ["affine4.g128.asym", "affine3.g64.sym", "minifloat8.e4m3.tensor.f32"])
def test_on_a_device(text: str, rows: int) -> None:
    spec = Spec.parse(text)
    codes = torch.randint(0, (1 << spec.bits) - 2, (300, 256), dtype=torch.uint8) & 0x77
    grid = {"affine4.g128.asym": (300, 2), "affine3.g64.sym": (300, 4)}.get(text, (1, 1))
    parts = {"codes": bits.pack(codes & ((1 << spec.bits) - 1), spec.bits)}
    parts["scales"] = torch.rand(grid).half() if spec.family == "affine" else torch.rand(grid) / 512
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 16, grid, dtype=torch.uint8)
    q = QTensor(spec, (300, 256), parts).to("cuda")
    matmul = cuda.CudaMatmul(q, torch.float16)
    assert torch.equal(matmul.weight(torch.float32), q.dequantize())
    x = torch.randn(rows, 256, device="cuda", dtype=torch.float16)
    wanted = x.double() @ q.dequantize().double().T
    assert (matmul(x).double() - wanted).norm() / wanted.norm() < 5e-4
