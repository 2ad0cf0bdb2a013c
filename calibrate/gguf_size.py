"""A GGUF file of a given size: what each tensor loses in every type it could have, and the best of all choices.

The loss of a tensor is the share of its output's energy that becomes noise, |dW x|^2 / |W x|^2 with the mean squares of
the inputs, every tensor alike: noise of all layers adds up in the residual stream, as in EXL2's optimizer. It is
measured on ROWS rows, spread over the tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.checkpoint import AnyCheckpoint
from ..models.gguf_plan import Planned, pieces, plan
from ..quant_formats.gguf_mixture import fitting, is_quantized, needs_imatrix, tensor_bytes
from ..quant_formats.gguf_rules import MIXTURES
from .allocate import Choice, Measured, Table, allocate, check_target, parse_bpw, parse_size, weighted_error
from .gguf import Layout, importances, rounded
from .imatrix import Imatrix
from .plan import source_name
from .stats import Squares

ROWS = 256
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


def targeted(ckpt: AnyCheckpoint, target: Target, imatrix: Imatrix | None, notes: Path, progress: bool) -> Layout:
    """The types that lose least in a file of at most `target` bytes (its header, a few hundred KB, not counted).

    Losses are kept in `notes` as they are measured, so that a killed run goes on. UserError for a target that no choice
    of types meets, and where every tensor could be at its best.
    """
    arch, tensors = plan(ckpt)
    wanted = target.bytes(sum(math.prod(each.shape) for each in tensors))
    chosen = [
        each for each in tensors if each.link and is_quantized(each.name, each.shape, arch.name.partition("+")[0])
    ]
    known = {} if imatrix is None else importances(tuple(tensors), imatrix)
    fixed = sum(4 * math.prod(each.shape) for each in tensors if each not in chosen)
    measured = Measured(notes, {"source": source_name(ckpt), "imatrix": imatrix and imatrix.where, "rows": ROWS})
    for each in tqdm(chosen, unit="tensor", disable=not progress, desc="measure"):
        if each.name not in measured.table:
            measured.put(each.name, _losses(each, ckpt, known))
    check_target(measured.table, wanted, fixed)
    types = allocate(measured.table, wanted, fixed).types
    notes.unlink()
    every = {each.name: types.get(each.name, "F32") for each in tensors}
    return Layout(_nearest(measured.table, types), tuple(tensors), every)


def _losses(each: Planned, ckpt: AnyCheckpoint, known: Mapping[str, Squares]) -> dict[str, Choice]:
    sample, seen = _sample(each, ckpt), known.get(each.name)
    importance = None if seen is None else seen.importance
    energy = weighted_error(torch.zeros_like(sample), sample, importance) or 1.0
    found = {}
    for kind in CANDIDATES:
        if needs_imatrix(kind) and seen is None:
            continue
        fits = fitting(each.name, each.shape, kind)
        if fits not in found and fits != "F16":
            error = weighted_error(sample, rounded(sample, fits, seen).dequantize(), importance)
            found[fits] = Choice(tensor_bytes(fits, each.shape), error / energy)
    found["F16"] = Choice(2 * math.prod(each.shape), 0.0)
    return found


def _sample(each: Planned, ckpt: AnyCheckpoint) -> Tensor:
    """float32 [about ROWS, K]: every so many-th row of the tensor."""
    step = max(1, math.prod(each.shape[:-1]) // ROWS)
    found = [piece.reshape(-1, each.shape[-1])[::step].clone() for piece in pieces(each, ckpt)]
    whole = torch.cat(found)
    return whole[:: max(1, whole.shape[0] // ROWS)]


def _nearest(table: Table, types: Mapping[str, str]) -> str:
    """The file type whose base most bytes are in: what llama.cpp calls such a file."""
    by_type: dict[str, int] = {}
    for tensor, kind in types.items():
        by_type[kind] = by_type.get(kind, 0) + table[tensor][kind].bytes
    usual = max(by_type, key=lambda kind: by_type[kind])
    return next((name for name, mix in MIXTURES.items() if mix.base == usual), "f16")
