"""Products of the native library for codes that are indices and signs of a named grid (kernels/grids.py; GGUF's IQ1,
IQ2 and IQ3 types), with int8 activations as native_two_level.py has them: cpp/grids.h, grids256.h (AVX2), grids512.h
(AVX-512).

The QTensor is read as it is: nothing is packed, and nothing is kept beside it but the grid.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from . import grids, native, ops
from .native_two_level import SUPER
from .qtensor import QTensor
from .spec import GRIDS

# (table, group, bits of a scale's code): the forms of cpp/grids.h.
_FORMS = {
    ("iq1s", 32, 4),
    ("iq1m", 16, 3),
    ("iq2xxs", 32, 4),
    ("iq2xs", 16, 4),
    ("iq2s", 16, 4),
    ("iq3xxs", 32, 4),
    ("iq3s", 32, 4),
}


class _Weight(ctypes.Structure):
    """`grids::Weight` of cpp/grids.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "supers", "vectors", "signs", "places", "levels")),
        *((name, ctypes.c_int64) for name in ("n", "k", "words", "scale_words")),
        ("unit", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("width", "group")),
    )


@dataclass(frozen=True)
class GridLinear:
    """x -> x @ W.T. Made by `pack`."""

    name = "native-a8"
    q: QTensor
    # What `linear` takes.
    _header: Tensor = field(repr=False)
    _tensors: list[Tensor | None] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    def __call__(self, x: Tensor, path: str = "") -> Tensor:
        """x [M, K] contiguous, float32, bfloat16 or float16 -> [M, N] in x's dtype.

        path: "generic" for the plain loops that define the result, for tests.
        """
        if path:
            return _linear(x, self._header, self._tensors, self.q.shape[0], native.PATHS.index(path))
        y: Tensor = linear(x, self._header, self._tensors, self.q.shape[0])
        return y

    def qtensor(self) -> QTensor:
        return self.q


def supports(q: QTensor) -> bool:
    """Whether `pack` can take `q` on this machine (which must have AVX2) and int8 activations are allowed."""
    spec = q.spec
    level = spec.two_level
    if spec.table not in GRIDS or level is None or spec.rows != 1 or spec.view or q.shape[1] % SUPER:
        return False
    whole = (
        level[0] == "f16" and spec.group * level[1] == SUPER and (spec.table, spec.group, spec.scale_code[0]) in _FORMS
    )
    return whole and native.best_path() in ("avx2", "avx512", "amx") and native.int8_activations()


def pack(q: QTensor) -> GridLinear:
    """The product of `q`; `supports(q)` must be true."""
    spec, table = q.spec, GRIDS[q.spec.table]
    parts = {name: part.contiguous() for name, part in q.parts.items()}
    vectors, signs, step = _tables(spec.table)
    places, levels = _levels(spec.table, step)
    weight = _Weight(
        n=q.shape[0], k=q.shape[1], words=parts["codes"].shape[1], scale_words=parts["scales"].shape[1],
        unit=table.factor / 2 * step, width=spec.width, group=spec.group,
        codes=parts["codes"].data_ptr(), scales=parts["scales"].data_ptr(), supers=parts["super_scales"].data_ptr(),
        vectors=vectors.data_ptr(), signs=None if signs is None else signs.data_ptr(),
        places=places.data_ptr(), levels=levels.data_ptr(),
    )  # fmt: skip
    held = [*parts.values(), vectors, places, levels, *([] if signs is None else [signs])]
    return GridLinear(QTensor(spec, q.shape, parts, q.extra), *native.operands(weight, held))


@cache
def _tables(name: str) -> tuple[Tensor, Tensor | None, float]:
    """(int8 [2**bits, 8 or 4] numbers by index, uint8 [2**signs, 8] of 0 and 255 or None, the unit of the numbers).

    Where there is a shift bit, of the code or of the group, it is part of the index here: numbers are then eighths.
    """
    table = GRIDS[name]
    if table.signs:
        negative = grids.signs(table.signs) < 0
        return grids.vectors(name).to(torch.int8), negative.to(torch.uint8) * 255, 1.0
    plain = grids.vectors(name)
    numbers = torch.cat([plain + grids.SHIFT, plain - grids.SHIFT])
    return (numbers / grids.SHIFT).to(torch.int8), None, grids.SHIFT


@cache
def _levels(name: str, step: float) -> tuple[Tensor, Tensor]:
    """(uint8 [2, 2**bits] by half of a vector and index: the places of its 4 or 2 numbers, two or three bits each,
    uint8 [64] by place modulo 4 or 8: the number plus 128), without shifts."""
    vectors = grids.vectors(name)
    levels, bits = vectors.unique(), 2 if vectors.shape[1] == 8 else 3
    halves = torch.searchsorted(levels, vectors).unflatten(1, (2, -1))
    places = (halves << torch.arange(halves.shape[2]) * bits).sum(2).T.contiguous()
    number = levels[(torch.arange(64) % (1 << bits)).clamp(max=levels.shape[0] - 1)]
    return places.to(torch.uint8), (number / step + 128).to(torch.uint8)


def _linear(x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], n: int, path: int = -1) -> Tensor:
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    _linear_call(y, x, header, tensors, path)()
    return y


def _linear_call(y: Tensor, x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], path: int = -1) -> ops.Call:
    lib = native.library()
    assert lib is not None
    return native.product_call(lib.bitsmith_grids_linear, native.structure(_Weight, header, tensors), y, x, path)


# x [M, K] contiguous; header and tensors from `native.operands` -> [M, n] in x's dtype.
linear = ops.define(
    "native_grids(Tensor x, Tensor header, Tensor?[] tensors, int n) -> Tensor",
    _linear,
    native.linear_fake,
    lambda results, x, header, tensors, n: _linear_call(results[0], x, header, tensors),
)
