"""What is wrong with the numbers of a checkpoint, whatever its format: NaN and infinities, scales out of all
proportion, blocks of zeros in bulk, codes without a meaning. What a quantizer that went wrong, or a file that was cut
or overwritten, leaves behind, and what otherwise shows as nonsense while serving.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.families import family
from ..kernels.qtensor import QTensor, codes_of, matrix_shape
from .checkpoint import open_checkpoint
from .inspect import weights
from .load import build

# A scale this many times the tensor's median belongs to no trained weight. Super scales of twelve GGUF file types of a
# model of 8 million weights stay within 6, the single largest weights of 7B models within some hundred; random bytes
# read as float16 give 10**4 at once.
_ABSURD = 1000
# Fewer scales have no median worth the name.
_FEW = 16
# Share of blocks that may be zeros: unused tokens and channels are that in sound checkpoints (measured: 0.0002).
_BULK = 0.1
# Parts that hold numbers in a byte: spec.scale -> the bytes that are NaN.
_NAN_BYTES = {"e8m0": (0xFF,), "ue4m3": (0x7F, 0xFF)}
# Parts whose sizes are compared with each other, the outermost level only.
_LEVELS = (("super_scales", "scales"), ("super_mins",))


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one weight."""

    tensor: str
    # Its spec, or dtype and shape.
    stored: str
    problem: str
    # How many of how many entries; 0 of 0 where it could not be read at all.
    count: int = 0
    total: int = 0
    # Index of the first of them in the part (row and column of the weight where the weight itself is meant).
    first: tuple[int, ...] = ()


def validate_checkpoint(path: str | Path) -> tuple[int, list[Finding]]:
    """(weights looked at, what is wrong with them), in the order of the checkpoint, one weight in memory at a time.

    A weight that cannot be read is a finding with the reader's message; UserError only for what concerns the whole
    checkpoint.
    """
    ckpt = open_checkpoint(path)
    model = build(ckpt, torch.float16)
    found: list[Finding] = []
    count = 0
    for name, shape in weights(model, ckpt):
        count += 1
        try:
            weight = ckpt(name) if shape is None else ckpt.qtensor(name, shape)
        except UserError as error:
            found.append(Finding(name, "unreadable", str(error)))
            continue
        found += validate_weight(name, weight)
    return count, found


def validate_weight(name: str, weight: QTensor | Tensor) -> list[Finding]:
    """What is wrong with one weight."""
    if isinstance(weight, QTensor):
        stored, problems = str(weight.spec), _quantized(weight)
    else:
        stored = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        problems = _dense(weight)
    return [
        Finding(name, stored, problem, int(bad.sum()), bad.numel(), tuple(bad.nonzero()[0].tolist()))
        for problem, bad in problems
        if bad.any()
    ]


def _dense(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not weight.dtype.is_floating_point:
        return
    yield "NaN or inf", ~weight.float().isfinite()
    if weight.dim() > 1:
        yield from _zeros(weight.flatten(0, -2).float(), weight.shape[-1], "rows of zeros")


def _quantized(q: QTensor) -> Iterator[tuple[str, Tensor]]:
    spec = q.spec
    sound = True
    for name, part in q.parts.items():
        bad = _bad_numbers(q, name, part)
        sound = sound and not bad.any()
        yield f"{name}: NaN or inf", bad
    for candidates in _LEVELS:
        level = next((n for n in candidates if n in q.parts and q.parts[n].dtype.is_floating_point), None)
        if level is not None:
            yield f"{level}: over {_ABSURD} times the median", _absurd(q.parts[level])
    if spec.zero == "one":
        yield "codes: 3, where 0, 1 and 2 are -1, 0 and 1", codes_of(q) > 2
    matrix = family(spec).decode(spec, q.parts, matrix_shape(spec, q.shape))
    if sound:
        # With sound parts it is a code that has no value (FP8), or a product beyond float32.
        yield "weights: NaN or inf", ~matrix.isfinite()
    block = matrix.shape[1] if spec.group == -1 else spec.group * (spec.two_level[1] if spec.two_level else 1)
    yield from _zeros(matrix, block, "blocks of zeros")


def _bad_numbers(q: QTensor, name: str, part: Tensor) -> Tensor:
    if part.dtype.is_floating_point:
        return ~part.float().isfinite()
    if name in ("scales", "mins") and q.spec.scale in _NAN_BYTES:
        return torch.isin(part, torch.tensor(_NAN_BYTES[q.spec.scale], dtype=part.dtype, device=part.device))
    return torch.zeros(0, dtype=torch.bool)


def _absurd(scales: Tensor) -> Tensor:
    size = scales.float().abs().nan_to_num(posinf=0)
    present = size[size > 0]
    if present.numel() < _FEW:
        return torch.zeros(0, dtype=torch.bool)
    return size > _ABSURD * present.median()


def _zeros(matrix: Tensor, block: int, what: str) -> Iterator[tuple[str, Tensor]]:
    """All-zero runs of `block` columns (whole rows where they do not divide), where there are more than a few."""
    width = block if matrix.shape[1] % block == 0 else matrix.shape[1]
    empty = ~matrix.reshape(matrix.shape[0], -1, width).any(-1)
    if empty.sum() > _BULK * empty.numel():
        yield what, empty
