"""Products of other libraries, for `bench kernels`: one function a peer, which imports it, so an absent one raises
ImportError and a weight it cannot take gives None. All on random weights of the shape and kind; none is checked for
what it computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.spec import Spec

_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Product:
    """x [M, K] -> [M, N], the bytes of weights it reads, and what it is in a word."""

    run: Callable[[Tensor], Any]
    nbytes: int
    path: str


def _int4(spec: Spec) -> bool:
    return spec.family == "affine" and spec.bits == 4 and spec.group in _GROUPS and not spec.view


def torch_int4(spec: Spec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Product | None:
    """torch's own int4 operator: tinygemm on CUDA (sm_80 and newer), its AVX cousin on the CPU."""
    if not _int4(spec) or dtype is not torch.bfloat16:
        return None
    n, k = shape
    scales = torch.rand(k // spec.group, n, 2, device=device).to(dtype)
    if device.type == "cpu":
        codes = torch.randint(0, 16, shape, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
        operator = torch.ops.aten._weight_int4pack_mm
    group = spec.group
    return Product(lambda x: operator(x, packed, group, scales), packed.nbytes + scales.nbytes, "int4pack")


def gemlite(spec: Spec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Product | None:
    """https://github.com/mobiusml/gemlite, float16, as its README packs a weight."""
    if device.type != "cuda" or spec.family != "affine" or spec.bits not in (2, 4, 8) or spec.group not in _GROUPS:
        return None
    from gemlite.core import DType, GemLiteLinear

    n, k = shape
    layer = GemLiteLinear(
        spec.bits, group_size=spec.group, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 1 << spec.bits, shape, dtype=torch.uint8, device=device)
    scales, zeros = (torch.rand(n * k // spec.group, 1, device=device).half() for _ in range(2))
    layer.pack(codes, scales, zeros, None)
    nbytes = n * k * spec.bits // 8 + scales.nbytes + zeros.nbytes
    return Product(lambda x: layer(x.half()), nbytes, "gemlite")


def bitsandbytes(spec: Spec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Product | None:
    """NF4 in blocks, without double quantization."""
    if spec.table not in ("nf4", "fp4"):
        return None
    from bitsandbytes import functional, matmul_4bit

    weight = torch.randn(shape, device=device).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=spec.group, quant_type=spec.table)
    return Product(lambda x: matmul_4bit(x, packed.t(), state), packed.nbytes + state.absmax.nbytes, "bitsandbytes")


def torchao(spec: Spec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Product | None:
    """Int4WeightOnlyConfig on an nn.Linear."""
    if not _int4(spec) or dtype is not torch.bfloat16:
        return None
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype))
    quantize_(layer, Int4WeightOnlyConfig(group_size=spec.group))
    n, k = shape
    return Product(layer, n * k // 2 + 4 * n * k // spec.group, "torchao")


# (spec, (outputs, inputs), device, dtype of x) -> product; None: not for such a weight; ImportError: not installed.
PEERS: dict[str, Callable[[Spec, tuple[int, int], torch.device, torch.dtype], Product | None]] = {
    "torch-int4": torch_int4,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}
