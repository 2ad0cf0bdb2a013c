"""Vectors of named grids (IQ1, IQ2 and IQ3 of GGUF): which one stands for 8 or 4 neighbours, and with which scale.

For each group: signs first (where seven bits hold eight, the sign that costs least to be wrong is flipped), then a few
scales; for each the vector nearest in the weighted distance, by two matrix products over the whole grid, and the
least-squares scale those vectors leave. The best try decides; scales become codes of two levels as in search_levels.py,
and vectors are chosen once more for the scale as it will be decoded. The reference implementation is llama.cpp's
ggml-quants.c (MIT: quantize_row_iq2_xxs_impl and its like), which searches neighbour lists instead of the whole grid.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import grids
from .grid import Params
from .search import Levels, scaled
from .search_levels import Found, by_pieces, check_groups, held, params, spread_weight
from .spec import GRIDS, GridCode, Spec

# Fractions of the scale at which the largest number of a group is the grid's largest, tried in turn.
_TRIES = (0.6, 0.7, 0.8, 0.9, 1.0)
_TINY = 1e-15
_LEAST = 1e-38


class _Choice(NamedTuple):
    """chosen int64 [B, group / v]; sums over a group [B] of w * x * q and w * q**2, q being the chosen vectors."""

    chosen: Tensor
    sxq: Tensor
    sqq: Tensor


def fit(w: Tensor, spec: Spec, weight: Tensor | None) -> Params:
    """Codes and scales of w float32 [R, C]; `weight` [C] or [R, C], None: all are alike. Params.codes is int32
    [R, C / 8]. Raises UserError where rows are not whole super blocks, and for numbers that are not finite.
    """
    check_groups(spec, w.shape[1])
    return params(spec, by_pieces(w, weight, partial(_search, spec=spec)))


def _sides(name: str, device: torch.device) -> list[Tensor]:
    """What a group chooses between, float32 [E, v]: one set of vectors, or (one shift for the whole group) two."""
    table, vectors = GRIDS[name], grids.vectors(name, device)
    if table.signs:
        return [vectors]
    shifted = [vectors + grids.SHIFT, vectors - grids.SHIFT]
    return shifted if table.group_shift else [torch.cat(shifted)]


def _search(x: Tensor, weight: Tensor, spec: Spec) -> Found:
    level = spec.two_level
    assert level is not None
    table, rows = GRIDS[spec.table], x.shape[0]
    importance = spread_weight(x, weight, spec.group * level[1]).view(-1, spec.group)
    numbers = x.reshape(-1, spec.group)
    signs = None
    if table.signs:
        numbers, signs = _magnitudes(numbers, importance, table.signs)
    sides = _sides(spec.table, x.device)
    tried = [_best(numbers, importance, side) for side in sides]
    pick = torch.stack([sxq * sxq / sqq.clamp(min=_LEAST) for _, (sxq, sqq) in tried]).argmax(0)
    sxq, sqq = (torch.stack([sums[i] for _, sums in tried]).gather(0, pick[None])[0] for i in (0, 1))
    scale, found = _store(spec, (sxq / sqq.clamp(min=_LEAST)).clamp(min=0), sqq)
    last = [_nearest(numbers, importance, scale, side) for side in sides]
    index, side = torch.stack([choice.chosen for choice in last]), _final(last, scale)
    chosen = index.gather(0, side[None, :, None].expand(1, *index.shape[1:]))[0]
    codes = _codes(chosen, signs, table)
    if table.group_shift:
        shift = (side * spec.scale_levels).to(torch.uint8)
        found["scale_codes"] = found["scale_codes"] + shift.view_as(found["scale_codes"])
    found |= {"scales": scale, "codes": codes}
    return {name: t.reshape(rows, -1) for name, t in found.items()}


def _final(choices: list[_Choice], scale: Tensor) -> Tensor:
    """Which side errs least at the scale of each group: error = sum w x**2 - 2 s sxq + s**2 sqq."""
    return torch.stack([scale * scale * c.sqq - 2 * scale * c.sxq for c in choices]).argmin(0)


def _magnitudes(numbers: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """|x| (negative where a sign had to be wrong) and sign bits int32 [B, group / 8]."""
    octets = numbers.view(numbers.shape[0], -1, 8)
    negative = octets < 0
    flip = torch.zeros_like(negative)
    if bits == 7:
        cost = importance.view_as(octets) * octets * octets
        odd = (negative.sum(-1, keepdim=True) & 1).bool()
        flip.scatter_(-1, cost.argmin(-1, keepdim=True), odd)
    magnitudes = torch.where(flip, -octets.abs(), octets.abs()).view_as(numbers)
    places = torch.tensor([1 << i if i < bits else 0 for i in range(8)], device=numbers.device)
    return magnitudes, ((negative ^ flip) * places).sum(-1).int()


def _best(numbers: Tensor, importance: Tensor, side: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The scale [B] of the best try, and the sums its vectors leave."""
    most = numbers.abs().amax(1) / side.abs().max()
    scale, sums = torch.zeros_like(most), (torch.zeros_like(most), torch.zeros_like(most))
    gain = torch.zeros_like(most)
    for attempt in (*_TRIES, None):
        _, sxq, sqq = _nearest(numbers, importance, scale if attempt is None else most * attempt, side)
        better = (sxq > 0) & (sxq * sxq > gain * sqq)
        gain = torch.where(better, sxq * sxq / sqq.clamp(min=_LEAST), gain)
        scale = torch.where(better, sxq / sqq.clamp(min=_LEAST), scale)
        sums = torch.where(better, sxq, sums[0]), torch.where(better, sqq, sums[1])
    return scale, sums


def _nearest(numbers: Tensor, importance: Tensor, scale: Tensor, side: Tensor) -> _Choice:
    """The vectors nearest to numbers / scale in the distance that importance weighs."""
    groups, width = numbers.shape[0], side.shape[1]
    w = importance.reshape(-1, width)
    wx = importance * numbers
    inverse = torch.where(scale > _TINY, 1 / scale, 0.0)
    scores = (wx * inverse[:, None]).view(-1, width) @ (-2 * side.t())
    scores.addmm_(w, (side * side).t())
    index = scores.argmin(1)
    found = side[index].view(groups, -1)
    return _Choice(index.view(groups, -1), (wx * found).sum(1), (importance * found * found).sum(1))


def _codes(index: Tensor, signs: Tensor | None, table: GridCode) -> Tensor:
    """Indices [B, group / v] and sign bits [B, group / 8] -> codes int32 [B, group / 8]."""
    parts = index.view(index.shape[0], -1, table.indices).int()
    code = sum((parts[..., i] << (i * table.index_bits) for i in range(1, table.indices)), parts[..., 0])
    return code if signs is None else code | signs << (table.index_bits * table.indices)


def _store(spec: Spec, values: Tensor, sharp: Tensor) -> tuple[Tensor, Found]:
    """Scales [B] >= 0 as they will be decoded, and the codes and float16 they are decoded from."""
    level = spec.two_level
    assert level is not None
    factor, top = GRIDS[spec.table].factor, spec.scale_levels - 1
    nearest: Callable[[Tensor], Tensor] = lambda t: ((t / factor - 0.5).round_().clamp_(0, top) + 0.5) * factor  # noqa: E731
    most = (top + 0.5) * factor
    levels = Levels(nearest, [most + step * factor for step in (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5)])
    small = values.view(-1, level[1]).t().contiguous()
    supers = held(scaled(small, sharp.view(-1, level[1]).t().contiguous(), levels)[0], torch.float16)
    step = supers.float()
    numbers = nearest((small / step).nan_to_num_(0.0))
    codes = (numbers / factor - 0.5).round_().to(torch.uint8)
    return (numbers * step).t().reshape(-1), {"supers": supers, "scale_codes": codes.t()}
