"""Minifloat family: weight = float(code) * scale, codes being small floating-point numbers. FP8, MXFP8, MXFP4 and NVFP4
land here.

Rounding contract: code to float32 (exact), multiply by the float32 scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .affine import stored
from .families import Family, one_level_parts
from .grid import Params, blocks, search
from .spec import Spec

FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Of OCP Microscaling 1.0: the eight magnitudes; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if spec.table == "e2m1":
        return torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)[codes.int()]
    return codes.contiguous().view(FLOATS[spec.table]).float()


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    return values * scales


def fixed_zero(spec: Spec) -> float | None:
    return None


class MinifloatGrid:
    """Scale = absmax / largest number, values rounded to nearest even by the hardware definition of the dtype."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        largest = E2M1[-1] if spec.table == "e2m1" else torch.finfo(FLOATS[spec.table]).max
        absmax = blocks(w.abs(), spec)[0].amax(-1)

        def propose(shrink: float) -> Params:
            return Params(stored(spec, absmax * shrink / largest))

        return search(w, spec, weight, propose, self)

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        if spec.table == "e2m1":
            codes = _nearest_e2m1(w / params.scale)
            return codes, value(spec, codes, {}) * params.scale
        dtype = FLOATS[spec.table]
        largest = torch.finfo(dtype).max
        small = (w / params.scale).clamp(-largest, largest).to(dtype)
        return small.view(torch.uint8), small.float() * params.scale

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        return {"scales": one_level_parts(spec, params.scale)}


def _nearest_e2m1(w: Tensor) -> Tensor:
    """uint8 codes; a number half-way between two takes the even code, one beyond the largest the largest."""
    magnitudes = torch.tensor(E2M1, device=w.device)
    edges = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = torch.bucketize(w.abs(), edges)
    above = torch.bucketize(w.abs(), edges, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * (w < 0)).to(torch.uint8)


FAMILY = Family("minifloat", value, scale, fixed_zero, MinifloatGrid(), tile=16, min_capability=60)
