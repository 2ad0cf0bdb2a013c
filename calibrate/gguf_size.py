"""A GGUF file of a given size: what each tensor would lose in every type (sensitivity.py), and the best of all choices
(allocate.py).

Losses are predicted KL divergences (fisher.py). Of the books-8m model they are within 10 % of what quantizing only that
tensor does to it, and files chosen by them have about half the KLD of llama.cpp's mixtures of the same bytes; ones
chosen by the relative error of each tensor's output have up to 7 times as much (results/LOG.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_plan import Planned, permuted, pieces, plan
from ..quant_formats.gguf_mixture import is_quantized
from ..quant_formats.gguf_rules import MIXTURES
from .allocate import Measured, Table, allocate, check_target, parse_bpw, parse_size
from .data import calibration_rows
from .fisher import Curvature, curvatures
from .gguf import Layout, known, rounded
from .imatrix import Imatrix
from .plan import source_name
from .sensitivity import Source, measure

# Samples and tokens of the text that gradients are taken of: 1024 tokens already predict a KLD to 10 %.
_TEXT = (16, 512)
# What a tensor may become.
CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Target:
    """--target-size ("5GiB") or --target-bpw ("4.25", bits of the file per weight), as given."""

    size: str | None = None
    bpw: str | None = None

    def bytes(self, weights: int) -> int:
        """UserError for what is no size."""
        return parse_size(self.size) if self.size is not None else parse_bpw(self.bpw or "", weights)


def targeted(
    ckpt: AnyCheckpoint, target: Target, imatrix: Imatrix | None, calib: str, seed: int, notes: Path, progress: bool
) -> Layout:
    """The types that lose least on the text `calib` in a file of at most `target` bytes (its header, a few hundred KB,
    not counted).

    Losses are kept in `notes` as they are measured, so that a killed run goes on. UserError for a target that no choice
    of types meets, and one beyond every tensor's best.
    """
    arch, tensors = plan(ckpt)
    wanted = target.bytes(sum(math.prod(each.shape) for each in tensors))
    name = arch.name.partition("+")[0]
    chosen = [each for each in tensors if each.link and is_quantized(each.name, each.shape, name)]
    fixed = sum(4 * math.prod(each.shape) for each in tensors if each not in chosen)
    about = {"source": source_name(ckpt), "imatrix": imatrix and imatrix.where, "calib": calib, "types": CANDIDATES}
    measured = Measured(notes, {**about, "seed": seed})
    if any(each.name not in measured.table for each in chosen):
        found = curvatures(ckpt, calibration_rows(ckpt, calib, *_TEXT, seed), seed, progress)
        sources = [
            Source(each.name, each.shape, partial(_whole, each, ckpt), matter)
            for each, matter in zip(chosen, curvatures_of(chosen, found), strict=True)
        ]
        measure(sources, CANDIDATES, _restored, imatrix, measured, progress)
    check_target(measured.table, wanted, fixed)
    types = allocate(measured.table, wanted, fixed).types
    notes.unlink()
    every = {each.name: types.get(each.name, "F32") for each in tensors}
    return Layout(_usual(measured.table, types), tuple(tensors), every)


def curvatures_of(tensors: Sequence[Planned], found: Mapping[str, list[Curvature]]) -> list[list[Curvature]]:
    """Those of each tensor, its rows in the order of the file. A tensor with a weight that has none gets the mean of
    all others for every number."""
    total = sum(float(c.rows.sum() * c.columns.sum()) for uses in found.values() for c in uses)
    flat = total / max(1, sum(c.rows.numel() * c.columns.numel() for uses in found.values() for c in uses))
    return [_curvatures(each, found) or [_flat(each.shape, flat)] for each in tensors]


def _flat(shape: Sequence[int], value: float) -> Curvature:
    rows = torch.full((math.prod(shape[:-1]),), value, dtype=torch.float64)
    return Curvature(rows, torch.ones(shape[-1], dtype=torch.float64))


def _curvatures(each: Planned, found: Mapping[str, list[Curvature]]) -> list[Curvature]:
    """Experts' columns are averaged: rows say how much each expert matters."""
    assert each.link is not None
    link, weights = each.link, each.link.weights
    if link.part or link.transposed or any(weight not in found for weight in weights):
        return []
    if len(weights) == 1:
        return [Curvature(permuted(link, c.rows), c.columns) for c in found[weights[0]]]
    rows = torch.cat([found[weight][0].rows for weight in weights])
    return [Curvature(rows, torch.stack([found[weight][0].columns for weight in weights]).mean(0))]


def _whole(each: Planned, ckpt: AnyCheckpoint) -> Tensor:
    return torch.cat([piece.reshape(-1, each.shape[-1]) for piece in pieces(each, ckpt)]).view(each.shape)


def _restored(weight: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    return rounded(weight, kind, None if importance is None else known(importance)).dequantize()


def _usual(table: Table, types: Mapping[str, str]) -> str:
    """The file type whose base most bytes are in: what llama.cpp calls such a file."""
    by_type: dict[str, int] = {}
    for tensor, kind in types.items():
        by_type[kind] = by_type.get(kind, 0) + table[tensor][kind].bytes
    usual = max(by_type, key=lambda kind: by_type[kind])
    return next((name for name, mix in MIXTURES.items() if mix.base == usual), "f16")
