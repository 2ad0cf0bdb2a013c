"""Float products by the native library: weights are decoded a panel at a time, activations are not rounded.

Takes what native.py does not (cpp/floats.h says how each is decoded):

    affine                      groups of a multiple of 8 inputs; all of them under BITSMITH_ACT=bf16 without AVX-512
    minifloat, codebook         values of up to 8 bits, in groups of a multiple of 8 or without AVX-512; rowtable
    codebook of vectors         v1 to v8, any number of books, entries looked up in the dtype of their table; v8 at up
                                to 8 rows of float32 without panels (cpp/dots.h)
    trellis                     states computed, not looked up

Weights are the exact ones (`QTensor.dequantize`), only the order of float32 sums differs from a plain product; but with
AVX-512, more than one row of bfloat16 activations (any number for a trellis) meets them rounded to bfloat16, as in the
reference (cpp/floats512.h: vdpbf16ps multiplies twice as many numbers as float32 vectors do). The packed copy is the
only one, as large as the QTensor; `qtensor()` gives that back bit for bit. Results in results/LOG.md.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import blocks, native, ops
from .families import family
from .native import DTYPES, Weight
from .pieces import straighten
from .qtensor import QTensor
from .spec import GRIDS, ROW_TABLE, STATE_VALUES, Spec

_AFFINE, _TABLE, _E4M3, _E5M2, _ROW_TABLE, _TRELLIS, _VECTORS = range(7)
_FP8 = {"e4m3": _E4M3, "e5m2": _E5M2}
# Inputs that a decoder makes with one scale an output.
_OCTET = 8


class _Source(Weight):
    """`Source` of cpp/floats.h: its `w`, and what follows."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("factor", ctypes.c_float),
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
    # What `linear` takes.
    _header: Tensor = field(repr=False)
    _tensors: list[Tensor | None] = field(repr=False)
    name = "native"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def __call__(self, x: Tensor, path: str = "") -> Tensor:
        """x [M, K] contiguous, float32, bfloat16 or float16, columns in packed order -> [M, N] in x's dtype.

        path: "generic" (no vector instructions) or "avx2", for tests; the best of this machine if empty.
        """
        if path:
            return _linear(x, self._header, self._tensors, self.shape[0], native.PATHS.index(path))
        y: Tensor = linear(x, self._header, self._tensors, self.shape[0])
        return y

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        found = native.scales_as_given(self.parts, self._source.scale_rows, self.shape[0])
        if self._source.form == _TRELLIS:
            found["codes"] = found["codes"].transpose(-1, -2)
        elif self._source.form != _VECTORS:
            found["codes"] = native.unpack_codes(found["codes"], *self.shape, self.spec.bits)
        parts = {name: found[name].reshape(shape).contiguous() for name, shape in self.shapes.items()}
        return QTensor(self.spec, self.shape, parts, self.extra)


def _linear(x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], n: int, path: int = -1) -> Tensor:
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    _linear_call(y, x, header, tensors, path)()
    return y


def _linear_call(y: Tensor, x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], path: int = -1) -> ops.Call:
    lib = native.library()
    assert lib is not None
    source = native.structure(_Source, header, tensors)
    return native.product_call(lib.bitsmith_floats, source, y, x, path)


# x [M, K] contiguous, columns in packed order; header and tensors from `native.operands` -> [M, n] in x's dtype.
linear = ops.define(
    "native_float_linear(Tensor x, Tensor header, Tensor?[] tensors, int n) -> Tensor",
    _linear,
    native.linear_fake,
    lambda results, x, header, tensors, n: _linear_call(results[0], x, header, tensors),
)


def supports(q: QTensor) -> bool:
    """Whether `pack` can take `q` on this machine."""
    plain = straighten(q).spec
    group = q.shape[1] if plain.group == -1 else plain.group
    if (
        native.library() is None
        or plain.view
        or plain.table in GRIDS
        or (group % _OCTET and group < q.shape[1])
        or (plain.rows > 1 and plain.rows % native.ROWS)
        or (plain.two_level and (plain.scale_code != (8, 0) or plain.zero == "min"))
        or (plain.rows != 1 and plain.zero == "min")
    ):
        return False
    # torch looks up one value a code faster than the plain loops of a processor without AVX2 do.
    return _form(plain) in (_TRELLIS, _VECTORS, _ROW_TABLE) or native.best_path() != "generic"


def pack(q: QTensor) -> FloatLinear:
    """`q` in the library's layout; `supports(q)` must be true."""
    plain = straighten(q)
    form = _form(plain.spec)
    derived = []
    if form == _TRELLIS:
        parts, source = _trellis(plain)
    elif form == _VECTORS:
        parts, source = _vectors(plain)
    else:
        parts, source = native.blocked(plain, _Source)
        form, values = _scalar_values(form, plain, source)
        derived = [values]
    if "table" in parts and form in (_VECTORS, _ROW_TABLE):
        source.table, source.table_kind = parts["table"].data_ptr(), DTYPES[parts["table"].dtype]
    source.form, source.vec, source.books = form, plain.spec.vec, plain.spec.books
    source.factor = float(q.parts.get("global_scale", 1.0))
    if "perm" in q.parts:
        parts["perm"] = q.parts["perm"]
    operands = native.operands(source, [*parts.values(), *derived])
    return FloatLinear(q.spec, q.shape, blocks.shapes(q.parts), q.extra, parts, source, *operands)


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


def _trellis(plain: QTensor) -> tuple[dict[str, Tensor], _Source]:
    """Tiles of [8 pairs of outputs][bits] words -> [bits][8 pairs]."""
    codes, bits = plain.parts["codes"], plain.spec.bits
    tiles = native.on_large_pages(codes.unflatten(-1, (8, bits)).transpose(-1, -2))
    n, k = plain.shape
    kind = STATE_VALUES.index(plain.spec.table)
    return {"codes": tiles}, _Source(
        n=n, k=k, group=k, scale_rows=1, bits=bits, table_kind=kind, codes=tiles.data_ptr()
    )


def _vectors(plain: QTensor) -> tuple[dict[str, Tensor], _Source]:
    n, k = plain.shape
    parts = native.beside_codes(plain.parts, plain.spec, n)
    parts["codes"] = native.on_large_pages(plain.parts["codes"])
    source = _Source(n=n, k=k, bits=plain.spec.bits, codes=parts["codes"].data_ptr(), words=parts["codes"].shape[1])
    native.add_scales(source, parts, plain.spec)
    return parts, source


def _scalar_values(form: int, plain: QTensor, source: _Source) -> tuple[int, Tensor]:
    """How codes become values, and the table for it (not in use where the tensor has its own for each row)."""
    spec = plain.spec
    source.zero = family(spec).fixed_zero(spec) or 0.0
    values = torch.zeros(256)
    if form in (_TABLE, _E4M3, _E5M2):
        codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
        values[: codes.numel()] = family(spec).value(spec, codes[None], plain.parts)[0]
        source.table = values.data_ptr()
    return _TABLE if form == _E4M3 and _has_nan(plain.parts["codes"]) else form, values


def _has_nan(codes: Tensor) -> bool:
    """Whether E4M3 codes int32 [N, words] hold the only number that float16 cannot stand for."""
    return bool((codes.contiguous().view(torch.uint8).bitwise_and(0x7F) == 0x7F).any())
