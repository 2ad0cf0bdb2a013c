"""HQQ, half-quadratic quantization (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog): no data, robust to outliers.

Minimises |W - Q^-1(Q(W))|_p with p < 1 by splitting off an error E that is allowed to be sparse:

    E    <- shrink_p(W - W_hat, beta)                   large residuals are outliers: leave them to E
    zero <- mean over the group of q - (W - E) / scale  what remains is fitted in closed form
    beta <- 1.01 beta

On a grid without a floating zero point the closed form is that of the scale, sum((W - E) v) / sum(v v) with v the
values at scale 1, which serves every family. The best iterate by the p-norm objective is kept.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.families import family, scale_dtype
from ..kernels.grid import Params, blocks
from ..kernels.qtensor import QTensor, build, to_matrix
from ..kernels.spec import Spec
from .method import Settings, round_to, wide
from .stats import Squares, Stats

NEEDS_CALIBRATION = False
_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def quantize(w: Tensor, spec: Spec, stats: Stats | Squares | None, settings: Settings) -> QTensor:
    """w float32 [N, K] -> QTensor. `perm` is dropped, as rounding has no order."""
    spec = spec.without_perm()
    matrix = to_matrix(w, spec)
    params = refine(matrix, spec, family(spec).grid.fit(matrix, spec))
    return build(round_to(matrix, spec, params), params, spec, (w.shape[0], w.shape[1]))


def refine(matrix: Tensor, spec: Spec, params: Params) -> Params:
    """Params [R', G] improved by half-quadratic steps on the grouped matrix [R, C]; scales of two levels or of
    a byte, and mins, are left as fitted.
    """
    if spec.two_level is not None or spec.scale in ("e8m0", "ue4m3") or spec.zero == "min":
        return params
    grid, shape = family(spec).grid, (matrix.shape[0], matrix.shape[1])
    best = params = replace(params, codes=None)
    beta = _BETA
    least = torch.full_like(params.scale, torch.inf)
    for _ in range(_STEPS):
        here = wide(params, spec, shape)
        codes, w_hat = grid.nearest(matrix, spec, here)
        residual = matrix - w_hat
        error = _per_group(residual.abs().clamp(min=1e-12) ** _NORM, spec)
        best, least = _keep(best, params, least, error)
        target = matrix - _shrink(residual, beta)
        params = _step(target, codes, w_hat, here, params, spec)
        beta *= _GROWTH
    return best


def _shrink(x: Tensor, beta: float) -> Tensor:
    """Generalised soft threshold: the proximal step of the p-norm, p < 1."""
    magnitude = x.abs()
    return x.sign() * (magnitude - magnitude.clamp(min=1e-8) ** (_NORM - 1) / beta).clamp(min=0)


def _step(target: Tensor, codes: Tensor, w_hat: Tensor, here: Params, params: Params, spec: Spec) -> Params:
    if params.zero is not None and spec.zero.startswith("z"):
        return _line(target, codes.float(), params, spec)
    unit = w_hat / here.scale
    power = _per_group(unit * unit, spec)
    scale = _per_group(target * unit, spec) / power.clamp(min=1e-12)
    usable = (power > 0) & (scale * params.scale > 0)
    return replace(params, scale=torch.where(usable, _store(scale, spec.scale), params.scale))


def _line(target: Tensor, codes: Tensor, params: Params, spec: Spec) -> Params:
    """The straight line target = (code - zero) * scale through the codes of each group, by least squares."""
    count = _per_group(torch.ones_like(target), spec)
    mean_code, mean = _per_group(codes, spec) / count, _per_group(target, spec) / count
    variance = _per_group(codes * codes, spec) / count - mean_code**2
    scale = (_per_group(codes * target, spec) / count - mean_code * mean) / variance.clamp(min=1e-6)
    # A group whose weights all have one code has no slope.
    scale = torch.where((variance > 1e-6) & (scale > 0), _store(scale, spec.scale), params.scale)
    return replace(params, scale=scale, zero=_store(mean_code - mean / scale, spec.zero.removeprefix("z")))


def _store(t: Tensor, name: str) -> Tensor:
    return t.to(scale_dtype(name)).float()


def _per_group(t: Tensor, spec: Spec) -> Tensor:
    tiles, mask = blocks(t, spec)
    return (tiles * mask).sum(-1)


def _keep(best: Params, now: Params, least: Tensor, error: Tensor) -> tuple[Params, Tensor]:
    better = error < least
    zero = now.zero if now.zero is None or best.zero is None else torch.where(better, now.zero, best.zero)
    return Params(torch.where(better, now.scale, best.scale), zero, now.parts), torch.minimum(error, least)
