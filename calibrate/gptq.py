"""GPTQ (arXiv 2210.17323): quantize one column at a time and let the columns still to come make up for its error.

With H the mean of x x^T and U the upper Cholesky factor of (H + damp I)^-1, column j's rounding error e = (w_j - q_j)
/ U_jj is taken out of every later column as e * U_j,later. Columns go in order of falling H_jj ("act order"), so that
the important ones are rounded while there is most freedom left. Where the layout can store a permutation (desc_act)
groups follow that order; otherwise groups stay contiguous in the file, and are either fixed beforehand
(`static_groups`) or solved whole, group after group.

Works on any grid: of a family it uses `fit` and `nearest` alone.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.families import family
from ..kernels.grid import Params
from ..kernels.qtensor import QTensor, build, from_matrix, matrix_shape, to_matrix
from ..kernels.spec import Spec
from .method import Settings, wide
from .stats import Squares, Stats

NEEDS_CALIBRATION = True
# Columns whose error feedback is applied at once to the rest of the matrix: one matmul instead of 128 rank-one updates.
_LAZY = 128


def quantize(w: Tensor, spec: Spec, stats: Stats | Squares | None, settings: Settings) -> QTensor:
    """w float32 [N, K] -> QTensor. Raises UserError where the Hessian cannot be factored even with strong damping."""
    assert isinstance(stats, Stats)
    shape = (w.shape[0], w.shape[1])
    hessian = stats.hessian.to(w.device).clone()
    diagonal = hessian.diagonal()
    # An input that is never active carries no information on its weights: leave them to plain rounding.
    diagonal[diagonal == 0] = 1
    importance = diagonal.clone()
    by_importance = torch.argsort(importance, descending=True)
    if "perm" in spec.pre:
        codes, params = _solve(w[:, by_importance], hessian[by_importance][:, by_importance], spec, settings, None)
        return build(codes, params, spec, shape, by_importance)
    order = _order(importance, spec, settings) if settings.act_order else None
    codes, params = _solve(w, hessian, spec, settings, order)
    return build(to_matrix(codes, spec), params, spec, shape)


def _order(importance: Tensor, spec: Spec, settings: Settings) -> Tensor:
    """Columns by falling importance; group by group (groups by falling total) where a group must be solved whole."""
    if _static(spec, settings) or spec.group == -1:
        return torch.argsort(importance, descending=True)
    k = importance.numel()
    padded = torch.nn.functional.pad(importance, (0, -k % spec.group)).view(-1, spec.group)
    within = torch.argsort(padded, dim=1, descending=True)
    across = torch.argsort(padded.sum(1), descending=True)
    order = (within + torch.arange(padded.shape[0], device=within.device)[:, None] * spec.group)[across].reshape(-1)
    return order[order < k]


def _static(spec: Spec, settings: Settings) -> bool:
    """Whether all scales must be chosen before solving: asked for, or groups are not whole columns of one row."""
    return settings.static_groups or bool(spec.view) or spec.rows != 1 or spec.two_level is not None


def _solve(w: Tensor, hessian: Tensor, spec: Spec, settings: Settings, order: Tensor | None) -> tuple[Tensor, Params]:
    """codes uint8 [N, K] (columns as in `w`) and params [R', G]."""
    shape = (w.shape[0], w.shape[1])
    importance = hessian.diagonal().clone()
    order = torch.arange(shape[1], device=w.device) if order is None else order
    static = _static(spec, settings)
    group = shape[1] if spec.group == -1 else spec.group
    if static:
        params, spread_params = _fit_all(w, importance, spec, settings)
    factor = _inverse_factor(hessian[order][:, order], settings.damp_percent)
    work = w[:, order].clone()
    codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
    fitted: dict[int, Params] = {}
    grid = family(spec).grid
    # A group must begin where all earlier feedback has been applied to all of it, so lazy blocks are whole groups.
    lazy = _LAZY if static or spec.group == -1 else group * max(1, _LAZY // group)
    for start in range(0, shape[1], lazy):
        stop = min(start + lazy, shape[1])
        block, errors = work[:, start:stop], torch.empty(shape[0], stop - start, device=w.device)
        inner = factor[start:stop, start:stop]
        for j in range(stop - start):
            column = int(order[start + j])
            if static:
                here = spread_params.columns(column, column + 1)
            else:
                index = column // group
                if index not in fitted:
                    rest = slice(start + j, start + j + group)
                    fitted[index] = _fit_group(work[:, rest], importance[order[rest]], spec, settings)
                here = fitted[index]
            code, value = grid.nearest(block[:, j : j + 1], spec, here)
            codes[:, column] = code[:, 0]
            error = (block[:, j] - value[:, 0]) / inner[j, j]
            block[:, j:] -= error[:, None] * inner[j, j:]
            errors[:, j] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    if static:
        return codes, params
    return codes, _join([fitted[i] for i in range(len(fitted))])


def _fit_all(w: Tensor, importance: Tensor, spec: Spec, settings: Settings) -> tuple[Params, Params]:
    """Params of the whole matrix, and the same spread to [N, K] in the weight's own layout."""
    shape = (w.shape[0], w.shape[1])
    weight = to_matrix(importance.expand(shape), spec) if settings.mse else None
    params = family(spec).grid.fit(to_matrix(w, spec), spec, weight)
    matrix = matrix_shape(spec, shape)

    def place(t: Tensor) -> Tensor:
        return from_matrix(t.expand(matrix), spec, shape)

    spread_params = wide(params, spec, matrix)
    zero = None if spread_params.zero is None else place(spread_params.zero)
    return params, Params(place(spread_params.scale), zero, params.parts)


def _fit_group(w: Tensor, importance: Tensor, spec: Spec, settings: Settings) -> Params:
    return family(spec).grid.fit(w, replace(spec, group=w.shape[1], act=""), importance if settings.mse else None)


def _join(groups: list[Params]) -> Params:
    zero = None if groups[0].zero is None else torch.cat([g.zero for g in groups if g.zero is not None], 1)
    return Params(torch.cat([g.scale for g in groups], 1), zero, groups[0].parts)


def _inverse_factor(hessian: Tensor, damp_percent: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, [K, K]; damping grows tenfold until it exists."""
    mean = hessian.diagonal().mean()
    damp = damp_percent
    while damp <= 1:
        damped = hessian + torch.eye(hessian.shape[0], device=hessian.device) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp *= 10
    raise UserError(
        "the Hessian of a layer's inputs cannot be factored: they hold NaN or infinity, or are all alike. "
        "Fix: other calibration text (--calib), or --method rtn"
    )
