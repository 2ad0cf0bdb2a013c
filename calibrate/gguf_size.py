"""A GGUF file of a given size: what each tensor would lose in every type (sensitivity.py), and the best of all choices
(allocate.py).

Losses are predicted KL divergences (fisher.py). Files of books-8m chosen by them have 0.38 to 0.57 times the KLD of
llama.cpp's mixtures of the same bytes (results/LOG.md).
"""

import math
from collections.abc import Mapping
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
from .fisher import Curvature, curvatures
from .gguf import Layout, known, rounded
from .imatrix import Imatrix
from .plan import source_name
from .sensitivity import Source, measure

# What a tensor may become.
CANDIDATES = ("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Target:
    """--target-size ("5GiB") or --target-bpw ("4.25", bits of the file per weight), as given."""

    size: str | None = None
    bpw: str | None = None

    def bytes(self, weights: int) -> int:
        """UserError for what is no size."""
        return parse_size(self.size) if self.size is not None else parse_bpw(self.bpw or "", weights)


def targeted(
    ckpt: AnyCheckpoint,
    target: Target,
    imatrix: Imatrix | None,
    notes: Path,
    calib: str,
    rows: Mapping[str, int],
    progress: bool,
) -> Layout:
    """The types that lose least on the text `calib` in a file of at most `target` bytes (its header, a few hundred KB,
    not counted).

    `rows` says the tokens of a sample and the seed; curvatures take few samples. Losses are kept in `notes` as they are
    measured, so that a killed run goes on; the caller deletes the file when nothing needs it any more. UserError for a
    target that no choice of types meets, and one beyond every tensor's best.
    """
    arch, tensors = plan(ckpt)
    wanted = target.bytes(sum(math.prod(each.shape) for each in tensors))
    name = arch.name.partition("+")[0]
    chosen = [each for each in tensors if each.link and is_quantized(each.name, each.shape, name)]
    fixed = sum(4 * math.prod(each.shape) for each in tensors if each not in chosen)
    told = {"source": source_name(ckpt), "imatrix": imatrix and imatrix.where, "types": CANDIDATES, "calib": calib}
    measured = Measured(notes, {**told, **rows})
    if any(each.name not in measured.table for each in chosen):
        seqlen, seed = rows["seqlen"], rows["seed"]
        found = curvatures(ckpt.path, calib=calib, calib_seqlen=seqlen, seed=seed, progress=progress)
        sources = [Source(each.name, each.shape, partial(_whole, each, ckpt), matter(each, found)) for each in chosen]
        measure(sources, CANDIDATES, _restored, imatrix, measured, progress)
    check_target(measured.table, wanted, fixed)
    types = allocate(measured.table, wanted, fixed).types
    every = {each.name: types.get(each.name, "F32") for each in tensors}
    return Layout(_usual(measured.table, types), tuple(tensors), every)


def matter(each: Planned, found: Mapping[str, list[Curvature]]) -> list[Curvature]:
    """The curvatures of a tensor, one for each use of it, rows in the order of the file; [] where no token reached it.

    Of stacked experts rows say how much each matters and columns are averaged; those that no token reached count as the
    mean of the others.
    """
    assert each.link is not None
    link, reached = each.link, [weight for weight in each.link.weights if weight in found]
    outputs = math.prod(each.shape[:-1]) // len(link.weights)
    if not reached:
        return []
    uses = {weight: [_expanded(c, outputs, each.shape[-1]) for c in found[weight]] for weight in reached}
    if len(link.weights) == 1:
        return [Curvature(permuted(link, c.rows), c.columns) for c in uses[reached[0]]]
    seen = {weight: use[0] for weight, use in uses.items()}
    mean = torch.stack([c.rows for c in seen.values()]).mean(0)
    rows = torch.cat([seen[weight].rows if weight in seen else mean for weight in link.weights])
    return [Curvature(rows, torch.stack([c.columns for c in seen.values()]).mean(0))]


def _expanded(curvature: Curvature, rows: int, columns: int) -> Curvature:
    return Curvature(curvature.rows.expand(rows), curvature.columns.expand(columns))


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
