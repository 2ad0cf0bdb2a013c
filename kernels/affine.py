"""Affine family: weight = (code - zero) * scale or code * scale + min, codes of 1 to 8 bits. GPTQ, AWQ, HQQ, EXL2,
INT8, Q4_0, Q4_K ... are its dialects.

Rounding contract: code and zero to float32, subtract, multiply by the float32 scale; `min`: multiply, then add. Nothing
fused.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import search_levels
from . import search_plain as plain
from .families import Family, one_level_parts, scale_dtype
from .grid import Params, blocks, search
from .search import integers
from .spec import Spec

_TINY = 1e-8
_LEAST_E4M3 = 2.0**-9


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    return codes.float()


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    return (values - zero) * scales if zero is not None else values * scales


def fixed_zero(spec: Spec) -> float | None:
    """Zero point of a symmetric grid: the middle code, which every dialect stores or implies as 2**(bits-1); of `one`,
    code 1 (ternary weights)."""
    return {"sym": float(1 << (spec.bits - 1)), "one": 1.0}.get(spec.zero)


class AffineGrid:
    """Range fitting and rounding for uniform codes. Of a `min` spec, the params' zero is the effective min."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        if spec.two_level or (_in_blocks(spec) and w.shape[1] % spec.group == 0):
            return self._fit_blocks(w, spec, weight)
        tiles, _ = blocks(w, spec)
        low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)

        def propose(shrink: float) -> Params:
            return _range_params(low * shrink, high * shrink, spec)

        return search(w, spec, weight, propose, self)

    def _fit_blocks(self, w: Tensor, spec: Spec, weight: Tensor | None) -> Params:
        top, half = _top(spec), 1 << (spec.bits - 1)
        if spec.zero not in ("min", "sym", "one"):
            raise UserError(
                f"{spec}: nothing here chooses scales of two levels for such zero points; take one level, as "
                f"{_one_level(spec)}, or {replace(spec, zero='min')}"
            )
        if spec.two_level is None and (weight is None or spec.bits == 8):
            rules: dict[str, plain.Rule] = {"min": partial(plain.ranged, top=top), "one": plain.ternary}
            return plain.fit(w, spec, rules.get(spec.zero, partial(plain.symmetric, half=half)))
        zero = int(fixed_zero(spec) or 0)
        levels = None if spec.zero == "min" else integers(-zero, top - zero)
        return search_levels.fit(w, spec, weight, levels, self.nearest)

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        # A group of zeros may have scale 0: 0 / 0 counts as 0.
        if spec.zero == "min":
            assert params.zero is not None
            codes = ((w - params.zero) / params.scale).nan_to_num(0.0).round().clamp(0, _top(spec))
            return codes.to(torch.uint8), codes * params.scale + params.zero
        zero = params.zero if params.zero is not None else torch.tensor(fixed_zero(spec) or 0.0, device=w.device)
        codes = ((w / params.scale).nan_to_num(0.0) + zero).round().clamp(0, _top(spec))
        return codes.to(torch.uint8), scale(codes, params.scale, zero)

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        found = dict(params.parts)
        if "scales" not in found:
            found["scales"] = one_level_parts(spec, params.scale)
        if spec.zero == "min":
            if "mins" not in found and params.zero is not None:
                found["mins"] = one_level_parts(spec, params.zero)
        elif params.zero is not None:
            found["zeros"] = params.zero.to(zero_dtype(spec))
        return found


def _top(spec: Spec) -> int:
    """The largest code. Blocks of 256 with zero `one` are of ternary weights: GGUF's TQ1_0 has no fourth."""
    return 2 if (spec.zero, spec.group) == ("one", 256) else (1 << spec.bits) - 1


def _in_blocks(spec: Spec) -> bool:
    """Whether scales of one level are chosen as in blocks of GGUF: one-sided where that reaches further, any sign."""
    blocks32 = (spec.zero, spec.scale, spec.group, spec.rows, spec.view) == ("sym", "f16", 32, 1, "")
    return spec.zero in ("min", "one") or (blocks32 and spec.bits in (4, 5, 8))


def zero_dtype(spec: Spec) -> torch.dtype:
    return torch.uint8 if spec.zero == "asym" else scale_dtype(spec.zero.removeprefix("z"))


def stored(spec: Spec, scales: Tensor) -> Tensor:
    """Scales as the file will hold them, in float32; a group of zeros gets a tiny scale rather than none."""
    if spec.scale == "e8m0":
        # The next power of two: a smaller one would saturate the largest weight.
        return torch.exp2(torch.log2(scales.clamp(min=2.0**-126)).ceil())
    if spec.scale == "ue4m3":
        return scales.clamp(_LEAST_E4M3, torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn).float()
    dtype = scale_dtype(spec.scale)
    floor = max(_TINY, torch.finfo(dtype).tiny) if dtype.is_floating_point else _TINY
    return scales.clamp(min=floor).to(dtype).float()


def _one_level(spec: Spec) -> Spec:
    return replace(spec, scale=spec.two_level[0] if spec.two_level else spec.scale)


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
    if spec.zero == "one":
        # Code 0 is the only negative number: it must reach as far down as the others reach up.
        return Params(stored(spec, torch.maximum(-low, high / max(1, top - 1))))
    if spec.zero == "min":
        return Params(stored(spec, (high - low) / top), low.to(scale_dtype(spec.scale)).float())
    scales = stored(spec, (high - low) / top)
    zero = -low / scales
    if spec.zero == "asym":
        return Params(scales, zero.round().clamp(0, top))
    return Params(scales, zero.to(zero_dtype(spec)).float())


FAMILY = Family("affine", value, scale, fixed_zero, AffineGrid(), tile=32, min_capability=60)
