"""An int8 copy of a weight beside the weight, where somebody asks for one: faster products of many rows on the CPU.

The copy has one scale for each output row: of 256 inputs there are dot products and one step of the activations, and
nothing of groups' scales, mins and tables. Few rows, where the bytes that are read decide, meet the weight itself. What
rounding it once more adds to the KL divergence is in README.md.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from . import bits, native
from .paths import forced
from .pieces import pieces
from .qtensor import QTensor
from .spec import Spec

if TYPE_CHECKING:
    from .dispatch import Core

# Rows up to which the weight itself is as fast, where it meets int8 activations and where not (5632 x 2048, Zen 4, two
# threads, ms, weight / copy: Q4_K 8 rows 0.28 / 0.25, 9 rows 0.39 / 0.35; NF4 1 row 0.14 / 0.26, 2 rows 0.18 / 0.26, 8
# rows 0.54 / 0.25; FP8 2 rows 0.26 / 0.26, 4 rows 0.36 / 0.24).
FEW, FEW_FLOATS = 8, 2
_SPEC = Spec.parse("affine8.channel.sym.f32")
_ZERO, _LARGEST = 128, 127
# Weights decoded at a time: 16 MB of float32.
_PIECE = 1 << 22


@dataclass(frozen=True)
class WithCopy:
    """x bfloat16 [M, K] -> x @ W.T [M, N]: by `core` up to `few` rows, by `copy` beyond."""

    core: "Core"
    copy: native.NativeLinear
    few: int

    @property
    def name(self) -> str:
        return f"{self.core.name}+int8"

    @property
    def nbytes(self) -> int:
        return self.core.nbytes + self.copy.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.core(x) if x.shape[0] <= self.few else self.copy(x)

    def qtensor(self) -> QTensor:
        return self.core.qtensor()


def check(device: torch.device, dtype: torch.dtype, exact: bool) -> None:
    """UserError where products would not use a copy, with what is in the way."""
    path = native.best_path()
    for problem, found, fix in (
        (device.type != "cpu", f"the model is on {device}", "leave it out: it is for the CPU"),
        (exact, "exact=True multiplies the weights themselves", "leave one of the two out"),
        (dtype is not torch.bfloat16, f"dtype is {dtype}", "pass dtype='bfloat16'"),
        (forced() not in ("", "cpu"), f"BITSMITH_KERNELS is {forced()!r}", "unset it"),
        (not native.int8_activations(), "BITSMITH_ACT is 'bf16' and a copy meets int8 activations", "unset it"),
        (
            path not in ("avx512", "amx"),
            f"this processor has {path or 'no native library'}",
            "leave it out: without AVX-512's byte products a copy is no faster",
        ),
    ):
        if problem:
            raise UserError(f"int8_copy (--int8-copy) has no use here: {found}. Fix: {fix}")


def rounded(q: QTensor) -> QTensor:
    """`q` in 8 bits, a symmetric scale for each output row: its largest weight over 127."""
    n, k = q.shape
    codes, scales = torch.empty(n, k, dtype=torch.uint8), torch.empty(n, 1)
    for start, stop, piece in pieces(q, _PIECE):
        weight = piece.dequantize(torch.float32)
        step = weight.abs().amax(1, keepdim=True) / _LARGEST
        # A row of zeros has no step.
        weight.div_(step.clamp(min=torch.finfo(torch.float32).tiny)).round_().add_(_ZERO)
        codes[start:stop], scales[start:stop] = weight, step
    return QTensor(_SPEC, q.shape, {"codes": bits.pack(codes, 8), "scales": scales})


def beside(core: "Core", q: QTensor) -> "Core":
    """`core`, the product of `q`, with a copy of it in int8; alone where it would be its own copy."""
    if q.spec.family == "affine" and q.spec.bits == 8 and q.spec.group in (-1, q.shape[1]):
        return core
    return WithCopy(core, native.pack(rounded(q)), FEW if core.name.endswith("a8") else FEW_FLOATS)
