"""Minifloat family: weight = float(code) * scale, codes being small floating-point numbers. FP8 lands here; FP6/FP4/MX
later.

Rounding contract: code to float32 (exact), multiply by the float32 scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .affine import stored
from .families import Family, scale_dtype
from .grid import Params, blocks, search
from .spec import Spec

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return codes.contiguous().view(FLOATS[spec.table]).float()


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    return values * scales


def fixed_zero(spec: Spec) -> float | None:
    return None


class MinifloatGrid:
    """Scale = absmax / largest number, values rounded to nearest even by the hardware definition of the dtype."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        largest = torch.finfo(FLOATS[spec.table]).max
        absmax = blocks(w.abs(), spec)[0].amax(-1)

        def propose(shrink: float) -> Params:
            wanted = absmax * shrink / largest
            if spec.scale == "e8m0":
                # The next power of two: a smaller one would saturate the largest weight.
                return Params(torch.exp2(torch.log2(wanted.clamp(min=2.0**-126)).ceil()))
            return Params(stored(spec, wanted))

        return search(w, spec, weight, propose, self)

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        dtype = FLOATS[spec.table]
        largest = torch.finfo(dtype).max
        small = (w / params.scale).clamp(-largest, largest).to(dtype)
        return small.view(torch.uint8), small.float() * params.scale

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        if spec.scale == "e8m0":
            return {"scales": (torch.log2(params.scale).round() + 127).to(torch.uint8)}
        return {"scales": params.scale.to(scale_dtype(spec.scale))}


FAMILY = Family("minifloat", value, scale, fixed_zero, MinifloatGrid(), tile=16, min_capability=60)
