"""AWQ (arXiv 2306.00978): scale up the input channels that matter before rounding, and clip each group's range.

For linears that read one input x, y = W x = (W s)(x / s). Scaling column k of W by s_k > 1 shrinks its relative
rounding error; the division is folded into whatever made x (a norm's weight, or the rows of the linear before). s =
mean|x|^a, a searched in [0, 1] for the least output error of the group of linears. Clipping then searches each
group's range for the least error of what the group adds to the output.

The error is tr(dW H dW^T), exact for the calibration inputs, so no activations are kept. A fold is checked by running
the block; one that changes its output (a norm with an offset, attention that repeats heads) is undone and that input
keeps scale 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.families import family, spread
from ..kernels.grid import blocks
from ..kernels.qtensor import QTensor, build
from ..kernels.spec import Spec
from .method import Settings, round_to, wide
from .rtn import quantize as rtn
from .stats import Squares, Stats, output_error

NEEDS_CALIBRATION = True
_RATIOS = tuple(i / 20 for i in range(20))
# Fractions of a group's range tried, as in the reference implementation (half the range at most is cut).
_CLIPS = tuple(1 - i / 40 for i in range(20))


def quantize(w: Tensor, spec: Spec, stats: Stats | Squares | None, settings: Settings) -> QTensor:
    """w float32 [N, K], already rescaled -> QTensor with clipped ranges, unless plain ranges give less output error."""
    assert isinstance(stats, Stats)
    spec = spec.without_perm()
    plain = rtn(w, spec, None, settings)
    if spec.view or spec.rows != 1:
        return plain
    hessian = stats.hessian.to(w.device)
    clipped = _clipped(w, spec, hessian)
    errors = [output_error(q.dequantize() - w, hessian) for q in (clipped, plain)]
    return clipped if errors[0] <= errors[1] else plain


def _clipped(w: Tensor, spec: Spec, hessian: Tensor) -> QTensor:
    """Each group's range shrunk to where its own share of the output, (dW x) over the group's inputs, errs least."""
    shape = (w.shape[0], w.shape[1])
    grid, tiles = family(spec).grid, blocks(w, spec)[0]
    low, high = (spread(t, spec, shape) for t in (tiles.amin(-1), tiles.amax(-1)))
    within = _group_hessians(hessian, spec)
    best = w
    least = torch.full(tiles.shape[:2], torch.inf, device=w.device)
    for clip in _CLIPS:
        tried = torch.minimum(torch.maximum(w, low * clip), high * clip)
        w_hat = grid.nearest(tried, spec, wide(grid.fit(tried, spec), spec, shape))[1]
        delta = blocks(w_hat - w, spec)[0]
        error = (torch.einsum("ngi,gij->ngj", delta, within) * delta).sum(-1)
        better = spread((error < least).float(), spec, shape).bool()
        best, least = torch.where(better, tried, best), torch.minimum(error, least)
    params = grid.fit(best, spec)
    return build(round_to(best, spec, params), params, spec, shape)


def _group_hessians(hessian: Tensor, spec: Spec) -> Tensor:
    """[G, group, group]: the diagonal blocks of the Hessian, zero-padded where the last group is short."""
    k = hessian.shape[0]
    group = k if spec.group == -1 else spec.group
    padded = torch.nn.functional.pad(hessian, (0, -k % group, 0, -k % group))
    cut = padded.view(padded.shape[0] // group, group, -1, group)
    return cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def search_scale(weights: Sequence[Tensor], specs: Sequence[Spec], stats: Stats, settings: Settings) -> Tensor:
    """Scale s float32 [K] for the linears `weights` ([N_i, K]) that share the input described by `stats`.

    The error of W is that of Q(W s) / s. All ones (a = 0) is among the candidates, so the result is never worse than
    none.
    """
    device = weights[0].device
    hessian, mean = stats.hessian.to(device), stats.mean.to(device)
    best, least = torch.ones_like(mean), float("inf")
    for ratio in _RATIOS:
        scale = mean.clamp(min=1e-4) ** ratio
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for w, spec in zip(weights, specs, strict=True):
            rounded = rtn(w * scale, spec, None, settings).dequantize() / scale
            error += output_error(rounded - w, hessian)
        if error < least:
            best, least = scale, error
    return best
