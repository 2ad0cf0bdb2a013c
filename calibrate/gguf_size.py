"""A GGUF file of a given size: what each tensor would lose in every type (sensitivity.py), and the best of all choices
(allocate.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_plan import Planned, pieces, plan
from ..quant_formats.gguf_mixture import is_quantized
from ..quant_formats.gguf_rules import MIXTURES
from .allocate import Measured, Table, allocate, check_target, parse_bpw, parse_size
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


def targeted(ckpt: AnyCheckpoint, target: Target, imatrix: Imatrix | None, notes: Path, progress: bool) -> Layout:
    """The types that lose least in a file of at most `target` bytes (its header, a few hundred KB, not counted).

    Losses are kept in `notes` as they are measured, so that a killed run goes on. UserError for a target that no choice
    of types meets, and one beyond every tensor's best.
    """
    arch, tensors = plan(ckpt)
    wanted = target.bytes(sum(math.prod(each.shape) for each in tensors))
    name = arch.name.partition("+")[0]
    chosen = [each for each in tensors if each.link and is_quantized(each.name, each.shape, name)]
    fixed = sum(4 * math.prod(each.shape) for each in tensors if each not in chosen)
    measured = Measured(notes, {"source": source_name(ckpt), "imatrix": imatrix and imatrix.where, "types": CANDIDATES})
    sources = [Source(each.name, each.shape, partial(_whole, each, ckpt)) for each in chosen]
    measure(sources, CANDIDATES, _restored, imatrix, {}, measured, progress)
    check_target(measured.table, wanted, fixed)
    types = allocate(measured.table, wanted, fixed).types
    notes.unlink()
    every = {each.name: types.get(each.name, "F32") for each in tensors}
    return Layout(_usual(measured.table, types), tuple(tensors), every)


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
