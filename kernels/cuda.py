"""Quantized matmul on a GPU: repack once, then the template that suits the number of rows.

    rows            sm_80 and newer             AMD          older
    1 to 2          gemv                        gemv         gemv
    3 to 8          gemm (decode + tl.dot)      gemv         gemv
    9 to 64         gemm                        gemm         dequant, then the BLAS
    65 and more     dequant, then the BLAS, everywhere

Below sm_80 Triton's dot becomes plain multiply-adds while cuBLAS uses the tensor cores of Volta and Turing, hence the
last column. bfloat16 arithmetic also starts at sm_80: on older GPUs the same model runs in float16 with float32
accumulation, and the log says so. The thresholds and tile sizes here are estimates checked only by compiling
(results/aot.json); where a device was measured, its table decides instead (plans.py).

With TRITON_INTERPRET=1 all of this runs on CPU tensors, which is how it is tested.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from . import matmul, ops, repack
from .cases import Case, Target, Weight
from .lang import EXACT, need_triton
from .plans import Plan, power_of_two, tuned
from .qtensor import QTensor
from .spec import Spec
from .tiles import Parts, Triple
from .transform import apply_post, apply_pre

log = logging.getLogger(__name__)

# Rows that gemv can take, and those it does where gemm is compiled to the tensor cores of sm_80 and newer. Counted in
# the loops of sm_80, sm_90 and sm_120, instructions a weight (sm_90; registers of a thread):
#
#                                gemv: 1 row     2           4           8           gemm, to 16
#   affine4.g128.asym            7.7   (96)      10.8 (95)   13.4 (128)  20.6 (128)  11.2 (96)
#   Q4_K                         8.9   (95)      14.1 (95)   16.8 (127)  23.8 (126)  11.6 (80)
#   codebook4.nf4.g64            7.9   (119)     10.4 (95)   13.1 (148)  20.1 (128)   9.9 (80)
#   codebook8.v8.x2              8.2   (128)     10.3 (122)  12.9 (168)  19.2 (165)   8.5 (71)
#   IQ3_XXS                      19.4  (164)     25.3 (127)  27.1 (203)  36.5 (186)  21.4 (122)
#   trellis3.mcg                 10.3  (95)      22.6 (98)   24.9 (132)  31.8 (128)  18.7 (80)
#
# The weights that programs of one multiprocessor have in flight are 4096 (affine4, 8 rows) against 20480. AMD's counts
# do not agree (4 rows, 8, gemm: affine4 on gfx1100 15, 26, 18; codebook8.v8.x2 11, 18, 27), so it stays with gemv.
GEMV_ROWS = 8
_GEMV_ROWS_BESIDE_DOTS = 2
GEMM_ROWS = 64
# Of the interpreter, and of a compilation with no device.
_ASSUMED_CAPABILITY, _ASSUMED_PROCESSORS = 80, 108
_SUM_BLOCK = 1024


def plan(
    rows: int, shape: tuple[int, int], capability: int = _ASSUMED_CAPABILITY, processors: int = _ASSUMED_PROCESSORS
) -> Plan:
    """The template for `rows` inputs to a weight of `shape` (N, K), and its launch.

    capability: 10 * major + minor; processors: multiprocessors (compute units) of the device.
    """
    few = GEMV_ROWS if capability < 80 or torch.version.hip else _GEMV_ROWS_BESIDE_DOTS
    dots = capability >= 80 and rows <= GEMM_ROWS
    return plan_of("gemv" if rows <= few else "gemm" if dots else "dequant", rows, shape, processors)


def plan_of(kernel: str, rows: int, shape: tuple[int, int], processors: int = _ASSUMED_PROCESSORS) -> Plan:
    """How that template (gemv: up to GEMV_ROWS) is launched where nobody measured it.

    One tile for all families: for vector codebooks, IQ grids and the trellis too, the smaller ones that were compiled
    for sm_90 decode with more instructions a weight (gemv of one row 32 x 128 | 32 x 64 | 16 x 128: IQ3_XXS 19 | 28 |
    28, trellis3 10 | 25 | 27) and have no more weights in flight, and 8 warps halve those.
    """
    n, k = shape
    if kernel == "dequant":
        return Plan("dequant", {"BN": 64, "BK": 64}, 4, 1)
    bm = power_of_two(rows)
    if kernel == "gemv":
        # acc [BM, BK, BN] lives in registers, 32 to 64 a thread. BM * BK >= 128, one input a thread: below
        # that Triton replaces the load of x by one broadcast load a number (BN 64, BK 64: 35 loads instead
        # of 4).
        tile, stages = {"BM": bm, "BN": 32, "BK": 128 if bm == 1 else 64 if bm <= 4 else 32}, 2
    else:
        tile, stages = {"BM": min(128, max(16, bm)), "BN": 64, "BK": 64}, 3
    # Enough programs to fill the device four times over, unless partial sums (8 bytes each, written and read)
    # would come to more than an eighth of 4-bit weights: 8 * rows * split <= k / 2 / 8.
    programs = -(-n // tile["BN"])
    split = max(1, min(4 * processors // programs, k // (128 * rows)))
    return Plan(kernel, tile, 4, stages, split)


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
        self._spec = str(self.packed.spec)
        self.extra = q.extra
        self.capability, self.processors = _device(q.parts["codes"].device)
        self.dtype = compute_dtype(dtype, self.capability)

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        return replace(repack.unpack(self.packed), extra=self.extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts held."""
        return sum(t.nbytes for t in (*self.packed.parts, *self.packed.sides.values()) if t is not None)

    @property
    def plain(self) -> bool:
        """Whether the product is nothing but the packed weight's: no step on the input or the output, no padding."""
        packed = self.packed
        return packed.original == packed.original.without_steps() and packed.weight_shape == packed.shape

    def rebase(self, parts: Parts) -> None:
        """Hold `parts`, which say the same, instead: views of a larger buffer."""
        self.packed = replace(self.packed, parts=parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K], any float dtype and strides -> [..., N] in x's dtype."""
        n, k = self.packed.weight_shape
        rows = x.reshape(-1, k).to(self.dtype)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], n)
        steps, sides = self.packed.original, self.packed.sides
        stored = self.packed.shape
        rows = apply_pre(steps, sides, rows, stored[1]).contiguous()
        y: Tensor = multiply(rows, list(self.packed.parts), self._spec, stored[0])
        return apply_post(steps, sides, y, n).to(x.dtype).reshape(*x.shape[:-1], n)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The packed weight [N, K], without the steps around the product: float32 values rounded once to `dtype`."""
        found: Tensor = dequantize(list(self.packed.parts), self._spec, *self.packed.shape, dtype)
        return found


parse = cache(Spec.parse)


@cache
def chosen(spec: str, shape: tuple[int, int], rows: int, device: torch.device) -> Plan:
    """The measured plan for `device` where there is one (plans.py), else `plan`'s; remembered."""
    measured = tuned(gpu_name(device), (spec, *shape), rows) if device.type == "cuda" else None
    return measured or plan(rows, shape, *_device(device))


def _multiply(x: Tensor, parts: list[Tensor | None], spec: str, n: int) -> Tensor:
    m, k = x.shape
    # Beyond that the number of rows changes nothing, and every one would be remembered.
    how = chosen(spec, (n, k), m if m <= GEMM_ROWS else power_of_two(m), x.device)
    if how.kernel == "dequant":
        return torch.nn.functional.linear(x, decode(Parts(*parts), parse(spec), (n, k), x.dtype, how))
    return launch(x, Parts(*parts), parse(spec), n, how)


def launch(x: Tensor, parts: Parts, spec: Spec, n: int, how: Plan) -> Tensor:
    """x [M, K] contiguous @ W.T -> [M, N] in x's dtype, by `how` (gemv or gemm)."""
    m, k = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    out = y if how.split == 1 else torch.empty(how.split, m, n, dtype=torch.float32, device=x.device)
    grid: tuple[int, ...] = (-(-n // how.tile["BN"]), how.split, -(-m // how.tile["BM"]))
    kernel = getattr(matmul, how.kernel)
    kernel[grid](x, parts, out, m, n, k, spec, triple(spec.family), **how.tile, **how.options)
    if how.split > 1:
        matmul.split_sum[(-(-m * n // _SUM_BLOCK),)](out, y, how.split, m * n, BLOCK=_SUM_BLOCK, num_warps=4, **EXACT)
    return y


def decode(parts: Parts, spec: Spec, shape: tuple[int, int], dtype: torch.dtype, how: Plan) -> Tensor:
    """The weight [N, K], float32 values rounded once, by `how` (dequant)."""
    n, k = shape
    out = torch.empty(n, k, dtype=dtype, device=parts.codes.device)
    grid = (-(-n // how.tile["BN"]), -(-k // how.tile["BK"]))
    matmul.dequant[grid](parts, out, n, k, spec, triple(spec.family), **how.tile, **how.options)
    return out


def _dequantize(parts: list[Tensor | None], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return decode(Parts(*parts), parse(spec), (n, k), dtype, plan(GEMM_ROWS + 1, (n, k)))


def _multiply_fake(x: Tensor, parts: list[Tensor | None], spec: str, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _dequantize_fake(parts: list[Tensor | None], spec: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    assert parts[0] is not None
    return parts[0].new_empty(n, k, dtype=dtype)


# x [M, K] contiguous in the dtype products run in, parts a tiles.Parts in order -> [M, n].
multiply = ops.define("matmul(Tensor x, Tensor?[] parts, str spec, int n) -> Tensor", _multiply, _multiply_fake)
# -> [n, k]: the decoded weight, float32 values rounded once.
dequantize = ops.define(
    "dequant(Tensor?[] parts, str spec, int n, int k, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake
)


@cache
def capability_of(device: torch.device) -> int:
    """10 * major + minor; 80 for the interpreter."""
    return _device(device)[0]


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; 108 for the interpreter."""
    return _device(device)[1]


def _device(device: torch.device) -> tuple[int, int]:
    """(capability, multiprocessors) of a device."""
    if device.type != "cuda":
        return _ASSUMED_CAPABILITY, _ASSUMED_PROCESSORS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        # Their numbers are others (gfx942 says 9.4); all that are supported have matrix cores and bfloat16.
        return _ASSUMED_CAPABILITY, processors
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, processors


@cache
def gpu_name(device: torch.device) -> str:
    """What torch calls it: "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


# (kernel, rows of x): gemv once per size of its accumulator.
KERNELS = (("gemv", 1), ("gemv", 8), ("gemm", 16), ("dequant", 128))


def aot_cases(target: Target, weights: Sequence[Weight], shape: tuple[int, int] = (4096, 4096)) -> Iterator[Case]:
    """Every template and weight, those too that only a measured table would choose there (a GPU older than sm_80 is
    compiled gemm, a newer one gemv of 8 rows), and the sum of a split."""
    types = {"partial": "*fp32", "y": f"*{target.dtype}", "S": "i32", "SIZE": "i32"}
    sizes, options = {"BLOCK": _SUM_BLOCK}, {"num_warps": 4, **EXACT}
    yield Case("split_sum", 1, "", "matmul", matmul.split_sum, types, sizes, options, target.dtype)
    for weight in weights:
        for kernel, rows in KERNELS:
            how = plan_of(kernel, rows, shape)
            arguments = {
                "x": f"*{target.dtype}",
                "parts": weight.pointers,
                "y": "*fp32" if how.split > 1 else f"*{target.dtype}",
                **dict.fromkeys("MNK", "i32"),
            }
            constants = {"SPEC": weight.spec, "TRIPLE": triple(weight.spec.family), **how.tile}
            fn, spec = getattr(matmul, kernel), weight.spec
            yield Case(kernel, rows, str(spec), spec.family, fn, arguments, constants, how.options, target.dtype)
