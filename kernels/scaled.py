# mypy: allow-untyped-defs
"""y = x @ W.T in 8- and 4-bit tensor cores: activations are quantized per token (activation.py) and meet the stored
codes; no weight is decoded.

    kind   weight                                            instruction             runs where
    int8   affine8 .sym, a scale a row or group              int8 x int8 -> int32    sm_80 and newer, AMD
    fp8    minifloat8.e4m3, per tensor, row, group or tile   e4m3 x e4m3 -> float32  sm_89 and newer
    mx     minifloat8.e4m3.g32.e8m0 (MXFP8), and             scaled e4m3 blocks      sm_100 and sm_103 (tcgen05)
           minifloat4.e2m1.g32.e8m0 (MXFP4)                  e4m3 x e2m1             the same
    fp4    minifloat4.e2m1.g16.ue4m3.a4 (NVFP4)              scaled e2m1 blocks      sm_100, sm_103 and sm_120

Elsewhere dispatch rounds the activations and decodes the weights: the same product, by other means. sm_75 has an int8
instruction that Triton does not emit; on sm_120 Triton has one for MXFP8 and multiplies MXFP4 by E4M3 in bfloat16;
gfx942's E4M3 is another format.

  x        the quantized activations, int8 | float8e4nv [M, K], or as `weight`
  steps    float32 [M, 1], [M, G]; mx: uint8 [M, G]; fp4: float8e4nv [M, G], and `tokens` float32 [M]
  weight   int8 | float8e4nv | uint8 (two E2M1 codes, low one first) [N, STRIDE]: the rows of the QTensor's bit stream
           as they are (int8: the codes with the top bit flipped, which is code - 128), so nothing is packed anew
  scales   as in the QTensor, [R', G]
  y        [S, M, N] as in matmul.py, float32 partial sums where the split of K is above 1

int8 products are exact. FP8 products are added in float32 every BK inputs: Hopper's tensor cores keep 14 bits of a sum.
Left out: `torch._scaled_mm` and `_int_mm` for many rows; 4-bit weights times int8 (decoded); MXFP8 on sm_120; MXFP4
activations. Not to be used: of E4M3 by E2M1 with E4M3 scales of 16 Triton makes kind::mxf8f6f4 without a word, which
reads scales as E8M0 of 32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import activation, activation_device, bits, ops
from .cases import Case, Target, Weight
from .cuda import parse, processors_of
from .lang import EXACT, HAVE_TRITON, jit, tl
from .matmul import share, split_sum
from .plans import Plan, power_of_two
from .qtensor import QTensor
from .spec import Spec

LEAST = {"int8": 80, "fp8": 89, "mx": 100}
# tcgen05 of the data-centre Blackwells; sm_110 and sm_120 have other instructions.
_MX_BELOW = 110
# Triton 3.9 has it on sm_110 and sm_121 too, for which 3.6 fails to compile it.
_FP4_ON = (100, 103, 120)
_SUM_BLOCK = 1024
_WEIGHTS = {"e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8}


@jit
def _scale_row(scales, g, rn, N, K, SPEC: tl.constexpr):
    """float32 [BN]: scales of group g."""
    count = 1 if SPEC.group == -1 else tl.cdiv(K, SPEC.group)
    row = rn * 0 if SPEC.rows == -1 else rn // SPEC.rows
    return tl.load(scales + row * count + g, mask=rn < N, other=0).to(tl.float32)


@jit(do_not_specialize=["M"])
def scaled(
    x, steps, weight, scales, y, M, N, K, STRIDE,
    SPEC: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """int8 and fp8. STEP: inputs a step of x, -1 = all; a group of W is -1 or a multiple of BK, and so is STEP. Grid
    (ceil(N / BN), S, ceil(M / BM))."""
    rm = tl.program_id(2) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first, last = share(K, BK, 1)
    whole = tl.full((BM, BN), 0, tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(first, last):
        rk = step * BK + tl.arange(0, BK)
        a = tl.load(
            x + rm[:, None].to(tl.int64) * K + rk[None, :], mask=(rm < M)[:, None] & (rk < K)[None, :], other=0.0
        )
        at = weight + rn[None, :].to(tl.int64) * STRIDE + rk[:, None]
        b = tl.load(at, mask=(rn < N)[None, :] & (rk < K)[:, None], other=0.0)
        if SPEC.group == -1 and a.dtype == tl.int8:
            whole = tl.dot(a, b, whole, out_dtype=tl.int32)
        else:
            part = tl.dot(a, b, out_dtype=tl.int32 if a.dtype == tl.int8 else tl.float32).to(tl.float32)
            if SPEC.group != -1:
                part *= _scale_row(scales, step * BK // SPEC.group, rn, N, K, SPEC)[None, :]
            if STEP != -1:
                part *= tl.load(steps + rm * tl.cdiv(K, STEP) + step * BK // STEP, mask=rm < M, other=0)[:, None]
            acc += part
    if SPEC.group == -1:
        acc = (acc + whole.to(tl.float32)) * _scale_row(scales, 0, rn, N, K, SPEC)[None, :]
    if STEP == -1:
        acc *= tl.load(steps + rm, mask=rm < M, other=0)[:, None]
    out = y + (tl.program_id(1) * M + rm)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@jit(do_not_specialize=["M"])
def scaled_mx(
    x, steps, tokens, weight, scales, factor, y, M, N, K, STRIDE,
    X: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """mx and fp4: a scale per GROUP inputs on both sides. X, W: formats of x and the weight, e4m3, or e2m1 two a byte.
    tokens: float32 [M] and factor: [1], either may be None, multiply sums. K divides by GROUP. Grid as `scaled`."""
    rm = tl.program_id(2) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    PER_X: tl.constexpr = 2 if X == "e2m1" else 1
    PER_W: tl.constexpr = 2 if W == "e2m1" else 1
    first, last = share(K, BK, 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(first, last):
        rk = step * (BK // PER_X) + tl.arange(0, BK // PER_X)
        rb = step * (BK // PER_W) + tl.arange(0, BK // PER_W)
        rg = step * (BK // GROUP) + tl.arange(0, BK // GROUP)
        at = x + rm[:, None].to(tl.int64) * (K // PER_X) + rk[None, :]
        a = tl.load(at, mask=(rm < M)[:, None] & (rk < K // PER_X)[None, :], other=0.0)
        inside = (rg < K // GROUP)[None, :]
        a_step = tl.load(steps + rm[:, None] * (K // GROUP) + rg[None, :], mask=(rm < M)[:, None] & inside, other=0.0)
        at = weight + rn[None, :].to(tl.int64) * STRIDE + rb[:, None]
        b = tl.load(at, mask=(rn < N)[None, :] & (rb < K // PER_W)[:, None], other=0.0)
        b_step = tl.load(scales + rn[:, None] * (K // GROUP) + rg[None, :], mask=(rn < N)[:, None] & inside, other=0.0)
        acc = tl.dot_scaled(a, a_step, X, b, b_step, W, acc)
    if tokens is not None:
        acc *= tl.load(tokens + rm, mask=rm < M, other=0)[:, None]
    if factor is not None:
        acc *= tl.load(factor).to(tl.float32)
    out = y + (tl.program_id(1) * M + rm)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


def plan(rows: int, shape: tuple[int, int], spec: Spec, processors: int) -> Plan:
    """Tile and split of K for `rows` rows; any capability that launches it (tcgen05 takes scaled blocks of 128 rows
    only: fewer become bfloat16)."""
    n, k = shape
    bk = 128 if spec.group == -1 or spec.group % 128 == 0 else spec.group
    kind = activation.kind(spec)
    if blocks := kind in ("mx", "fp4"):
        # Sums of sm_120 are in registers: with 4 warps they would spill (192 bytes).
        warps = 8 if kind == "fp4" and rows > 128 else 4
        tile, stages = {"BM": 128, "BN": 64 if rows <= 128 else 128, "BK": 128}, 3
    elif rows <= 64:
        tile, warps, stages = {"BM": max(16, power_of_two(rows)), "BN": 64, "BK": bk}, 4, 4
    else:
        # A second tile of sums where groups have scales: 128 outputs would spill (336 bytes on sm_100).
        tile, warps, stages = {"BM": 128, "BN": 128 if spec.group == -1 else 64, "BK": min(bk, 64)}, 8, 3
    programs = -(-n // tile["BN"]) * -(-rows // tile["BM"])
    # Partial sums, 8 bytes each, under an eighth of the weights' bytes: 8 * rows * split <= k / 8.
    split = max(1, min(2 * processors // programs, k // (64 * rows), -(-k // tile["BK"])))
    return Plan("scaled_mx" if blocks else "scaled", tile, warps, stages, split)


def problem(spec: Spec, k: int, capability: int) -> str:
    """Why a weight of `k` inputs cannot be multiplied natively on a GPU of that capability, or ""."""
    return machine_problem(activation.kind(spec), capability) or layout_problem(spec, k)


def machine_problem(kind: str, capability: int) -> str:
    """Why a GPU has no dot of that kind, or ""."""
    if not HAVE_TRITON:
        return "triton is missing"
    if kind == "fp4":
        has = capability in _FP4_ON
    else:
        has = capability >= LEAST[kind] and (kind != "mx" or capability < _MX_BELOW)
    return "" if has else f"sm_{capability} has no {kind} dot"


def layout_problem(spec: Spec, k: int) -> str:
    """Why a native dot cannot take this weight of `k` inputs anywhere, or ""."""
    kind = activation.kind(spec)
    if kind == "int8" and (spec.family, spec.bits, spec.zero) != ("affine", 8, "sym"):
        return f"{spec}: only symmetric 8-bit codes are int8 as they are"
    if kind in ("fp8", "mx") and spec.table != "e4m3" and (kind, spec.table) != ("mx", "e2m1"):
        return f"{spec}: only E4M3 codes go into the dot as they are, and E2M1 with a power of two per 32 inputs"
    if spec.view or spec.two_level or (kind == "fp8" and spec.scale in ("e8m0", "ue4m3")):
        return f"{spec}: its scales are not one plain level per row and group"
    if kind != "fp4" and spec.group != -1 and (spec.group not in (32, 64) and spec.group % 128):
        return f"{spec}: a group must be 32, 64 or a multiple of 128 inputs"
    if kind in ("mx", "fp4") and k % spec.group:
        return f"{spec}: {k} inputs are not whole groups"
    if any(step != "perm" for step in spec.pre) or spec.post:
        return f"{spec}: it has steps around the product"
    return ""


@dataclass(frozen=True)
class ScaledMatmul:
    """x -> x @ W.T with 8- or 4-bit activations, natively. Made by `prepare`."""

    name: str
    # What the kernels are compiled for.
    spec: str
    # Its codes are in `weight`.
    q: QTensor
    weight: Tensor
    dtype: torch.dtype
    perm: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K], any float dtype and strides -> [..., N] in x's dtype."""
        n, k = self.q.shape
        rows = x.reshape(-1, k).to(self.dtype)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], n)
        rows = rows.contiguous() if self.perm is None else rows.index_select(1, self.perm)
        parts = self.q.parts
        factor, step = parts.get("global_scale"), parts.get("act_step")
        y: Tensor = multiply(rows, self.weight, parts["scales"], self.spec, n, factor, step)
        return y.to(x.dtype).view(*x.shape[:-1], n)

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        codes = self.weight.view(torch.uint8)
        codes = (codes ^ 0x80 if self.weight.dtype is torch.int8 else codes).view(torch.int32)
        return replace(self.q, parts={"codes": codes, **self.q.parts})


def prepare(q: QTensor, dtype: torch.dtype, act: str = "") -> ScaledMatmul:
    """The product with activations as `act` says, or else the spec, whose `problem` must be empty; `dtype` is theirs
    before they are quantized."""
    asked = replace(q.spec, pre=(), act=act or q.spec.act)
    kind = activation.kind(asked)
    spec = asked if kind == "fp4" else replace(asked, act="")
    raw = bits.row_bytes(q.parts["codes"])
    weight = (raw ^ 0x80).view(torch.int8) if kind == "int8" else raw.view(_WEIGHTS[q.spec.table])
    rest = {name: t.contiguous() for name, t in q.parts.items() if name != "codes"}
    perm = q.parts["perm"].long() if "perm" in q.spec.pre else None
    return ScaledMatmul(f"triton-{kind}", str(spec), replace(q, parts=rest), weight, dtype, perm)


def _multiply(
    x: Tensor, weight: Tensor, scales: Tensor, spec: str, n: int, factor: Tensor | None, step: Tensor | None
) -> Tensor:
    found, (m, k), tokens = parse(spec), x.shape, None
    how = plan(m, (n, k), found, processors_of(x.device))
    if activation.kind(found) == "fp4":
        q, steps, tokens = activation_device.quantize_fp4(x, step)
        scales = scales.view(steps.dtype)
    else:
        q, steps = activation_device.quantize(x, found)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    out = y if how.split == 1 else torch.empty(how.split, m, n, dtype=torch.float32, device=x.device)
    grid: tuple[int, ...] = (-(-n // how.tile["BN"]), how.split, -(-m // how.tile["BM"]))
    sizes = (m, n, k, weight.stride(0))
    if how.kernel == "scaled_mx":
        formats = ("e4m3" if tokens is None else "e2m1", found.table, found.group)
        scaled_mx[grid](q, steps, tokens, weight, scales, factor, out, *sizes, *formats, **how.tile, **how.options)
    else:
        per = activation.group(found)
        scaled[grid](q, steps, weight, scales, out, *sizes, found, per, **how.tile, **how.options)
    if how.split > 1:
        split_sum[(-(-m * n // _SUM_BLOCK),)](out, y, how.split, m * n, BLOCK=_SUM_BLOCK, num_warps=4, **EXACT)
    return y


def _multiply_fake(
    x: Tensor, weight: Tensor, scales: Tensor, spec: str, n: int, factor: Tensor | None, step: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], n)


multiply = ops.define(
    "scaled(Tensor x, Tensor weight, Tensor scales, str spec, int n, Tensor? factor, Tensor? step) -> Tensor",
    _multiply,
    _multiply_fake,
)

_AOT_SPECS = {
    "int8": ("affine8.channel.sym", "affine8.g128.sym"),
    "fp8": ("minifloat8.e4m3.channel.f32", "minifloat8.e4m3.g128x128.f32"),
    "mx": ("minifloat8.e4m3.g32.e8m0", "minifloat4.e2m1.g32.e8m0"),
    "fp4": ("minifloat4.e2m1.g16.ue4m3.a4",),
}


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """Both steps of the kinds a target has, for one token and for many rows."""
    for kind, specs in _AOT_SPECS.items():
        if machine_problem(kind, target.capability) or (target.amd and kind != "int8"):
            continue
        for spec in map(Spec.parse, specs):
            yield activation_device.aot_case(target, spec)
            for rows in (1, 256):
                yield _scaled_case(target, kind, spec, rows)


def _scaled_case(target: Target, kind: str, spec: Spec, rows: int) -> Case:
    how = plan(rows, (4096, 4096), spec, 108)
    stored = {"f16": "*fp16", "f32": "*fp32", "e8m0": "*u8", "ue4m3": "*fp8e4nv"}[spec.scale]
    arguments: dict[str, Any] = {
        "x": activation_device.POINTERS[kind], "steps": stored if kind in ("mx", "fp4") else "*fp32",
        "weight": "*u8" if spec.table == "e2m1" else activation_device.POINTERS[kind], "scales": stored,
        "y": "*fp32" if how.split > 1 else f"*{target.dtype}", **dict.fromkeys(("M", "N", "K", "STRIDE"), "i32"),
    }  # fmt: skip
    extra: dict[str, Any] = {"SPEC": spec, "STEP": activation.group(spec)}
    if how.kernel == "scaled_mx":
        fp4 = kind == "fp4"
        arguments |= {"tokens": "*fp32" if fp4 else None, "factor": "*fp32" if fp4 else None}
        extra = {"X": "e2m1" if fp4 else "e4m3", "W": spec.table, "GROUP": spec.group}
    fn = scaled_mx if how.kernel == "scaled_mx" else scaled
    return Case(
        how.kernel, rows, str(spec), spec.family, fn, arguments, {**extra, **how.tile}, how.options, target.dtype
    )
