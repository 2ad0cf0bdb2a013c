"""Rows of a weight looked up by number, as an embedding does, decoded where they are: only the rows asked for.

A product that holds the weight in its own order gives rows too where it can, so that embeddings and the output head
that is tied to them are held once.
"""

from typing import TypeGuard

import torch
from torch import Tensor

from .cpu import LookUp
from .dispatch import Matmul, Reference, Shaped
from .int8_copy import WithCopy
from .native import ROWS, NativeLinear
from .native_grids import GridLinear
from .native_two_level import TwoLevelLinear
from .qtensor import QTensor, independent_rows, take
from .spec import Spec

_Held = Reference | LookUp | GridLinear
Source = _Held | NativeLinear | TwoLevelLinear


def source(matmul: Matmul) -> Source | None:
    """What `look_up` reads rows from, or None where this product gives none."""
    held = matmul.core if isinstance(matmul, Shaped) and not matmul.stepped else matmul
    held = held.core if isinstance(held, WithCopy) else held
    return held if _gives_rows(held) else None


def _gives_rows(held: object) -> TypeGuard[Source]:
    if isinstance(held, _Held):
        return independent_rows(held.q)
    return isinstance(held, TwoLevelLinear) or (isinstance(held, NativeLinear) and held.takes())


def spec_of(held: Source) -> Spec:
    return held.q.spec if isinstance(held, _Held) else held.spec


def look_up(held: Source, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` int64 of any shape -> [*ids.shape, K]: those of `dequantize(dtype)`, bit for bit.

    Nothing is read back to the host.
    """
    flat = ids.reshape(-1)
    q = take(held.q, flat) if isinstance(held, _Held) else _from_blocks(held, flat)
    return q.dequantize(dtype).view(*ids.shape, q.shape[1])


def _from_blocks(held: NativeLinear | TwoLevelLinear, rows: Tensor) -> QTensor:
    """Those products keep 16 rows side by side: whole blocks are unpacked, and one row of each is kept."""
    wide = held.blocks(rows // ROWS)
    return take(wide, torch.arange(rows.shape[0]) * ROWS + rows % ROWS)
