"""Affine family: weight = (code - zero) * scale, codes of 1 to 8 bits. GPTQ, AWQ, HQQ, EXL2, INT8, Q4_0 ... are its
dialects.

Rounding contract: code and zero to float32, subtract, multiply by the float32 scale; nothing fused.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .families import Family, scale_dtype
from .grid import Params, blocks, search
from .spec import Spec

_TINY = 1e-8


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return codes.float()


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    return (values - zero) * scales if zero is not None else values * scales


def fixed_zero(spec: Spec) -> float | None:
    """Zero point of a symmetric grid: the middle code, which every dialect stores or implies as 2**(bits-1)."""
    return float(1 << (spec.bits - 1)) if spec.zero == "sym" else None


class AffineGrid:
    """Range fitting and rounding for uniform codes."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        tiles, _ = blocks(w, spec)
        low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)

        def propose(shrink: float) -> Params:
            return _range_params(low * shrink, high * shrink, spec)

        return search(w, spec, weight, propose, self)

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        zero = params.zero if params.zero is not None else torch.tensor(fixed_zero(spec) or 0.0, device=w.device)
        codes = (w / params.scale + zero).round().clamp(0, (1 << spec.bits) - 1)
        return codes.to(torch.uint8), scale(codes, params.scale, zero)

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        found = dict(params.parts)
        if "scales" not in found:
            found["scales"] = params.scale.to(scale_dtype(spec.scale))
        if params.zero is not None:
            found["zeros"] = params.zero.to(zero_dtype(spec))
        return found


def zero_dtype(spec: Spec) -> torch.dtype:
    return torch.uint8 if spec.zero == "asym" else scale_dtype(spec.zero.removeprefix("z"))


def stored(spec: Spec, scales: Tensor) -> Tensor:
    """Scales as the file will hold them, in float32; a group of zeros gets a tiny scale rather than none."""
    dtype = scale_dtype(spec.scale)
    floor = max(_TINY, torch.finfo(dtype).tiny) if dtype.is_floating_point else _TINY
    return scales.clamp(min=floor).to(dtype).float()


def _range_params(low: Tensor, high: Tensor, spec: Spec) -> Params:
    top = (1 << spec.bits) - 1
    if spec.zero == "sym":
        # GPTQ's symmetric grid: the range is [-max, max] over all 2**bits - 1 steps, one code beyond on the negative
        # side.
        if spec.bits == 1:
            return Params(stored(spec, torch.maximum(-low, high)))
        return Params(stored(spec, 2 * torch.maximum(-low, high) / top))
    if spec.zero == "none":
        return Params(stored(spec, high / top))
    scales = stored(spec, (high - low) / top)
    zero = -low / scales
    if spec.zero == "asym":
        return Params(scales, zero.round().clamp(0, top))
    return Params(scales, zero.to(zero_dtype(spec)).float())


FAMILY = Family("affine", value, scale, fixed_zero, AffineGrid(), tile=32, min_capability=60)
