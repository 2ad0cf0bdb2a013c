"""Round to nearest: the range of each group decides its scale, nothing else is looked at. The baseline of every
method.

Where the inputs' importance is known (an importance matrix), scales are those of the least weighted squared error.
"""

from torch import Tensor

from ..kernels.families import family
from ..kernels.qtensor import QTensor, build, to_matrix
from ..kernels.spec import Spec
from .method import Settings, round_to
from .stats import Squares, Stats

NEEDS_CALIBRATION = False


def quantize(w: Tensor, spec: Spec, stats: Stats | Squares | None, settings: Settings) -> QTensor:
    """w float32 [N, K] -> QTensor. `perm` is dropped: rounding has no order, so the columns stay where they are."""
    spec = spec.without_perm()
    matrix = to_matrix(w, spec)
    weight = None if stats is None else to_matrix(stats.importance.to(w.device).expand(w.shape), spec)
    params = family(spec).grid.fit(matrix, spec, weight)
    return build(round_to(matrix, spec, params), params, spec, (w.shape[0], w.shape[1]))
