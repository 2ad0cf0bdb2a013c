"""Products of other libraries, for `bench kernels`: one function a peer, which imports it, so an absent one raises
ImportError and a weight it cannot take gives {}. llama.cpp multiplies with the very weight that is ours; the others
with random ones of its shape and kind, and are not checked for what they compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from . import ggml_peer

_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Product:
    """x [M, K] -> [M, N], the bytes of weights it reads, and what it is in a word."""

    run: Callable[[Any], Any]
    nbytes: int
    path: str
    # x -> what `run` takes, made outside the clock; None: x itself.
    bind: Callable[[Tensor], Any] | None = None

    def call(self, x: Tensor) -> Callable[[], Any]:
        """What the clock times."""
        return partial(self.run, x if self.bind is None else self.bind(x))


def device_of(q: QTensor) -> torch.device:
    return q.parts["codes"].device


def _int4(spec: Spec) -> bool:
    return spec.family == "affine" and spec.bits == 4 and spec.group in _GROUPS and not spec.view


def torch_int4(q: QTensor, dtype: torch.dtype) -> dict[str, Product]:
    """torch's own int4 operator: tinygemm on CUDA (sm_80 and newer), its AVX cousin on the CPU."""
    spec, (n, k), device = q.spec, q.shape, device_of(q)
    if not _int4(spec) or dtype is not torch.bfloat16:
        return {}
    scales = torch.rand(k // spec.group, n, 2, device=device).to(dtype)
    if device.type == "cpu":
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
        operator = torch.ops.aten._weight_int4pack_mm
    group = spec.group
    product = Product(lambda x: operator(x, packed, group, scales), packed.nbytes + scales.nbytes, "int4pack")
    return {"torch-int4": product}


def gemlite(q: QTensor, dtype: torch.dtype) -> dict[str, Product]:
    """https://github.com/mobiusml/gemlite, float16, as its README packs a weight."""
    spec, (n, k), device = q.spec, q.shape, device_of(q)
    if device.type != "cuda" or spec.family != "affine" or spec.bits not in (2, 4, 8) or spec.group not in _GROUPS:
        return {}
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        spec.bits, group_size=spec.group, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 1 << spec.bits, (n, k), dtype=torch.uint8, device=device)
    scales, zeros = (torch.rand(n * k // spec.group, 1, device=device).half() for _ in range(2))
    layer.pack(codes, scales, zeros, None)
    nbytes = n * k * spec.bits // 8 + scales.nbytes + zeros.nbytes
    return {"gemlite": Product(layer, nbytes, "gemlite", Tensor.half)}


def bitsandbytes(q: QTensor, dtype: torch.dtype) -> dict[str, Product]:
    """NF4 in blocks, without double quantization."""
    spec = q.spec
    if spec.table not in ("nf4", "fp4"):
        return {}
    from bitsandbytes import functional, matmul_4bit

    weight = torch.randn(q.shape, device=device_of(q)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=spec.group, quant_type=spec.table)
    nbytes = packed.nbytes + state.absmax.nbytes
    return {"bitsandbytes": Product(lambda x: matmul_4bit(x, packed.t(), state), nbytes, "bitsandbytes")}


def torchao(q: QTensor, dtype: torch.dtype) -> dict[str, Product]:
    """Int4WeightOnlyConfig on an nn.Linear."""
    spec, (n, k) = q.spec, q.shape
    if not _int4(spec) or dtype is not torch.bfloat16:
        return {}
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device=device_of(q), dtype=dtype))
    quantize_(layer, Int4WeightOnlyConfig(group_size=spec.group))
    return {"torchao": Product(layer, n * k // 2 + 4 * n * k // spec.group, "torchao")}


def llama_cpp(q: QTensor, dtype: torch.dtype) -> dict[str, Product]:
    """llama.cpp as it comes, and as `--no-repack` where that makes a difference."""
    # The first is what it does unasked.
    names = ("llama.cpp", "llama.cpp --no-repack")
    held = zip(names, ggml_peer.weights(q).items(), strict=False)
    return {name: Product(weight, weight.nbytes, path, weight.bind) for name, (path, weight) in held}


# (weight, dtype of x) -> products by name; {}: not for such a weight; ImportError: not installed.
PEERS: dict[str, Callable[[QTensor, torch.dtype], dict[str, Product]]] = {
    "torch-int4": torch_int4,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "llama.cpp": llama_cpp,
}
