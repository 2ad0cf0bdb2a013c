"""No codec: keys and values as the model computes them, in its dtype."""

import torch
from torch import Tensor

from ..kernels.attention import Parts
from .base import KVCodec


def codec(dtype: torch.dtype) -> KVCodec:
    """One part `[slots, heads, dim]` of `dtype`."""

    def alloc(slots: int, heads: int, dim: int, device: torch.device) -> Parts:
        return (torch.empty(slots, heads, dim, dtype=dtype, device=device),)

    def encode(x: Tensor) -> Parts:
        return (x,)

    def decode(parts: Parts) -> Tensor:
        return parts[0]

    return KVCodec("none", dtype, lambda heads, dim: heads * dim * dtype.itemsize, alloc, encode, decode)
