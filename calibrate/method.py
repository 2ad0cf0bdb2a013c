"""What a calibration method is, and how one is found.

A method is a module of this folder, named after its paper, with

    NEEDS_CALIBRATION                      whether `stats` must be given
    quantize(w, spec, stats, settings) -> QTensor
    rescale(layers, spec_of, settings)     optional: change a block before its weights are quantized (AWQ)

It touches a family only through its grid (`fit`, `nearest`), so any method works with any format whose grid allows it.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import UserError
from ..kernels.families import family, spread
from ..kernels.grid import Params
from ..kernels.qtensor import QTensor
from ..kernels.spec import Spec
from .stats import Squares, Stats


@dataclass(frozen=True)
class Settings:
    """Knobs of the methods, set by the command line or a recipe."""

    # GPTQ: fraction of the mean of the Hessian's diagonal added to it.
    damp_percent: float = 0.01
    # GPTQ: solve columns in order of falling importance although groups stay where they are.
    act_order: bool = True
    # GPTQ: choose every group's scale before solving; False lets each see the errors fed back so far.
    static_groups: bool = False
    # GPTQ: search each group's range for the least weighted squared error instead of taking its extremes.
    mse: bool = True


class Method(Protocol):
    """The functions of a method module."""

    NEEDS_CALIBRATION: bool

    def quantize(self, w: Tensor, spec: Spec, stats: Stats | Squares | None, settings: Settings) -> QTensor: ...


@cache
def methods() -> dict[str, Method]:
    """Every method of this folder by file name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module: Any = import_module(f".{path.stem}", __package__)
        if hasattr(module, "NEEDS_CALIBRATION"):
            found[path.stem] = module
    return found


def method_by_name(name: str) -> Method:
    if name not in methods():
        raise UserError(f"--method {name!r} is not known; accepted: {', '.join(methods())}")
    return methods()[name]


def wide(params: Params, spec: Spec, shape: tuple[int, int]) -> Params:
    """Params [R', G] spread over a grouped matrix of `shape`."""
    zero = None if params.zero is None else spread(params.zero, spec, shape)
    return Params(spread(params.scale, spec, shape), zero, params.parts)


def round_to(matrix: Tensor, spec: Spec, params: Params) -> Tensor:
    """The codes of a grouped matrix, as `build` takes them: those that `fit` chose, or the nearest, uint8 [R, C]."""
    if params.codes is not None:
        return params.codes
    shape = (matrix.shape[0], matrix.shape[1])
    return family(spec).grid.nearest(matrix, spec, wide(params, spec, shape))[0]
