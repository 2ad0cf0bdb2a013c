"""What a GGUF file of a checkpoint holds: the name and shape of each tensor, and how it follows from the weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .checkpoint import AnyCheckpoint
from .gguf_archs import Arch, arch_of_model
from .gguf_names import Link, interleaved, links, meta_model
from .gguf_rope import factor_tensors


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: what `pieces` computes from the weights it is linked to, or `value`."""

    name: str
    # As torch orders it: [out, in], [experts, out, in] or a vector.
    shape: tuple[int, ...]
    link: Link | None = None
    # float32: what follows from the config alone.
    value: Tensor | None = None


def plan(source: AnyCheckpoint) -> tuple[Arch, list[Planned]]:
    """Architecture and tensors, in the model's order. UserError for a model that GGUF has no architecture for."""
    config = source.pretrained_config()
    arch = arch_of_model(config.model_type, str(source.config_file))
    found = [Planned(name, tuple(value.shape), value=value) for name, value in factor_tensors(config).items()]
    for link in links(meta_model(config), arch):
        found.append(Planned(link.tensor, _shape(link), link))
    return arch, found


def _shape(link: Link) -> tuple[int, ...]:
    shape = link.shape
    if link.part:
        shape = (*shape[:-1], shape[-1] // 2)
    if link.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    stacked = (len(link.weights), *shape) if len(link.weights) > 1 else shape
    # As llama.cpp has the one row of a shared expert's gate: a vector.
    return tuple(n for n in stacked if n != 1) or (1,)


def pieces(planned: Planned, source: AnyCheckpoint) -> Iterator[Tensor]:
    """The tensor in float32, its weights one after the other (of a stack one expert at a time): each [.., in], rows in
    the order of the file.
    """
    if planned.link is None:
        assert planned.value is not None
        yield planned.value
        return
    for weight in planned.link.weights:
        yield piece_of(planned.link, weight, source)


def piece_of(link: Link, weight: str, source: AnyCheckpoint) -> Tensor:
    """One weight of a tensor in float32, as the file has it."""
    return transformed(link, source.dense(weight, (link.shape[0], math.prod(link.shape[1:]))))


def transformed(link: Link, weight: Tensor) -> Tensor:
    """A weight of the checkpoint, [.., in], as the file has it, in float32: what llama.cpp's converter does."""
    found = weight.float()
    if link.part:
        found = found[..., int(link.part == "odd") :: 2]
    if link.transposed:
        found = found.transpose(-1, -2)
    if link.heads:
        found = found[interleaved(found.shape[0], link.heads)]
    if link.offset:
        found = found + link.offset
    return found


def permuted(link: Link, rows: Tensor) -> Tensor:
    """uint8 [out, bytes of a row] of a weight quantized in the checkpoint's order -> in the order of the file."""
    return rows[interleaved(rows.shape[0], link.heads)] if link.heads else rows
