"""What each tensor of a GGUF file would lose as each candidate type: the table calibrate/allocate.py chooses from.

    loss[tensor][type] = gain[tensor] * relative squared error of the tensor's own output as that type

The error of a tensor's own output says how it falls from type to type but not what a tensor matters; summed over
tensors it is a bad guide. What the block's output (the residual stream) loses when one tensor is perturbed is a good
one. Measured on books-8m with one tensor of 56 in Q4_0: its logarithm correlates 0.97 with that of the KL divergence of
the model's predictions, the tensor's own error 0.1 to 0.5. Mixing Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL to 3,
4.5, 5 and 6.5 bits gave KL divergences of 0.129, 0.0042, 0.0021 and 0.00044 by this loss, 0.37, 0.0053, 0.0039 and
0.0009 by the tensors' own relative errors, and 0.116, 0.0040, 0.0020 and 0.00041 by each tensor's own KL divergence,
which costs a run of the whole model each. So each tensor is perturbed once, whatever the candidates: its gain.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..kernels.spec import Spec
from ..models.load import owner
from ..models.names import Placement
from ..quant_formats.gguf_mixture import fitting, needs_imatrix, tensor_bytes
from . import rtn
from .allocate import Choice, Measured, weighted_error
from .imatrix import Imatrix
from .importance import BlockRun
from .method import Settings
from .stats import Squares

# Weights of a tensor that are quantized to measure it: whole rows, evenly spread. The quantizers of the smallest types
# do a million a second and core, so a model of 8 B would take hours a type.
_SAMPLE = 1 << 20

# (weight float32 [N, K], ggml type, importance float32 [K] or None) -> what is left of the weight, float32 [N, K].
Restore = Callable[[Tensor, str, Tensor | None], Tensor]


def gains(
    src: str | Path,
    *,
    calib: str,
    calib_samples: int = 8,
    calib_seqlen: int = 512,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """GGUF tensor -> relative squared error of its block's output for each unit of its own, for every weight of the
    blocks: each is perturbed by rounding to 4 bits, alone, and its block run on the first batch of `calib`.
    """
    run = BlockRun(src, calib, calib_samples, calib_seqlen, device, seed)
    found: dict[str, _Probe] = {}

    def probe(index: int) -> None:
        found.update((p.target, _probe(run, index, p)) for p in run.places[index] if _weights_of(run, p))

    stats = run.blocks(progress, probe)
    by_target = {target: probe.gain(stats) for target, probe in found.items()}
    target_of = {weight: p.target for part in run.places for p in part for weight in p.sources}
    held = ((link.tensor, target_of.get(link.weights[0], "")) for link in run.links)
    return {tensor: by_target[target] for tensor, target in held if target in by_target}


@dataclass(frozen=True)
class _Probe:
    """One model parameter [K columns, M matrices] perturbed: what its block's output lost, and its own errors."""

    lost: float
    # float64 [M, K]: by column, squares of the perturbation and of the weight.
    error: Tensor
    weight: Tensor
    keys: tuple[str, ...]

    def gain(self, stats: Mapping[str, Squares]) -> float:
        nothing = torch.zeros(self.weight.shape[1], dtype=torch.float64)
        squares = torch.stack([stats[k].squares.cpu() if k in stats and stats[k].n else nothing for k in self.keys])
        own, whole = float((self.error * squares).sum()), float((self.weight * squares).sum())
        return self.lost * whole / own if own else 0.0


def _weights_of(run: BlockRun, placement: Placement) -> tuple[str, ...]:
    """Stats keys of the matrices of a placement's parameter, one a matrix; () where it is no weight of a product."""
    return tuple(dict.fromkeys(key for source in placement.sources for key in run.keys.get(source, ())))


def _probe(run: BlockRun, index: int, placement: Placement) -> _Probe:
    module, leaf = owner(run.model, placement.target)
    assert module is not None
    live: Tensor = module._parameters[leaf].data  # type: ignore[union-attr]
    before = run.runs.sample(index)
    kept = live.clone()
    # [M, N, K], K being the inputs.
    weight = kept.reshape(-1, *kept.shape[-2:])
    if getattr(module, "is_transposed", False):
        weight = weight.transpose(-1, -2)
    spec = Spec.parse("affine4.g32.sym" if weight.shape[-1] % 32 == 0 else "affine4.channel.sym")
    rounded = torch.stack([rtn.quantize(w.contiguous(), spec, None, Settings()).dequantize() for w in weight])
    turned = rounded.transpose(-1, -2) if getattr(module, "is_transposed", False) else rounded
    live.copy_(turned.reshape(live.shape))
    after = run.runs.sample(index)
    live.copy_(kept)
    lost = float((after - before).square().sum(dtype=torch.float64) / before.square().sum(dtype=torch.float64))
    columns = [t.square().sum(-2, dtype=torch.float64).cpu() for t in (rounded - weight, weight)]
    return _Probe(lost, *columns, _weights_of(run, placement))


class Source(NamedTuple):
    """One tensor that gets a type."""

    name: str
    # [N, K], or [M, N, K] of stacked experts.
    shape: tuple[int, ...]
    # The weight as the file will hold it; called once, and only where the tensor was not measured before.
    weight: Callable[[], Tensor]


def measure(
    sources: Iterable[Source],
    candidates: Sequence[str],
    restore: Restore,
    imatrix: Imatrix | None,
    gain: Mapping[str, float],
    measured: Measured,
    progress: bool = True,
) -> None:
    """Put every tensor's bytes and loss as each of the candidate types (ggml's names) into `measured`.

    `gain` is what `gains` returned; a tensor that is not in it (embeddings, output) has gain 1: its error is the
    residual stream's, or the logits'. Errors are measured on a sample of rows. A type whose blocks do not fit a
    tensor's rows is replaced by what llama.cpp falls back to; one that needs an importance matrix is left out where
    there is none, UserError where that leaves nothing.
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
            loss = gain.get(source.name, 1.0) * relative_loss(matrices, restored, importance)
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


def relative_loss(weight: Tensor, restored: Tensor, importance: Tensor | None) -> float:
    """Squared error of the output over the squared output, both for independent inputs; weight, restored [M, N, K]."""
    nothing = torch.zeros_like(weight)
    return weighted_error(weight, restored, importance) / max(weighted_error(weight, nothing, importance), 1e-30)


def _sampled(matrices: Tensor) -> Tensor:
    """[M, N, K] -> [M, n, K] with about `_SAMPLE` weights, at least a row of each."""
    count, rows, columns = matrices.shape
    step = max(1, math.ceil(rows * columns * count / _SAMPLE))
    return matrices[:, :: min(step, rows)]
