"""What each tensor of a GGUF file would lose as each candidate type: the table calibrate/allocate.py chooses from."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..quant_formats.gguf_mixture import fitting, needs_imatrix, tensor_bytes
from .allocate import Choice, Measured
from .fisher import Curvature
from .imatrix import Imatrix

# Weights of a tensor that are quantized to measure it: whole rows, evenly spread. The quantizers of the smallest types
# do a million a second and core, so a model of 8 B would take hours a type.
_SAMPLE = 1 << 20

# (weight float32 [N, K], ggml type, importance float32 [K] or None) -> what is left of the weight, float32 [N, K].
Restore = Callable[[Tensor, str, Tensor | None], Tensor]


class Source(NamedTuple):
    """One tensor that gets a type."""

    name: str
    # [N, K], or [M, N, K] of stacked experts.
    shape: tuple[int, ...]
    # The weight as the file will hold it; called once, and only where the tensor was not measured before.
    weight: Callable[[], Tensor]
    # How much its errors matter, once for each use: rows [M * N], columns [K]. Empty: as if they did not.
    curvatures: Sequence[Curvature]


def measure(
    sources: Iterable[Source],
    candidates: Sequence[str],
    restore: Restore,
    imatrix: Imatrix | None,
    measured: Measured,
    progress: bool = True,
) -> None:
    """Put every tensor's bytes and loss as each of the candidate types (ggml's names) into `measured`.

    The loss is what the error adds to the KL divergence, in nats a token (`expected_kld`), on a sample of rows. A type
    whose blocks do not fit a tensor's rows is replaced by what llama.cpp falls back to; one that needs an importance
    matrix is left out where there is none, UserError where that leaves nothing.
    """
    for source in tqdm(list(sources), unit="tensor", disable=not progress, desc="sensitivity"):
        if source.name in measured.table:
            continue
        importance = imatrix.importance(source.name, source.shape) if imatrix else None
        kinds = types_for(source, candidates, importance is not None)
        matrices = _sampled(source.weight().float().reshape(-1, *source.shape[-2:]))
        rows = [None] * len(matrices) if importance is None else list(importance.expand(len(matrices), -1))
        choices = {}
        for kind in kinds:
            restored = torch.stack([restore(w, kind, row) for w, row in zip(matrices, rows, strict=True)])
            loss = expected_kld(restored - matrices, source.curvatures, source.shape)
            choices[kind] = Choice(tensor_bytes(kind, source.shape), loss)
        measured.put(source.name, choices)


def types_for(source: Source, candidates: Collection[str], covered: bool) -> list[str]:
    """The candidate types this tensor can have, `covered` saying whether the importance matrix has it."""
    fit = dict.fromkeys(fitting(source.name, source.shape, kind) for kind in candidates)
    found = [kind for kind in fit if covered or not needs_imatrix(kind)]
    if not found:
        raise UserError(
            f"{source.name}: every candidate ({', '.join(candidates)}) needs an importance matrix, and there is none "
            f"for it. Fix: --imatrix FILE that covers it, or a candidate such as Q2_K"
        )
    return found


def expected_kld(error: Tensor, curvatures: Sequence[Curvature], shape: Sequence[int]) -> float:
    """1/2 sum F * error**2 of a weight of `shape` [N, K] or [M, N, K]; error [M, n, K] of every so many-th row."""
    count, rows = error.shape[:2]
    total, step = 0.0, _step(math.prod(shape))
    for each in curvatures:
        weighted = error.double().square() @ each.columns.to(error.device)
        matter = each.rows.to(error.device).view(count, -1)
        total += float((weighted * matter[:, :: min(step, matter.shape[1])]).sum()) * matter.shape[1] / rows
    return total / 2


def _sampled(matrices: Tensor) -> Tensor:
    """[M, N, K] -> [M, n, K] with about `_SAMPLE` weights, at least a row of each."""
    return matrices[:, :: min(_step(matrices.numel()), matrices.shape[1])]


def _step(weights: int) -> int:
    return max(1, math.ceil(weights / _SAMPLE))
