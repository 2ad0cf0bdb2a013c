"""Grid: the offline half of a family. Calibration methods touch a family only through `fit` and `nearest`.

`fit` chooses scales (and zero points) for a matrix; `nearest` maps numbers to codes given them. Scales are rounded to
what the file will hold *before* codes are chosen, so the error a method sees is the error a reader gets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .spec import Spec

# Fractions of the full range tried by the weighted search: GPTQ's `mse` option searches the same span (maxshrink 0.8).
SHRINKS = tuple(1 - 0.02 * i for i in range(40))


@dataclass(frozen=True)
class Params:
    """What `fit` found. Values are float32 that survive the spec's storage dtype unchanged."""

    # [R', G], or [R, C] once spread.
    scale: Tensor
    # Same shape; None where the family has no free zero point.
    zero: Tensor | None = None
    # Extra stored parts: table, super_scales, scale codes of a two-level scale ...
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    # Codes of the whole matrix, as `build` takes them, where `fit` had to choose them too: with vectors, and where a
    # format rounds by a scale that it does not store. What rounds to nearest takes them.
    codes: Tensor | None = None

    def columns(self, start: int, stop: int) -> "Params":
        """Columns start..stop of spread params; a [R, 1] entry serves every column."""

        def cut(t: Tensor) -> Tensor:
            return t if t.shape[1] == 1 else t[:, start:stop]

        return Params(cut(self.scale), None if self.zero is None else cut(self.zero), self.parts)


class Grid(Protocol):
    """Offline half of a family."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        """w float32 [R, C] -> params [R', G]. `weight` [C] or [R, C] (importance of each squared error) asks for a
        search of the range instead of taking the extremes."""
        ...

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        """w [R, c] and params spread to (or broadcasting with) it -> (codes uint8 [R, c], values float32 [R, c])."""
        ...

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        """Unspread params -> the stored parts other than codes."""
        ...


def blocks(w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """w [R, C] -> (tiles [R', G, rows * group], mask of the same shape: 1 where a tile holds a real weight)."""
    r, c = w.shape
    rows, group = r if spec.rows == -1 else spec.rows, c if spec.group == -1 else spec.group
    pad_r, pad_c = -r % rows, -c % group
    mask = torch.nn.functional.pad(torch.ones(1, 1, device=w.device).expand(r, c), (0, pad_c, 0, pad_r))
    padded = torch.nn.functional.pad(w, (0, pad_c, 0, pad_r))

    def tile(t: Tensor) -> Tensor:
        return t.view((r + pad_r) // rows, rows, (c + pad_c) // group, group).transpose(1, 2).flatten(2)

    return tile(padded), tile(mask)


def search(
    w: Tensor,
    spec: Spec,
    weight: Tensor | None,
    propose: Callable[[float], Params],
    grid: Grid,
    shrinks: Sequence[float] = SHRINKS,
) -> Params:
    """The one of `shrinks` per group that minimises sum(weight * (w - nearest(w))**2); `propose(shrink)` gives params
    [R', G].
    """
    from .families import spread

    full = propose(1.0)
    if weight is None:
        return full
    weight = weight.expand_as(w)
    best_error = torch.full_like(full.scale, torch.inf)
    best = full
    for shrink in shrinks:
        trial = propose(shrink)
        wide = Params(
            spread(trial.scale, spec, (w.shape[0], w.shape[1])),
            None if trial.zero is None else spread(trial.zero, spec, (w.shape[0], w.shape[1])),
            trial.parts,
        )
        tiles, mask = blocks(weight * (w - grid.nearest(w, spec, wide)[1]) ** 2, spec)
        error = (tiles * mask).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        zero = None
        if trial.zero is not None and best.zero is not None:
            zero = torch.where(better, trial.zero, best.zero)
        best = Params(torch.where(better, trial.scale, best.scale), zero, trial.parts)
    return best
