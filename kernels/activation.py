"""What a quantized activation is: the torch twin of activation_device.py, and the arithmetic for devices without a dot
of such numbers (scaled.py).

`act` = a8 asks for 8-bit activations per token, of the kind of number the weight is made of, because that is what a
native dot multiplies:

    weight                            activation                     step
    affine                            int8, -127 .. 127              float32, largest magnitude / 127, per token
    minifloat, whole rows or tensor   FP8 E4M3                       float32, largest magnitude / 448, per token
    minifloat in groups               FP8 E4M3                       the same per token and group of inputs
    minifloat with e8m0 scales        FP8 E4M3                       a power of two per token and 32 inputs (OCP MX 1.0)

A power-of-two step is the smallest that saturates nothing, as in kernels/minifloat.py (MX rounds down and saturates).

a4 asks for FP4 E2M1, for weights of minifloat4.e2m1.g16.ue4m3 alone (NVFP4 on both sides). A number is code * scale *
step: a float32 step, and an E4M3 scale per token and 16 inputs.

    step    largest magnitude / (6 * 448) of the token, or where the weight comes with `act_step`, that of all tokens:
            1 / input_global_scale of compressed-tensors, input_scale of ModelOpt
    scale   largest magnitude of the 16 / 6 / step, rounded to E4M3; 0 if that is 0, and then all 16 are
    code    the nearest to number / (scale * step), ties to even

This is NVFP4 as NVIDIA describes it ("Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025) and
compressed-tensors computes it (generate_gparam, calculate_qparams, cast_to_fp4), whose steps are all of all tokens:
0.20 finds the same scales and codes for a float32 x; of a bfloat16 one it divides by 6 in bfloat16, and 1.3 % of its
scales are a neighbour.
"""

import torch
from torch import Tensor

from .minifloat import E2M1, nearest_e2m1, value
from .spec import Spec

FLOOR = 1e-12
TOPS = {"int8": 127.0, "fp8": 448.0, "mx": 448.0, "fp4": E2M1[-1] * 448.0}


def kind(spec: Spec) -> str:
    """int8, fp8, mx or fp4: the activation that goes with a weight of `spec`, fp4 being that of a4."""
    if spec.act == "a4":
        return "fp4"
    if spec.family != "minifloat":
        return "int8"
    return "mx" if spec.scale == "e8m0" and spec.group == 32 and spec.rows == 1 else "fp8"


def group(spec: Spec) -> int:
    """Inputs that share a step (fp4: a scale); -1: the whole token."""
    return -1 if kind(spec) == "int8" else spec.group


def quantize(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """x [.., K] -> (int8 or float8_e4m3fn [.., K], steps [.., G]: float32, or uint8 exponents biased by 127 for mx).

    Of a8; fp4 has scales and steps: `quantize_fp4`."""
    what, size = kind(spec), group(spec) if group(spec) > 0 else x.shape[-1]
    wide = _grouped(x, size)
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


def quantize_fp4(x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., K] -> codes uint8 [.., K], scales float8_e4m3fn [.., ceil(K / 16)], steps float32 [..]; step: float [] for
    all tokens, or None."""
    largest = (wide := _grouped(x, 16)).abs().amax(-1)
    own = largest.amax(-1).clamp(min=FLOOR) / TOPS["fp4"]
    steps = own if step is None else step.float().expand_as(own)
    scales = (largest / E2M1[-1] / steps.unsqueeze(-1)).clamp(max=448).to(torch.float8_e4m3fn)
    unit = scales.float() * steps.unsqueeze(-1)
    codes = nearest_e2m1(wide / unit.masked_fill(unit == 0, torch.inf).unsqueeze(-1))
    return codes.flatten(-2)[..., : x.shape[-1]], scales, steps


def _grouped(x: Tensor, size: int) -> Tensor:
    """float32 [.., ceil(K / size), size], zeros behind the last input."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _exponent(step: Tensor) -> Tensor:
    """uint8: the biased exponent of the smallest power of two that is at least `step` (positive, normal)."""
    bits = step.view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)


def rounded(x: Tensor, spec: Spec, step: Tensor | None = None) -> Tensor:
    """x as its quantized self, in x's dtype; step: the `act_step` of a4, or None."""
    if kind(spec) == "fp4":
        codes, scales, steps = quantize_fp4(x, step)
        numbers, unit = value(spec, codes, {}), scales.float() * steps.unsqueeze(-1)
    else:
        q, stored = quantize(x, spec)
        numbers, unit = q.float(), torch.exp2(stored.float() - 127) if kind(spec) == "mx" else stored
    if (size := group(spec)) > 0:
        unit = unit.repeat_interleave(size, -1)[..., : x.shape[-1]]
    return (numbers * unit).to(x.dtype)
