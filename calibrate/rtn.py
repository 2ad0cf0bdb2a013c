"""Round to nearest: the range of each group decides its scale, nothing else is looked at. The baseline of every
method.
"""

from torch import Tensor

from ..kernels.families import family
from ..kernels.qtensor import QTensor, build, to_matrix
from ..kernels.spec import Spec
from .method import Settings, round_to
from .stats import Stats

NEEDS_CALIBRATION = False


def quantize(w: Tensor, spec: Spec, stats: Stats | None, settings: Settings) -> QTensor:
    """w float32 [N, K] -> QTensor. `perm` is dropped: rounding has no order, so the columns stay where they are."""
    spec = spec.without_perm()
    matrix = to_matrix(w, spec)
    params = family(spec).grid.fit(matrix, spec)
    return build(round_to(matrix, spec, params), params, spec, (w.shape[0], w.shape[1]))
