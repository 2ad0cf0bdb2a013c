"""Activations as the native library's integer products round them."""

import os

import torch
from torch import Tensor

from ..errors import UserError


def rounded_activations(x: Tensor, group: int) -> Tensor:
    """The torch twin of what int8 products do to x [M, K]: float32, each chunk of a row rounded to 255 steps.

    A chunk is the largest of 128, 64 and 32 inputs that divides the weight's group, 256 where a whole row is one.
    """
    if group >= x.shape[1]:
        return rounded_chunks(x, 256)
    return rounded_chunks(x, 128 if group % 128 == 0 else 64 if group % 64 == 0 else 32)


def rounded_chunks(x: Tensor, chunk: int) -> Tensor:
    """x [M, K] as float32, each `chunk` inputs of a row rounded to 255 steps."""
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))
    step = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return (codes * step).flatten(1)[:, : x.shape[1]]


def int8_activations() -> bool:
    """Whether weights may meet int8 activations. UserError for an unknown BITSMITH_ACT."""
    found = os.environ.get("BITSMITH_ACT", "int8")
    if found not in ("int8", "bf16"):
        raise UserError(f"BITSMITH_ACT is {found!r}; accepted: int8 (the default) or bf16")
    return found == "int8"
