"""Codebook family: weight = table[code] * scale. NF4 and FP4 of bitsandbytes, SqueezeLLM, AQLM land here.

The table travels with the tensor, so a checkpoint's own values win over the constants below (but for FIXED, whose
values are the format's and never stored). Its shape, in float32, float16 or bfloat16:

    [2**bits]               one value a code
    [R, 2**bits]            the same, each output row its own (`rowtable`)
    [books, 2**bits, vec]   a code stands for `vec` consecutive inputs; the vectors of all books are added

Codes of the named grids hold more than an index: kernels/grids.py.

The codes of one vector are stored side by side, book 0 lowest, so they are one code of bits * books bits to whatever
packs, cuts or repacks them. Rounding contract: table entries to float32, added in the order of the books, multiplied
by the float32 (effective) scale. Left out: choosing vectors or tables (a calibration method's work), tables of more
than one output row (no known checkpoint has them).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError
from . import grids, search_grids, search_levels, search_plain
from .affine import stored
from .families import Family, level_codes, one_level_parts, spread
from .grid import Params, blocks, search
from .search import entries as levels_of
from .spec import GRIDS, ROW_TABLE, Spec

# QLoRA (arXiv 2305.14314) appendix E: quantiles of N(0, 1), each half holding zero, scaled to [-1, 1].
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# E2M1 with bitsandbytes' own order and values; bit 3 is the sign.
_FP4_HALF = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
# Of llama.cpp (MIT), ggml-common.h: kvalues_iq4nl.
IQ4NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
VALUES = {"nf4": NF4, "fp4": _FP4_HALF + tuple(-v for v in _FP4_HALF), "iq4nl": IQ4NL, "sign": (-1.0, 1.0)}
# Tables that are not parts of a tensor.
FIXED = ("iq4nl", "sign", *GRIDS)


def table(spec: Spec) -> Tensor:
    """float32 [2**bits] of a named table. Raises UserError where the spec names none."""
    if spec.table in GRIDS:
        raise UserError(f"{spec}: nothing here chooses its codes; name a table ({', '.join(VALUES)}) instead")
    if spec.table not in VALUES:
        raise UserError(
            f"{spec}: its table comes with a checkpoint, and nothing here chooses one; "
            f"to quantize, name a table ({', '.join(VALUES)}) or take another family"
        )
    return torch.tensor(VALUES[spec.table], dtype=torch.float32)


def value(spec: Spec, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if spec.table in GRIDS:
        found = grids.value(spec.table, codes.int()).flatten(1)
        return found.add_(_group_shifts(spec, parts, (found.shape[0], found.shape[1]))) if spec.group_shift else found
    entries = table(spec).to(codes.device) if spec.table in FIXED else parts["table"].float()
    if spec.table == ROW_TABLE:
        return entries.gather(1, codes.long())
    if spec.vec == 1:
        return entries[codes.int()]
    return _vectors(spec, codes.int(), entries).flatten(1)


def _group_shifts(spec: Spec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """float32 [R, C] of a grid whose shifts are the highest bits of scale codes."""
    codes = level_codes(spec, parts["scales"], parts["super_scales"])
    return spread(grids.shifts(codes // spec.scale_levels), spec, shape)


def _vectors(spec: Spec, codes: Tensor, entries: Tensor) -> Tensor:
    """codes int32 [R, C / vec], entries [books, 2**bits, vec] -> [R, C / vec, vec]."""
    total = None
    for book in range(spec.books):
        found = entries[book][(codes >> (book * spec.bits)) & ((1 << spec.bits) - 1)]
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def scale(values: Tensor, scales: Tensor, zero: Tensor | None) -> Tensor:
    return values * scales


def fixed_zero(spec: Spec) -> float | None:
    return None


class CodebookGrid:
    """Scale = the least that keeps a group between the smallest and the largest entry; a number takes the nearest."""

    def fit(self, w: Tensor, spec: Spec, weight: Tensor | None = None) -> Params:
        if spec.table in GRIDS:
            return search_grids.fit(w, spec, weight)
        entries = table(spec).to(w.device)
        if spec.table == "iq4nl" and (spec.rows, spec.view) == (1, "") and w.shape[1] % spec.group == 0:
            return search_levels.fit(w, spec, weight, levels_of(entries), self.nearest)
        if spec.table == "sign" and spec.group == 128 and w.shape[1] % 128 == 0:
            return search_plain.fit(w, spec, search_plain.signs)
        if spec.two_level and spec.scale_code != (8, 0):
            raise UserError(f"{spec}: nothing here chooses scales of two such levels; take u8:f32:256 or one level")
        parts = {} if spec.table in FIXED else {"table": entries}
        tiles, _ = blocks(w, spec)
        full = torch.maximum(tiles.amax(-1) / entries.max(), tiles.amin(-1) / entries.min())

        def propose(shrink: float) -> Params:
            if spec.two_level:
                return Params(full * shrink, parts=parts)
            return Params(stored(spec, full * shrink), parts=parts)

        found = search(w, spec, weight, propose, self)
        return _two_level(found, spec) if spec.two_level else found

    def nearest(self, w: Tensor, spec: Spec, params: Params) -> tuple[Tensor, Tensor]:
        if spec.table in GRIDS:
            raise UserError(
                f"{spec}: its codes are chosen for 8 weights at a time, so nothing can be fed back between columns; "
                "fix: --method rtn (with --imatrix), or a type without a grid"
            )
        stored_table = table(spec).to(w.device) if spec.table in FIXED else params.parts["table"]
        entries, order = stored_table.sort()
        place = torch.bucketize((w / params.scale).nan_to_num(0.0), (entries[1:] + entries[:-1]) / 2)
        return order[place].to(torch.uint8), entries[place] * params.scale

    def parts(self, spec: Spec, params: Params) -> dict[str, Tensor]:
        found = dict(params.parts)
        if "scales" not in found:
            found["scales"] = one_level_parts(spec, params.scale)
        return found


def dynamic_map() -> Tensor:
    """float32 [256]: bitsandbytes' signed dynamic 8-bit map (arXiv 2110.02861): decades 1e-6..1, the number of linear
    fraction bits growing with the decade, plus 0 and 1; ascending."""
    entries = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << decade) + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        entries += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(entries))


def _two_level(found: Params, spec: Spec) -> Params:
    """Quantize the block scales as bitsandbytes' double quantization does: subtract their mean, absmax per super
    block, 8-bit map.
    """
    level = spec.two_level
    assert level is not None
    offset = found.scale.mean()
    flat = (found.scale - offset).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % level[1])).view(-1, level[1])
    super_scales = padded.abs().amax(1).clamp(min=1e-12)
    entries = dynamic_map().to(flat.device)
    place = torch.bucketize(padded / super_scales[:, None], (entries[1:] + entries[:-1]) / 2)
    effective = (entries[place] * super_scales[:, None]).reshape(-1)[: flat.numel()].view_as(found.scale) + offset
    codes = place.reshape(-1)[: flat.numel()].view_as(found.scale).to(torch.uint8)
    extra = {"scales": codes, "super_scales": super_scales, "scale_table": entries, "scale_offset": offset}
    return Params(effective, parts={**found.parts, **extra})


FAMILY = Family("codebook", value, scale, fixed_zero, CodebookGrid(), tile=32, min_capability=60)
