"""Quantized matmul on a GPU: repack once, then the template that suits the number of rows.

    rows            sm_80 and newer, AMD        older
    1 to 8          gemv                        gemv
    9 to 64         gemm (decode + tl.dot)      dequant, then the BLAS
    65 and more     dequant, then the BLAS      dequant, then the BLAS

Below sm_80 Triton's dot becomes plain multiply-adds while cuBLAS uses the tensor cores of Volta and Turing, hence the
second column. bfloat16 arithmetic also starts at sm_80: on older GPUs the same model runs in float16 with float32
accumulation, and the log says so. The thresholds and tile sizes are estimates checked only by compiling
(results/aot.json), not yet by timing on a device.

With TRITON_INTERPRET=1 all of this runs on CPU tensors, which is how it is tested.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import matmul, repack
from .lang import EXACT, need_triton
from .qtensor import QTensor
from .spec import Spec
from .tiles import Triple

log = logging.getLogger(__name__)

GEMV_ROWS = 8
GEMM_ROWS = 64
# Of the interpreter, and of a compilation with no device.
_ASSUMED_CAPABILITY, _ASSUMED_PROCESSORS = 80, 108
_SUM_BLOCK = 1024


@dataclass(frozen=True)
class Plan:
    """How one product is computed. Set by `plan`, read by CudaMatmul and by the ahead-of-time compilation."""

    # gemv | gemm | dequant
    kernel: str
    # Tile sizes, as the kernel's constexprs.
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    # Programs that share one output tile, each with its part of K.
    split: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **EXACT}


def plan(
    rows: int, shape: tuple[int, int], capability: int = _ASSUMED_CAPABILITY, processors: int = _ASSUMED_PROCESSORS
) -> Plan:
    """The template for `rows` inputs to a weight of `shape` (N, K).

    capability: 10 * major + minor; processors: multiprocessors (compute units) of the device.
    """
    n, k = shape
    if rows <= GEMV_ROWS:
        bm = _power_of_two(rows)
        # acc [BM, BK, BN] lives in registers, 32 to 64 a thread. BM * BK >= 128, one input a thread: below
        # that Triton replaces the load of x by one broadcast load a number (BN 64, BK 64: 35 loads instead
        # of 4).
        tile, warps, stages = {"BM": bm, "BN": 32, "BK": 128 if bm == 1 else 64 if bm <= 4 else 32}, 4, 2
    elif rows <= GEMM_ROWS and capability >= 80:
        tile, warps, stages = {"BM": max(16, _power_of_two(rows)), "BN": 64, "BK": 64}, 4, 3
    else:
        return Plan("dequant", {"BN": 64, "BK": 64}, 4, 1)
    # Enough programs to fill the device four times over, unless partial sums (8 bytes each, written and read)
    # would come to more than an eighth of 4-bit weights: 8 * rows * split <= k / 2 / 8.
    programs = -(-n // tile["BN"])
    split = max(1, min(4 * processors // programs, k // (128 * rows)))
    return Plan("gemv" if rows <= GEMV_ROWS else "gemm", tile, warps, stages, split)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def triple(family: str) -> Triple:
    """Device functions of a family, from <family>_device.py."""
    found: Triple = import_module(f".{family}_device", __package__).TRIPLE
    return found


@cache
def compute_dtype(dtype: torch.dtype, capability: int) -> torch.dtype:
    """The dtype products of a `dtype` model run in; logged once where it is not that one."""
    if dtype is torch.bfloat16 and capability < 80:
        log.warning("sm_%d has no bfloat16: running in float16 with float32 accumulation", capability)
        return torch.float16
    return dtype


class CudaMatmul:
    """x -> x @ W.T for one quantized weight on one device.

    q: a QTensor on the device, `repack.supported(q)` empty; dtype: what products are computed in, 16-bit or float32.
    Raises UserError where triton is missing.
    """

    name = "triton"

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        need_triton(f"running {q.spec} weights on a GPU")
        self.packed = repack.pack(q)
        self.extra = q.extra
        self.capability, self.processors = _device(q.parts["codes"].device)
        self.dtype = compute_dtype(dtype, self.capability)
        self._perm = None if self.packed.perm is None else self.packed.perm.long()

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        return replace(repack.unpack(self.packed), extra=self.extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts held."""
        return sum(t.nbytes for t in (*self.packed.parts, self.packed.perm) if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K], any float dtype and strides -> [..., N] in x's dtype."""
        n, k = self.packed.shape
        rows = x.reshape(-1, k).to(self.dtype)
        if self._perm is not None:
            rows = rows.index_select(1, self._perm)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], n)
        chosen = plan(rows.shape[0], (n, k), self.capability, self.processors)
        if chosen.kernel == "dequant":
            y = torch.nn.functional.linear(rows, self.weight(self.dtype))
        else:
            y = self._multiply(rows.contiguous(), chosen)
        return y.to(x.dtype).view(*x.shape[:-1], n)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The packed columns [N, K] (a permuted weight stays permuted), float32 values rounded once to `dtype`."""
        n, k = self.packed.shape
        out = torch.empty(n, k, dtype=dtype, device=self.packed.parts.codes.device)
        how = plan(GEMM_ROWS + 1, (n, k))
        grid = (-(-n // how.tile["BN"]), -(-k // how.tile["BK"]))
        matmul.dequant[grid](self.packed.parts, out, n, k, *self._what(), **how.tile, **how.options)
        return out

    def _what(self) -> tuple[Spec, Triple]:
        return self.packed.spec, triple(self.packed.spec.family)

    def _multiply(self, x: Tensor, how: Plan) -> Tensor:
        m, (n, k) = x.shape[0], self.packed.shape
        y = torch.empty(m, n, dtype=self.dtype, device=x.device)
        out = y if how.split == 1 else torch.empty(how.split, m, n, dtype=torch.float32, device=x.device)
        grid: tuple[int, ...] = (-(-n // how.tile["BN"]), how.split, -(-m // how.tile["BM"]))
        kernel = getattr(matmul, how.kernel)
        kernel[grid](x, self.packed.parts, out, m, n, k, *self._what(), **how.tile, **how.options)
        if how.split > 1:
            matmul.split_sum[(-(-m * n // _SUM_BLOCK),)](
                out, y, how.split, m * n, BLOCK=_SUM_BLOCK, num_warps=4, **EXACT
            )
        return y


def _device(device: torch.device) -> tuple[int, int]:
    """(capability, multiprocessors) of a device."""
    if device.type != "cuda":
        return _ASSUMED_CAPABILITY, _ASSUMED_PROCESSORS
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count
