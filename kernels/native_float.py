"""Products in float32 by the native library: weights are decoded a panel at a time, activations are not rounded.

Takes what native.py does not (cpp/floats.h says how each is decoded):

    affine                      groups of a multiple of 8 inputs; all of them under BITSMITH_ACT=bf16 without AVX-512
    minifloat, codebook         values of up to 8 bits, in groups of a multiple of 8 or without AVX-512; rowtable
    codebook of vectors         v1 to v8, any number of books, entries looked up in the dtype of their table
    trellis                     states computed, not looked up

Weights are the exact ones (`QTensor.dequantize`), only the order of float32 sums differs from a plain product. The packed
copy is the only one, as large as the QTensor; `qtensor()` gives that back bit for bit. Results in results/LOG.md.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import native
from .families import family
from .native import DTYPES, Weight
from .pieces import straighten
from .qtensor import QTensor, matrix_shape
from .spec import ROW_TABLE, STATE_VALUES, Spec

_AFFINE, _TABLE, _E4M3, _E5M2, _ROW_TABLE, _TRELLIS, _VECTORS = range(7)
_FP8 = {"e4m3": _E4M3, "e5m2": _E5M2}
# Inputs that a decoder makes with one scale an output.
_OCTET = 8


class _Source(ctypes.Structure):
    """`Source` of cpp/floats.h."""

    _fields_ = (
        ("w", Weight),
        ("table", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("form", "table_kind", "vec", "books")),
    )


@dataclass(frozen=True)
class FloatLinear:
    """x -> x @ W.T of a weight in the layout of cpp/floats.h. Made by `pack`."""

    # Of the tensor it was made from; shapes holds those of its parts, in their order.
    spec: Spec
    shape: tuple[int, int]
    shapes: Mapping[str, torch.Size]
    extra: Mapping[str, Tensor]
    # codes in cpp/floats.h's layout; scales and zeros [blocks, groups, 16], others as they were.
    parts: Mapping[str, Tensor]
    _source: _Source = field(repr=False)
    # Derived, small: kept alive for `_source`.
    _values: Tensor | None = field(default=None, repr=False)
    name = "native"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def __call__(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """x [M, K] contiguous, float32, bfloat16 or float16, columns in packed order -> [M, N] in x's dtype.

        plain: without this machine's vector instructions, for tests.
        """
        y = torch.empty(x.shape[0], self.shape[0], dtype=x.dtype)
        dtype = DTYPES[x.dtype]
        lib = native.library()
        assert lib is not None
        lib.bitsmith_floats(
            ctypes.byref(self._source), x.data_ptr(), dtype, x.shape[0], y.data_ptr(), dtype,
            torch.get_num_threads(), plain,
        )  # fmt: skip
        return y

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        found = native.scales_as_given(self.parts, self._source.w)
        if self._source.form == _TRELLIS:
            found["codes"] = found["codes"].transpose(-1, -2)
        elif self._source.form != _VECTORS:
            found["codes"] = native.unpack_codes(found["codes"], *self.shape, self.spec.bits)
        parts = {name: found[name].reshape(shape).contiguous() for name, shape in self.shapes.items()}
        return QTensor(self.spec, self.shape, parts, self.extra)


def supports(q: QTensor) -> bool:
    """Whether `pack` can take `q` on this machine."""
    plain = straighten(q).spec
    group = q.shape[1] if plain.group == -1 else plain.group
    if (
        native.library() is None
        or plain.view
        or (group % _OCTET and group < q.shape[1])
        or (plain.rows > 1 and plain.rows % native.ROWS)
    ):
        return False
    # torch looks up one value a code faster than the plain loops of a processor without AVX2 do.
    return _form(plain) in (_TRELLIS, _VECTORS, _ROW_TABLE) or native.best_path() != "generic"


def pack(q: QTensor) -> FloatLinear:
    """`q` in the library's layout; `supports(q)` must be true."""
    plain = straighten(q)
    form = _form(plain.spec)
    source = _Source(form=form, vec=plain.spec.vec, books=plain.spec.books)
    values = None
    if form == _TRELLIS:
        parts = _trellis(plain, source)
    elif form == _VECTORS:
        parts = _vectors(plain, source)
    else:
        parts, source.w = native.blocked(plain)
        values = _scalar_values(plain, parts, source)
    if "perm" in q.parts:
        parts["perm"] = q.parts["perm"]
    shapes = {name: t.shape for name, t in q.parts.items()}
    return FloatLinear(q.spec, q.shape, shapes, q.extra, parts, source, values)


def _form(spec: Spec) -> int:
    if spec.family == "trellis":
        return _TRELLIS
    if spec.family == "affine":
        return _AFFINE
    if spec.table == ROW_TABLE:
        return _ROW_TABLE
    if spec.vec > 1 or spec.bits > 8:
        return _VECTORS
    return _FP8.get(spec.table, _TABLE)


def _trellis(plain: QTensor, source: _Source) -> dict[str, Tensor]:
    """Tiles of [8 pairs of outputs][bits] words -> [bits][8 pairs]."""
    codes, bits = plain.parts["codes"], plain.spec.bits
    tiles = native.on_large_pages(codes.unflatten(-1, (8, bits)).transpose(-1, -2))
    n, k = plain.shape
    assert matrix_shape(plain.spec, plain.shape) == (16 * tiles.shape[0], 16 * tiles.shape[1])
    source.w = Weight(n=n, k=k, group=k, scale_rows=1, bits=bits, codes=tiles.data_ptr())
    source.table_kind = STATE_VALUES.index(plain.spec.table)
    return {"codes": tiles}


def _vectors(plain: QTensor, source: _Source) -> dict[str, Tensor]:
    n, k = plain.shape
    parts = {name: t.contiguous() for name, t in plain.parts.items() if name not in ("perm", "codes")}
    parts["codes"] = native.on_large_pages(plain.parts["codes"])
    source.w = Weight(n=n, k=k, bits=plain.spec.bits, codes=parts["codes"].data_ptr())
    source.words = parts["codes"].shape[1]
    source.table, source.table_kind = parts["table"].data_ptr(), DTYPES[parts["table"].dtype]
    native.add_scales(source.w, parts, plain.spec)
    return parts


def _scalar_values(plain: QTensor, parts: Mapping[str, Tensor], source: _Source) -> Tensor | None:
    """Sets how codes become values; the table for it where it is not the tensor's own."""
    spec = plain.spec
    source.w.zero = family(spec).fixed_zero(spec) or 0.0
    if source.form == _AFFINE:
        return None
    if source.form == _ROW_TABLE:
        source.table, source.table_kind = parts["table"].data_ptr(), DTYPES[parts["table"].dtype]
        return None
    if source.form == _E4M3 and _has_nan(plain.parts["codes"]):
        source.form = _TABLE
    values = torch.zeros(256)
    codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
    values[: codes.numel()] = family(spec).value(spec, codes[None], plain.parts)[0]
    source.table = values.data_ptr()
    return values


def _has_nan(codes: Tensor) -> bool:
    """Whether E4M3 codes int32 [N, words] hold the only number that float16 cannot stand for."""
    return bool((codes.contiguous().view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())
