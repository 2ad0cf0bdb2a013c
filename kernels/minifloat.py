"""Minifloat family: weight = float(code) * scale, codes being small floating-point numbers. FP8, MXFP8, MXFP4 and NVFP4
land here.

Rounding contract: code to float32 (exact), multiply by the float32 scale.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .affine import stored
from .families import Family, one_level, one_level_parts, spread
from .grid import SHRINKS, Params, blocks, search
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
        if spec.table == "e2m1" and spec.scale in _STORED_BYTES and weight is None:
            return self._plain(w, spec)
        largest = E2M1[-1] if spec.table == "e2m1" else torch.finfo(FLOATS[spec.table]).max
        absmax = blocks(w.abs(), spec)[0].amax(-1)

        def propose(shrink: float) -> Params:
            return Params(stored(spec, absmax * shrink / largest))

        # Powers of two, or the few steps that E4M3 has between two of them.
        few = {"e8m0": (1.0, 0.5), "ue4m3": tuple(1 - 0.06 * i for i in range(8))}
        return search(w, spec, weight, propose, self, few.get(spec.scale, SHRINKS))

    def _plain(self, w: Tensor, spec: Spec) -> Params:
        """What llama.cpp writes (quantize_row_mxfp4_ref, quantize_row_nvfp4_ref in ggml-quants.c, MIT): the scale from
        the largest number of a group, and of two equally near numbers the one of smaller magnitude."""
        byte = _STORED_BYTES[spec.scale](blocks(w.abs(), spec)[0].amax(-1))
        params = Params(one_level(spec, byte), parts={"scales": byte})
        small = (w / spread(params.scale, spec, (w.shape[0], w.shape[1]))).nan_to_num(0.0)
        code = torch.bucketize(small.abs(), _edges(w.device))
        return replace(params, codes=(code + 8 * ((small < 0) & (code > 0))).to(torch.uint8))

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        if spec.table == "e2m1":
            codes = nearest_e2m1(w / params.scale)
            return codes, value(spec, codes, {}) * params.scale
        dtype = FLOATS[spec.table]
        largest = torch.finfo(dtype).max
        small = (w / params.scale).clamp(-largest, largest).to(dtype)
        return small.view(torch.uint8), small.float() * params.scale

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        return {"scales": one_level_parts(spec, params.scale), **params.parts}


def nearest_e2m1(w: Tensor) -> Tensor:
    """uint8 codes; a number half-way between two takes the even code, one beyond the largest the largest."""
    edges = _edges(w.device)
    below = torch.bucketize(w.abs(), edges)
    above = torch.bucketize(w.abs(), edges, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * (w < 0)).to(torch.uint8)


def _e8m0(largest: Tensor) -> Tensor:
    """uint8: the power of two that puts the largest number between 4 and 8 (OCP Microscaling 1.0, 6.3)."""
    # The logarithm is rounded to float32, as theirs is, before it is rounded down.
    exponent = torch.where(largest > 0, largest.double().log2().float().floor() + 125, 0.0)
    return exponent.clamp_(0, 254).to(torch.uint8)


def _ue4m3(largest: Tensor) -> Tensor:
    """uint8: E4M3 of a sixth, halves rounded up, never from a subnormal to a normal number. Theirs is 0, and so all
    numbers of the group, below 2**-10; here only where all numbers are 0. Theirs is 448 from 256 on."""
    scale = largest / E2M1[-1]
    pattern = ((scale.contiguous().view(torch.int32) + (1 << 19)) >> 20) - ((127 - 7) << 3)
    subnormal = (scale * 512 + 0.5).floor().clamp(1, 7)
    byte = torch.where(scale < 2.0**-6, subnormal, pattern.clamp(max=0x7E).float())
    return byte.masked_fill_(scale == 0, 0.0).to(torch.uint8)


# Largest magnitudes of groups -> their scales as they are stored, for E2M1 codes.
_STORED_BYTES = {"e8m0": _e8m0, "ue4m3": _ue4m3}


def _edges(device: torch.device) -> Tensor:
    magnitudes = torch.tensor(E2M1, device=device)
    return (magnitudes[1:] + magnitudes[:-1]) / 2


FAMILY = Family("minifloat", value, scale, fixed_zero, MinifloatGrid(), tile=16, min_capability=60)
