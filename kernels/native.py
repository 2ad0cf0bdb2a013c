"""The native CPU library: every family whose value depends on the code alone, at memory speed for few rows and on the
matrix units for many.

`kernels/cpp/` is one C++ translation unit, compiled by the package's build where there is a compiler and absent
otherwise (`library()` is None; kernels/cpu.py then uses what torch has). It was chosen over torch's own low-bit
operators by measurement (results/LOG.md).

    affine                 activations rounded to int8, with a step of their own for at most 128 inputs of a row
                           (llama.cpp: 32), 256 where the weights of an output have one scale; integer dot products
                           are exact
    minifloat, codebook    activations in bfloat16, values rounded to bfloat16 (FP8 and FP4 are exact), float32 sums;
                           NVFP4 and MXFP4 see native_two_level.py

From some dozens of rows on AMX decodes weights once and scales them in bfloat16, and activations stay in bfloat16 for
all. Where they stay so anyway AVX-512 decodes once from nine rows on, and scales meet the sums (fractional zero points
the values, which are rounded once more then; cpp/pairs512.h).
`BITSMITH_ACT=bf16` keeps them there for affine weights at any number of rows. What int8 activations cost in KL
divergence is in results/LOG.md. The packed copy is the only one (but where int8_copy.py was asked for another);
`qtensor()` gives back the tensor it was made from, bit for bit.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from . import bits, blocks, ops
from .blocks import BLOCK, ROWS
from .families import family
from .library import library as library
from .native_inputs import int8_activations as int8_activations
from .native_inputs import rounded_activations as rounded_activations
from .pages import large_pages as large_pages
from .pages import on_large_pages as on_large_pages
from .pieces import straighten
from .qtensor import QTensor
from .spec import ROW_TABLE, Spec
from .stacked import pieces

PATHS = ("generic", "avx2", "avx512", "amx", "folded", "neon", "neon-dotprod")
_INT8, _BFLOAT = 0, 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
# What bytes of scales are, by their storage's name.
BYTES = {"e8m0": 4, "ue4m3": 5}
# Table look-up of 8-bit codes takes bit 7 as the sign.
_MAGNITUDES = 128
_BY_GROUP = {"scales", "zeros", "mins"}
_Structure = TypeVar("_Structure", bound=ctypes.Structure)
_Scaled = TypeVar("_Scaled", bound="Weight")


class Weight(ctypes.Structure):
    """`Weight` of cpp/common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "supers", "scale_table", "values")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "scale_rows", "per_super")),
        *((name, ctypes.c_float) for name in ("zero", "scale_offset")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "scale_dtype", "zero_dtype", "super_dtype", "mins")),
    )


@cache
def addresses(kind: type[ctypes.Structure]) -> tuple[str, ...]:
    """The pointers of a structure, in its order, those of what it extends first."""
    fields = (field for base in reversed(kind.__mro__) for field in vars(base).get("_fields_", ()))
    return tuple(name for name, what, *_ in fields if what is ctypes.c_void_p)


def best_path() -> str:
    """The widest instructions this processor has: one of PATHS, or "" without the library."""
    lib = library()
    return PATHS[lib.bitsmith_path()] if lib else ""


@dataclass(frozen=True)
class NativeLinear:
    """x -> x @ W.T of a weight in the library's layout. Made by `pack`."""

    # Of the tensor it was made from; shapes holds those of its parts, in their order.
    spec: Spec
    shape: tuple[int, int]
    shapes: Mapping[str, torch.Size]
    extra: Mapping[str, Tensor]
    # uint8, cpp/common.h; scales, zeros and mins [blocks, groups, 16], others as they were.
    parts: Mapping[str, Tensor]
    _weight: Weight = field(repr=False)
    # Derived, small: kept alive for `_weight`.
    _values: Tensor | None = field(default=None, repr=False)
    # What `linear` takes.
    _header: Tensor = field(init=False, repr=False)
    _tensors: list[Tensor | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        held = [*self.parts.values(), *([] if self._values is None else [self._values])]
        header, tensors = operands(self._weight, held)
        object.__setattr__(self, "_header", header)
        object.__setattr__(self, "_tensors", tensors)

    @property
    def name(self) -> str:
        return "native-a8" if self._weight.kind == _INT8 else "native"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def __call__(self, x: Tensor, path: str = "") -> Tensor:
        """x [M, K] contiguous, float32, bfloat16 or float16, columns in packed order -> [M, N] in x's dtype.

        path: one of PATHS, for tests and measurements; the best of this machine if empty.
        """
        if path:
            return _linear(x, self._header, self._tensors, self.shape[0], PATHS.index(path))
        y: Tensor = linear(x, self._header, self._tensors, self.shape[0])
        return y

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        found = self._restored(self.parts, self.shape[0])
        parts = {name: found[name].reshape(shape).contiguous() for name, shape in self.shapes.items()}
        return QTensor(self.spec, self.shape, parts, self.extra)

    def takes(self) -> bool:
        """Whether `blocks` works: every scale is of one output row, and of one level."""
        return self._weight.scale_rows == 1 and self.spec.two_level is None and not self.spec.view

    def blocks(self, which: Tensor) -> QTensor:
        """The rows of blocks `which` int64 [T] of 16 output rows each: 16 * T rows, those beyond N zero."""
        count = -(-self.shape[0] // ROWS)
        by_rows = ({"codes"} | _BY_GROUP) & self.parts.keys()
        parts = {**self.parts, **{name: select_blocks(self.parts[name], count, which) for name in by_rows}}
        n = which.shape[0] * ROWS
        return QTensor(self.spec, (n, self.shape[1]), self._restored(parts, n))

    def _restored(self, packed: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        found = scales_as_given(packed, self._weight.scale_rows, n)
        found["codes"] = unpack_codes(found["codes"], n, self.shape[1], self.spec.bits)
        return found


def operands(weight: ctypes.Structure, tensors: Iterable[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """What an operator takes for `weight`: its bytes, and for each address in it that of `tensors` which lies there."""
    at = {t.data_ptr(): t for t in tensors}
    found = [None if getattr(weight, name) is None else at[getattr(weight, name)] for name in addresses(type(weight))]
    # A None costs a fifth of a microsecond a call.
    while found[-1] is None:
        found.pop()
    return torch.frombuffer(bytearray(weight), dtype=torch.uint8), found


def structure(kind: type[_Structure], header: Tensor, tensors: Sequence[Tensor | None]) -> _Structure:
    """What `operands` took apart, with the addresses of these tensors, not of those that were packed: a traced graph
    may have moved them."""
    weight = kind.from_buffer_copy(kind.from_address(header.data_ptr()))
    for name, tensor in zip(addresses(kind), tensors, strict=False):
        if tensor is not None:
            setattr(weight, name, tensor.data_ptr())
    return weight


def _linear(x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], n: int, path: int = -1) -> Tensor:
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    _linear_call(y, x, header, tensors, path)()
    return y


def _linear_call(y: Tensor, x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], path: int = -1) -> ops.Call:
    lib = library()
    assert lib is not None
    return product_call(lib.bitsmith_linear, structure(Weight, header, tensors), y, x, path)


def product_call(
    function: Callable[..., object], weight: ctypes.Structure, y: Tensor, x: Tensor, path: int
) -> ops.Call:
    """A call of one of the library's products y = x @ W.T, of dense tensors."""
    return partial(
        function, ctypes.byref(weight), x.data_ptr(), DTYPES[x.dtype], x.shape[0], y.data_ptr(), DTYPES[y.dtype],
        torch.get_num_threads(), path,
    )  # fmt: skip


def linear_fake(x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


# x [M, K] contiguous, columns in packed order; header and tensors from `operands` -> [M, n] in x's dtype.
linear = ops.define(
    "native_linear(Tensor x, Tensor header, Tensor?[] tensors, int n) -> Tensor",
    _linear,
    linear_fake,
    lambda results, x, header, tensors, n: _linear_call(results[0], x, header, tensors),
)


def supports(q: QTensor) -> bool:
    """Whether `pack` can take `q` on this machine.

    The plain loops of a processor without AVX2 or NEON are ten times slower than torch's operators: they define the
    result and are not used for it.
    """
    if best_path() in ("", "generic"):
        return False
    plain = straighten(q).spec
    group = q.shape[1] if plain.group == -1 else plain.group
    if plain.scale == "ue4m3" or (plain.two_level and (plain.scale_code != (8, 0) or plain.zero == "min")):
        return False
    if (
        plain.view
        or plain.vec > 1
        or plain.bits > 8
        or "global_scale" in q.parts
        or (group % BLOCK and group < q.shape[1])
        or (plain.rows > 1 and plain.rows % ROWS)
    ):
        return False
    if _kind(plain) == _INT8:
        return True
    if best_path() not in ("avx512", "amx") or plain.family not in ("affine", "minifloat", "codebook"):
        return False
    return plain.table != ROW_TABLE and plain.zero != "min" and _table(q) is not None


def pack(q: QTensor) -> NativeLinear:
    """`q` in the library's layout; `supports(q)` must be true."""
    plain = straighten(q)
    parts, weight = blocked(plain, Weight)
    weight.kind = _kind(plain.spec)
    values = None if weight.kind == _INT8 else _table(q)
    if values is None:
        weight.zero = family(plain.spec).fixed_zero(plain.spec) or 0.0
    else:
        weight.values = values.data_ptr()
    if "perm" in q.parts:
        parts["perm"] = q.parts["perm"]
    return NativeLinear(q.spec, q.shape, blocks.shapes(q.parts), q.extra, parts, weight, values)


def blocked(plain: QTensor, structure: type[_Scaled]) -> tuple[dict[str, Tensor], _Scaled]:
    """The parts of `plain` (straightened, one code a weight) in the layout of cpp/common.h, and what says so there; the
    kind, the zero point that is not stored and the values of codes are left open."""
    spec, (n, k) = plain.spec, plain.shape
    if found := blocks.in_place([plain.parts]):
        parts = from_blocks(found[0], plain.shape)
    else:
        parts = beside_codes(plain.parts, spec, n)
        parts["codes"] = pack_codes(row_pieces(plain.parts, "codes"), k, spec.bits)
    weight = structure(n=n, k=k, bits=spec.bits, codes=parts["codes"].data_ptr())
    add_scales(weight, parts, spec)
    return parts, weight


def from_blocks(source: blocks.Blocks, shape: tuple[int, int]) -> dict[str, Tensor]:
    """All parts in the library's layout, straight from where they lie in a file."""
    lib = library()
    assert lib is not None
    return blocks.packed(lib, source, shape)


def beside_codes(parts: Mapping[str, Tensor], spec: Spec, n: int) -> dict[str, Tensor]:
    """All parts but codes and the order of columns; scales, zero points and mins of one row each by blocks of rows."""
    grouped = _BY_GROUP if scale_rows(spec, n) == 1 else set()
    return {
        name: by_block(row_pieces(parts, name)) if name in grouped else parts[name].contiguous()
        for name in parts
        if name not in ("perm", "codes")
    }


def row_pieces(parts: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Pieces of a part, all but the last of whole blocks of rows."""
    found = pieces(parts, name)
    return found if all(t.shape[0] % ROWS == 0 for t in found[:-1]) else [parts[name]]


def add_scales(weight: Weight, parts: Mapping[str, Tensor], spec: Spec) -> None:
    """Scales, zero points and mins of `parts` into `weight`, whose n and k are set."""
    weight.group, weight.scale_rows = weight.k if spec.group == -1 else spec.group, scale_rows(spec, weight.n)
    weight.scales = parts["scales"].data_ptr()
    weight.scale_dtype = number_type(spec, parts["scales"])
    for name in ("zeros", "mins"):
        if name in parts:
            weight.zeros, weight.zero_dtype = parts[name].data_ptr(), number_type(spec, parts[name])
            weight.mins = name == "mins"
    if spec.two_level:
        _second_level(weight, parts, spec)


def number_type(spec: Spec, stored: Tensor) -> int:
    return BYTES.get(spec.scale, DTYPES[torch.uint8]) if stored.dtype is torch.uint8 else DTYPES[stored.dtype]


def scale_rows(spec: Spec, n: int) -> int:
    """Output rows that share a scale, in whole blocks where it is more than one."""
    return spec.rows if spec.rows > 0 else -(-n // ROWS) * ROWS


def pack_codes(streams: Sequence[Tensor], k: int, width: int) -> Tensor:
    """Dense bit streams int32 [n, words] of any strides, pieces as of `row_pieces` -> uint8 codes of cpp/common.h."""
    lib = library()
    assert lib is not None
    size = -(-k // BLOCK) * 64 * width
    out = large_pages([sum(-(-t.shape[0] // ROWS) for t in streams) * size])
    at = out.data_ptr()
    for t in streams:
        assert t.shape[1] == bits.words(k, width)
        lib.bitsmith_pack(t.data_ptr(), *t.stride(), t.shape[0], k, width, at, torch.get_num_threads())
        at += t.shape[0] // ROWS * size
    return out


def select_blocks(part: Tensor, count: int, which: Tensor) -> Tensor:
    """A part that holds `count` blocks of output rows one after the other -> blocks `which` of it, in the same form."""
    found = part.view(count, -1).index_select(0, which)
    return found.view(-1, *part.shape[1:])


def _unpack_codes(packed: Tensor, n: int, k: int, width: int) -> Tensor:
    lib = library()
    assert lib is not None
    out = torch.empty(n, bits.words(k, width), dtype=torch.int32)
    lib.bitsmith_unpack(packed.data_ptr(), n, k, width, out.data_ptr(), torch.get_num_threads())
    return out


def _unpack_fake(packed: Tensor, n: int, k: int, width: int) -> Tensor:
    return packed.new_empty(n, bits.words(k, width), dtype=torch.int32)


# The inverse of `pack_codes`: int32 [n, words].
unpack_codes = ops.define(
    "native_unpack(Tensor packed, int n, int k, int width) -> Tensor", _unpack_codes, _unpack_fake
)


def _kind(spec: Spec) -> int:
    return _INT8 if spec.family == "affine" and int8_activations() else _BFLOAT


def _table(q: QTensor) -> Tensor | None:
    """bfloat16 [256] of the values of all codes (less a fixed zero point), or None where the library cannot look them
    up: 8-bit codes whose bit 7 is not a sign."""
    spec = q.spec
    kind = family(spec)
    codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
    values = kind.value(spec, codes[None], q.parts)[0]
    zero = kind.fixed_zero(spec)
    if zero is not None:
        values = values - zero
    found = values.to(torch.bfloat16)
    if spec.bits == 8:
        low, high = found[:_MAGNITUDES], found[_MAGNITUDES:]
        if not torch.equal(low.view(torch.int16) | -0x8000, high.view(torch.int16)):
            return None
    return torch.cat([found, torch.zeros(256 - found.numel(), dtype=torch.bfloat16)])


def scales_as_given(parts: Mapping[str, Tensor], rows: int, n: int) -> dict[str, Tensor]:
    """The inverse of `add_scales`, up to the shapes: scales, zero points and mins [n, G] where each is of one row."""
    blocks = {name: parts[name] for name in _BY_GROUP if name in parts and rows == 1}
    return {**parts, **{name: t.transpose(1, 2).flatten(0, 1)[:n] for name, t in blocks.items()}}


def by_block(numbers: Sequence[Tensor]) -> Tensor:
    """[N, G], of any strides, in pieces as of `row_pieces` -> [ceil(N / 16), G, 16], rows beyond N zero."""
    lib = library()
    assert lib is not None
    groups, dtype = numbers[0].shape[1], numbers[0].dtype
    out = large_pages((sum(-(-t.shape[0] // ROWS) for t in numbers), groups, ROWS), dtype)
    at = out.data_ptr()
    for t in numbers:
        lib.bitsmith_pack_groups(t.data_ptr(), *t.stride(), *t.shape, dtype.itemsize, at)
        at += t.numel() * dtype.itemsize
    return out


def _second_level(weight: Weight, parts: Mapping[str, Tensor], spec: Spec) -> None:
    level = spec.two_level
    assert level is not None
    weight.per_super = level[1]
    weight.supers, weight.super_dtype = parts["super_scales"].data_ptr(), DTYPES[parts["super_scales"].dtype]
    if "scale_table" in parts:
        weight.scale_table = parts["scale_table"].data_ptr()
    if "scale_offset" in parts:
        weight.scale_offset = float(parts["scale_offset"])
