"""What a quantized activation is: the torch twin of the kernels in scaled.py, and the arithmetic for devices without.

`act` = a8 asks for 8-bit activations per token, of the kind of number the weight is made of, because that is what a
native dot multiplies:

    weight                            activation                     step
    affine                            int8, -127 .. 127              float32, largest magnitude / 127, per token
    minifloat, whole rows or tensor   FP8 E4M3                       float32, largest magnitude / 448, per token
    minifloat in groups               FP8 E4M3                       the same per token and group of inputs
    minifloat with e8m0 scales        FP8 E4M3                       a power of two per token and 32 inputs (OCP MX 1.0)

A power-of-two step is the smallest that saturates nothing, as in kernels/minifloat.py (MX rounds down and saturates).
"""

import torch
from torch import Tensor

from .spec import Spec

FLOOR = 1e-12
TOPS = {"int8": 127.0, "fp8": 448.0, "mx": 448.0}


def kind(spec: Spec) -> str:
    """int8, fp8 or mx: the activation that goes with a weight of `spec`."""
    if spec.family != "minifloat":
        return "int8"
    return "mx" if spec.scale == "e8m0" and spec.group == 32 and spec.rows == 1 else "fp8"


def group(spec: Spec) -> int:
    """Inputs that share a step; -1: the whole token."""
    return -1 if kind(spec) == "int8" else spec.group


def quantize(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """x [.., K] -> (int8 or float8_e4m3fn [.., K], steps [.., G]: float32, or uint8 exponents biased by 127 for mx)."""
    what, size = kind(spec), group(spec) if group(spec) > 0 else x.shape[-1]
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    step = wide.abs().amax(-1).clamp(min=FLOOR) / TOPS[what]
    if what == "mx":
        stored = _exponent(step)
        step = torch.exp2(stored.float() - 127)
    else:
        stored = step
    scaled = (wide / step.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    if what == "int8":
        return scaled.round().to(torch.int8), stored
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), stored


def _exponent(step: Tensor) -> Tensor:
    """uint8: the biased exponent of the smallest power of two that is at least `step` (positive, normal)."""
    bits = step.view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)


def rounded(x: Tensor, spec: Spec) -> Tensor:
    """x as its quantized self, in x's dtype."""
    q, stored = quantize(x, spec)
    step = torch.exp2(stored.float() - 127) if kind(spec) == "mx" else stored
    size = group(spec)
    if size > 0:
        step = step.repeat_interleave(size, -1)[..., : x.shape[-1]]
    return (q.float() * step).to(x.dtype)
