"""AWQ (arXiv 2306.00978): scale up the input channels that matter before rounding, and clip each group's range.

For linears that read one input x, y = W x = (W s)(x / s). Scaling column k of W by s_k > 1 shrinks its relative
rounding error; the division is folded into whatever made x (a norm's weight, or the rows of the linear before). s =
mean|x|^a, a searched in [0, 1] for the least output error of the group of linears. Clipping then searches each group's
range, weighted by the mean of x squared.

The error is tr(dW H dW^T), exact for the calibration inputs, so no activations are kept. A fold is checked by running
the block; one that changes its output (a norm with an offset, attention that repeats heads) is undone and that input
keeps scale 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.families import family
from ..kernels.qtensor import QTensor, build, to_matrix
from ..kernels.spec import Spec
from .method import Settings, round_to
from .rtn import quantize as rtn
from .stats import Stats, output_error

NEEDS_CALIBRATION = True
_RATIOS = tuple(i / 20 for i in range(20))


def quantize(w: Tensor, spec: Spec, stats: Stats | None, settings: Settings) -> QTensor:
    """w float32 [N, K], already rescaled -> QTensor with clipped ranges, unless plain ranges give less output error."""
    assert stats is not None
    spec = spec.without_perm()
    matrix = to_matrix(w, spec)
    weight = to_matrix(stats.hessian.diagonal().to(w.device).expand(w.shape), spec)
    params = family(spec).grid.fit(matrix, spec, weight)
    clipped = build(round_to(matrix, spec, params), params, spec, (w.shape[0], w.shape[1]))
    plain = rtn(w, spec, None, settings)
    hessian = stats.hessian.to(w.device)
    errors = [output_error(q.dequantize() - w, hessian) for q in (clipped, plain)]
    return clipped if errors[0] <= errors[1] else plain


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
