# mypy: allow-untyped-defs
"""No codec: keys and values as the model computes them, in its dtype."""

import torch
from torch import Tensor

from ..kernels.attention import Parts
from ..kernels.kv_device import KVDevice, load_tile, store_tile
from ..kernels.lang import jit, tl
from ..kernels.pages import large_pages
from .base import KVCodec


def codec(dtype: torch.dtype) -> KVCodec:
    """One part `[slots, heads, dim]` of `dtype`."""

    def alloc(slots: int, heads: int, dim: int, device: torch.device) -> Parts:
        return (large_pages((slots, heads, dim), dtype, device),)

    def encode(x: Tensor) -> Parts:
        return (x,)

    def decode(parts: Parts) -> Tensor:
        return parts[0]

    return KVCodec("none", dtype, lambda heads, dim: heads * dim * dtype.itemsize, alloc, encode, decode, __name__)


@jit
def _device_decode(parts, at, inside, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    return load_tile(parts[0], at, inside, START, WIDTH, DIM)


@jit
def _device_encode(x, parts, at, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    store_tile(parts[0], x, at, inside, DIM, WIDTH)


DEVICE = KVDevice(_device_decode, _device_encode)
