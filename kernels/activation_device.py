# mypy: allow-untyped-defs
"""Activations quantized on a device, in one launch and bit for bit as activation.py does."""

from typing import Any

import torch
from torch import Tensor

from . import activation
from .cases import Case, Target
from .lang import EXACT, jit, tl
from .plans import power_of_two
from .spec import Spec

_TORCH = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "mx": torch.float8_e4m3fn}
# Triton's names.
POINTERS = {"int8": "*i8", "fp8": "*fp8e4nv", "mx": "*fp8e4nv", "fp4": "*u8"}
# Inputs a program has in registers at a time, of a token whose FP4 scales wait for its largest number.
_FP4_BLOCK = 8192


@jit
def _round(v):
    """To the nearest integer, ties to even; |v| < 2**22."""
    return (v + 12582912.0) - 12582912.0


@jit
def _to_e4m3(v):
    """float32 that E4M3 holds exactly, ties to even: four significant bits, a step of 2**-9 below 2**-6."""
    v = tl.minimum(tl.maximum(v, -448.0), 448.0)
    bits = v.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = _round(v * 512.0) * 0.001953125
    return tl.where(tl.abs(v) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@jit
def _to_e2m1(v):
    """int32 codes of E2M1, ties to even: two significant bits, a step of 1/2 below 1."""
    magnitude = tl.minimum(tl.abs(v), 6.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    bits = (bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22
    # 1 is code 2 and has these bits 254.
    code = tl.where(magnitude < 1.0, _round(magnitude * 2.0).to(tl.int32), bits - 252)
    return code | tl.where(v < 0, 8, 0)


@jit
def quantize_kernel(
    x, q, steps, K, G: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> q [M, K], steps [M, G], SIZE inputs a step. BLOCK: a power of two of at least SIZE; GROUPS: steps a
    program. Grid (M, ceil(G / GROUPS))."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    c = tl.arange(0, BLOCK)
    k = g[:, None] * SIZE + c[None, :]
    inside = (c < SIZE)[None, :] & (k < K)
    v = tl.load(x + m * K + k, mask=inside, other=0).to(tl.float32)
    step = tl.div_rn(tl.maximum(tl.max(tl.abs(v), 1), 1e-12), TOP)
    if KIND == "mx":
        bits = step.to(tl.int32, bitcast=True)
        stored = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        tl.store(steps + m * G + g, stored.to(tl.uint8), mask=g < G)
        step = (stored << 23).to(tl.float32, bitcast=True)
    else:
        tl.store(steps + m * G + g, step, mask=g < G)
    v = tl.div_rn(v, tl.broadcast_to(step[:, None], (GROUPS, BLOCK)))
    v = _round(v) if KIND == "int8" else _to_e4m3(v)
    tl.store(q + m * K + k, v.to(q.dtype.element_ty), mask=inside)


@jit
def quantize_fp4_kernel(x, q, scales, steps, given, K, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """x [M, K], K a multiple of 16, given [1] or None -> q uint8 [M, K / 2], low code first, scales float8e4nv
    [M, K / 16], steps float32 [M]. Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    if given is None:
        top = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, K, BLOCK):
            top = tl.maximum(top, tl.abs(tl.load(x + m * K + first + c, mask=first + c < K, other=0).to(tl.float32)))
        step = tl.div_rn(tl.maximum(tl.max(top, 0), 1e-12), TOP)
    else:
        step = tl.load(given).to(tl.float32)
    tl.store(steps + m, step)
    for first in range(0, K, BLOCK):
        v = tl.load(x + m * K + first + c, mask=first + c < K, other=0).to(tl.float32)
        v = tl.reshape(v, (BLOCK // 16, 16))
        g = first // 16 + tl.arange(0, BLOCK // 16)
        largest = tl.max(tl.abs(v), 1)
        scale = tl.div_rn(largest, tl.full((BLOCK // 16,), 6.0, tl.float32))
        scale = _to_e4m3(tl.div_rn(scale, tl.broadcast_to(step, (BLOCK // 16,))))
        tl.store(scales + m * (K // 16) + g, scale.to(scales.dtype.element_ty), mask=g < K // 16)
        unit = scale * step
        unit = tl.where(unit == 0, float("inf"), unit)
        code = _to_e2m1(tl.div_rn(v, tl.broadcast_to(unit[:, None], (BLOCK // 16, 16))))
        low, high = tl.split(tl.reshape(code, (BLOCK // 2, 2)))
        b = first // 2 + tl.arange(0, BLOCK // 2)
        tl.store(q + m * (K // 2) + b, (low | (high << 4)).to(tl.uint8), mask=b < K // 2)


def quantize(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """`activation.quantize` of x [M, K] contiguous, in one launch."""
    kind, (m, k) = activation.kind(spec), x.shape
    size = activation.group(spec) if activation.group(spec) > 0 else k
    groups, block = -(-k // size), power_of_two(size)
    q = torch.empty(m, k, dtype=_TORCH[kind], device=x.device)
    steps = torch.empty(m, groups, dtype=torch.uint8 if kind == "mx" else torch.float32, device=x.device)
    each = max(1, 2048 // block)
    quantize_kernel[(m, -(-groups // each))](
        x, q, steps, k, groups, kind, activation.TOPS[kind], size, each, block,
        num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16, **EXACT,
    )  # fmt: skip
    return q, steps


def quantize_fp4(x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`activation.quantize_fp4` of x [M, K] contiguous, K a multiple of 16; codes two a byte, low one first."""
    m, k = x.shape
    q = torch.empty(m, k // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(m, k // 16, dtype=torch.float8_e4m3fn, device=x.device)
    steps = torch.empty(m, dtype=torch.float32, device=x.device)
    block = min(power_of_two(k), _FP4_BLOCK)
    quantize_fp4_kernel[(m,)](x, q, scales, steps, step, k, activation.TOPS["fp4"], block, num_warps=8, **EXACT)
    return q, scales, steps


def aot_case(target: Target, spec: Spec) -> Case:
    """One token of 4096 inputs."""
    k, kind = 4096, activation.kind(spec)
    size = activation.group(spec) if activation.group(spec) > 0 else k
    arguments: dict[str, Any] = {"x": f"*{target.dtype}", "q": POINTERS[kind], "K": "i32"}
    if kind == "fp4":
        fn, warps = quantize_fp4_kernel, 8
        arguments |= {"scales": "*fp8e4nv", "steps": "*fp32", "given": None}
        constants: dict[str, Any] = {"TOP": activation.TOPS[kind], "BLOCK": k}
    else:
        fn, warps = quantize_kernel, 4
        arguments["steps"] = "*u8" if kind == "mx" else "*fp32"
        constants = {
            "G": k // size, "KIND": kind, "TOP": activation.TOPS[kind], "SIZE": size, "GROUPS": max(1, 2048 // size),
            "BLOCK": size,
        }  # fmt: skip
    options = {"num_warps": warps, **EXACT}
    return Case("quantize", 1, str(spec), spec.family, fn, arguments, constants, options, target.dtype)
