"""How much the model's predictions suffer from an error in each weight: the curvature of the KL divergence.

For small errors dW of the weights the KL divergence from the unquantized model is, in nats a token,

    1/2 sum F * dW**2,   F = mean over tokens of E[(d ln p(y) / dW)**2],   y drawn from the model's own predictions

with F the diagonal of Fisher's information matrix. F is kept as the outer product of its row and column sums (as in
Adafactor, arXiv 1804.04235). Gradients need no labels and go backwards block by block, so that one block's weights are
in memory at a time, and the inputs of all blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.load import owner
from ..models.names import Placement
from .blocks import Blocks, unload_weights
from .importance import BlockRun

_LEAST = 1e-300
# Parameter -> what was added up in each place it is used (a tied embedding has two).
_Sums = dict[str, "list[_Sum]"]


@dataclass(frozen=True)
class Curvature:
    """F of one use of a weight: rows[n] * columns[k], float64 [N] and [K]; both [1] where only its mean is known."""

    rows: Tensor
    columns: Tensor


@dataclass
class _Sum:
    rows: Tensor = field(default_factory=lambda: torch.zeros(()))
    columns: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, gradient: Tensor) -> None:
        """gradient [.., N, K] of one row of tokens."""
        squares = gradient.square()
        self.rows = self.rows + squares.sum(-1, dtype=torch.float64)
        self.columns = self.columns + squares.sum(-2, dtype=torch.float64)


def curvatures(
    src: str | Path,
    *,
    calib: str,
    calib_samples: int = 16,
    calib_seqlen: int = 512,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[Curvature]]:
    """Curvatures of the matrices of a checkpoint by name, one for each use, measured on the text `calib`.

    Of weights that the model holds in another form than the checkpoint (transposed or fused experts) only the mean is
    known; experts that no token reached are left out. UserError for a checkpoint that cannot be read, an architecture
    GGUF does not know, and unusable text.
    """
    run = BlockRun(src, calib, calib_samples, calib_seqlen, device, seed)
    sums = _backward(run, seed, progress)
    found: dict[str, list[Curvature]] = {}
    for placement in (p for part in run.places for p in part):
        for name, curvature in _of_sources(placement, sums.get(placement.target, [])):
            found.setdefault(name, []).append(replace(curvature, rows=curvature.rows / run.runs.ids.numel()))
    return found


def _backward(run: BlockRun, seed: int, progress: bool) -> _Sums:
    """Sums of every matrix of the model by name, from the head back to the embeddings, one row of tokens at a time."""
    outside, runs = len(run.places) - 1, run.runs
    run.begin()
    inputs: list[list[Tensor]] = []
    sums: _Sums = {}
    with tqdm(total=2 * outside, unit="block", disable=not progress, desc="curvature") as bar:
        for index in range(outside):
            inputs.append(_rows(runs.hidden))
            run.load(index)
            runs.run(index, keep=True)
            unload_weights(run.model, run.places[index])
            bar.update()
        generator = torch.Generator(run.device).manual_seed(seed)
        add = _stage(run, outside, sums)
        gradients = [
            add(partial(_score, runs, ids, generator), hidden, None)
            for ids, hidden in zip(runs.ids.split(1), _rows(runs.hidden), strict=True)
        ]
        for index in reversed(range(outside)):
            run.load(index)
            add = _stage(run, index, sums)
            pairs = zip(inputs.pop(), gradients, strict=True)
            gradients = [add(partial(runs.block, index), hidden, gradient) for hidden, gradient in pairs]
            unload_weights(run.model, run.places[index])
            bar.update()
    add = _stage(run, outside, sums)
    for ids, gradient in zip(runs.ids.split(1), gradients, strict=True):
        add(runs.embed, ids, gradient)
    return sums


def _rows(batches: list[Tensor]) -> list[Tensor]:
    return [row for batch in batches for row in batch.split(1)]


def _score(runs: Blocks, ids: Tensor, generator: torch.Generator, hidden: Tensor) -> Tensor:
    """Log-probability of tokens drawn from the model's own predictions."""
    likely = runs.head(ids, hidden).logits[0].float().log_softmax(-1)
    drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
    return likely.gather(-1, drawn).sum()


# (forward, its input, gradient of its output) -> gradient of its input
_Step = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor | None], Tensor]


def _stage(run: BlockRun, part: int, sums: _Sums) -> _Step:
    """Backward passes through one part of the model, which add the squares of its matrices' gradients to `sums`."""
    matrices = {}
    for placement in run.places[part]:
        module, leaf = owner(run.model, placement.target)
        parameter = None if module is None else module._parameters.get(leaf)
        if parameter is not None and parameter.dim() > 1:
            matrices[placement.target] = parameter.requires_grad_()
    here: dict[str, _Sum] = {}

    def step(forward: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor | None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(x.is_floating_point())
            forward(x).backward(gradient)
        for name, parameter in matrices.items():
            if parameter.grad is not None:
                if name not in here:
                    here[name] = _Sum()
                    sums.setdefault(name, []).append(here[name])
                here[name].add(parameter.grad)
                parameter.grad = None
        return x if x.grad is None else x.grad

    return step


def _of_sources(placement: Placement, sums: list[_Sum]) -> Iterator[tuple[str, Curvature]]:
    """(checkpoint weight, its F summed over tokens) for each use of a parameter in which it was reached."""
    for each in sums:
        if placement.converter is None and each.rows.dim() == 1:
            found = [(placement.sources[0], each.rows, each.columns)]
        elif placement.converter is not None and placement.stack is not None:
            found = [
                (source, part, columns * (part.sum() / rows.sum().clamp(min=_LEAST)))
                for sources, rows, columns in zip(placement.stack, each.rows, each.columns, strict=True)
                for source, part in zip(sources, rows.chunk(len(sources)), strict=True)
            ]
        else:
            mean = each.rows.sum().view(1) / (each.rows.numel() * each.columns.shape[-1])
            found = [(source, mean, mean) for source in placement.sources]
        for source, rows, columns in found:
            if rows.sum() > 0:
                yield source, Curvature(rows, columns / rows.sum())
