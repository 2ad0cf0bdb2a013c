"""Products of the native library for scales that are small integers times one float of 256 inputs (GGUF's K-quants and
IQ4_XS), with int8 activations: cpp/two_level.h, two_level256.h (AVX2), two_level512.h (AVX-512), neon_two_level.h.

    weight   2 to 6 bits in groups of 16 or 32, scales of 4, 6 or 8 bits, a float16 super scale for 256 inputs; mins
             of the same kind, a fixed zero point, or the IQ4_NL table
             With AVX2 and AVX-512 also FP4 (its doubles are the table) with an E4M3 scale for 16 inputs, and without
             AMX, whose tiles native.py uses, with a power of two for 32; with AVX2 alone, where native.py has no
             tables, IQ4_NL
    x        rounded to int8 with a step for 256 inputs of a row, as llama.cpp does for these types (Q8_K), for 128 with
             scales that are floats; integer dot products are exact

The packed copy is the only one; `qtensor()` gives back the tensor it was made from, bit for bit.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import bits, blocks, codebook, native, ops
from .families import family, level_codes
from .minifloat import E2M1
from .native_inputs import rounded_chunks
from .qtensor import QTensor
from .spec import Spec

SUPER = 256
# (bits, group, bits of a scale's code) -> whether there are mins: what vectors of two_level.h, two_level512.h and
# neon_two_level.h are compiled for, and below with the table.
_FORMS = {(2, 16, 4): True, (3, 16, 6): False, (4, 32, 6): True, (5, 32, 6): True, (6, 16, 8): False}
_TABLE_FORMS = {(4, 32, 6)}
# (table, group, scale) -> the processors on which it is taken.
_FLOAT_FORMS = {
    ("e2m1", 16, "ue4m3"): ("avx2", "avx512", "amx"),
    ("e2m1", 32, "e8m0"): ("avx2", "avx512"),
    ("iq4nl", 32, "f16"): ("avx2",),
}
_LEVELS = ("scales", "mins")


class _Weight(ctypes.Structure):
    """`two_level::Weight` of cpp/two_level.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "mins", "supers", "super_mins", "table")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "sub_bits", "offset", "zero", "scale_dtype")),
        ("factor", ctypes.c_float),
    )


@dataclass(frozen=True)
class TwoLevelLinear:
    """x -> x @ W.T of a weight in the library's layout. Made by `pack`."""

    name = "native-a8"
    spec: Spec
    shape: tuple[int, int]
    extra: Mapping[str, Tensor]
    # codes, scales and mins uint8 (cpp/two_level.h), super_scales and super_mins float16 [blocks, super blocks, 16];
    # global_scale as it was.
    parts: Mapping[str, Tensor]
    # What `linear` takes.
    _header: Tensor = field(repr=False)
    _tensors: list[Tensor | None] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def __call__(self, x: Tensor, path: str = "") -> Tensor:
        """x [M, K] contiguous, float32, bfloat16 or float16, columns in packed order -> [M, N] in x's dtype.

        path: "generic" for the plain loops that define the result, for tests.
        """
        if path:
            return _linear(x, self._header, self._tensors, self.shape[0], native.PATHS.index(path))
        y: Tensor = linear(x, self._header, self._tensors, self.shape[0])
        return y

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        return QTensor(self.spec, self.shape, self._restored(self.parts, self.shape[0]), self.extra)

    def blocks(self, which: Tensor) -> QTensor:
        """The rows of blocks `which` int64 [T] of 16 output rows each: 16 * T rows, those beyond N zero."""
        count = -(-self.shape[0] // native.ROWS)
        parts = {
            name: part if name == "global_scale" else native.select_blocks(part, count, which)
            for name, part in self.parts.items()
        }
        n = which.shape[0] * native.ROWS
        return QTensor(self.spec, (n, self.shape[1]), self._restored(parts, n))

    def _restored(self, packed: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        k, parts = self.shape[1], {}
        if self.spec.two_level is None:
            codes = native.unpack_codes(packed["codes"], n, k, self.spec.bits)
            return {**native.scales_as_given(packed, 1, n), "codes": codes}
        for name, part in packed.items():
            if name == "codes":
                parts[name] = native.unpack_codes(part, n, k, self.spec.bits)
            elif name in _LEVELS:
                groups = k // self.spec.group
                codes = _codes_back(part, n, groups, SUPER // self.spec.group, self.spec.scale_code[0])
                parts[name] = _stored(codes, self.spec)
            else:
                parts[name] = part.transpose(1, 2).flatten(0, 1)[:n].flatten()
        return parts


def supports(q: QTensor) -> bool:
    """Whether `pack` can take `q` on this machine (which must have AVX2 or NEON) and int8 activations are allowed."""
    if q.spec.rows != 1 or q.spec.view or native.best_path() in ("", "generic") or not native.int8_activations():
        return False
    return _float_scales(q) if q.spec.two_level is None else _two_levels(q)


def _two_levels(q: QTensor) -> bool:
    spec = q.spec
    level = spec.two_level
    assert level is not None
    if q.shape[1] % SUPER or (level[0], spec.group * level[1]) != ("f16", SUPER) or "scale_table" in q.parts:
        return False
    form = (spec.bits, spec.group, spec.scale_code[0])
    if spec.family == "codebook":
        return spec.table == "iq4nl" and form in _TABLE_FORMS
    zeros = ("min",) if _FORMS.get(form) else ("sym", "one", "none")
    return spec.family == "affine" and form in _FORMS and spec.zero in zeros


def _float_scales(q: QTensor) -> bool:
    if q.shape[1] % native.BLOCK or "perm" in q.parts:
        return False
    return native.best_path() in _FLOAT_FORMS.get((q.spec.table, q.spec.group, q.spec.scale), ())


def pack(q: QTensor) -> TwoLevelLinear:
    """`q` in the library's layout; `supports(q)` must be true."""
    spec, (n, k) = q.spec, q.shape
    found = blocks.in_place([q.parts])
    parts = native.from_blocks(found[0], q.shape) if found else _packed(q)
    if spec.two_level is None:
        return _with_float_scales(q, parts)
    width, offset = spec.scale_code
    weight = _Weight(
        n=n, k=k, bits=spec.bits, group=spec.group, sub_bits=width, offset=offset,
        zero=int(family(spec).fixed_zero(spec) or 0),
        codes=parts["codes"].data_ptr(), scales=parts["scales"].data_ptr(), supers=parts["super_scales"].data_ptr(),
    )  # fmt: skip
    if "mins" in parts:
        weight.mins, weight.super_mins = parts["mins"].data_ptr(), parts["super_mins"].data_ptr()
    held = list(parts.values())
    if spec.family == "codebook":
        held.append(codebook.table(spec).to(torch.int8))
        weight.table = held[-1].data_ptr()
    return TwoLevelLinear(spec, q.shape, q.extra, parts, *native.operands(weight, held))


def _with_float_scales(q: QTensor, parts: dict[str, Tensor]) -> TwoLevelLinear:
    if q.spec.table == "e2m1":
        table, unit = torch.tensor([2 * v for v in (*E2M1, *(-v for v in E2M1))], dtype=torch.int8), 0.5
    else:
        table, unit = codebook.table(q.spec).to(torch.int8), 1.0
    weight = _Weight(
        n=q.shape[0], k=q.shape[1], bits=q.spec.bits, group=q.spec.group, codes=parts["codes"].data_ptr(),
        scales=parts["scales"].data_ptr(), scale_dtype=native.number_type(q.spec, parts["scales"]),
        table=table.data_ptr(), factor=unit * float(q.parts.get("global_scale", 1.0)),
    )  # fmt: skip
    return TwoLevelLinear(q.spec, q.shape, q.extra, parts, *native.operands(weight, [*parts.values(), table]))


def _packed(q: QTensor) -> dict[str, Tensor]:
    """Parts in the library's layout."""
    spec, (n, k), parts = q.spec, q.shape, {}
    for name, part in q.parts.items():
        if name == "codes":
            parts[name] = native.pack_codes([part], k, spec.bits)
        elif name == "global_scale":
            parts[name] = part
        elif name in _LEVELS and spec.two_level:
            parts[name] = _packed_codes(level_codes(spec, part, q.parts[f"super_{name}"]), spec)
        else:
            parts[name] = native.by_block([part.view(n, -1)])
    return parts


def rounded_activations(x: Tensor, spec: Spec) -> Tensor:
    """The torch twin of what products with weights of `spec` do to x [M, K]: float32, 256 inputs of a row rounded to
    255 steps, 128 where scales are floats."""
    return rounded_chunks(x, SUPER if spec.two_level else SUPER // 2)


def _linear(x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], n: int, path: int = -1) -> Tensor:
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    _linear_call(y, x, header, tensors, path)()
    return y


def _linear_call(y: Tensor, x: Tensor, header: Tensor, tensors: Sequence[Tensor | None], path: int = -1) -> ops.Call:
    lib = native.library()
    assert lib is not None
    weight = native.structure(_Weight, header, tensors)
    return native.product_call(lib.bitsmith_two_level_linear, weight, y, x, path)


# x [M, K] contiguous, columns in packed order; header and tensors from `native.operands` -> [M, n] in x's dtype.
linear = ops.define(
    "native_two_level(Tensor x, Tensor header, Tensor?[] tensors, int n) -> Tensor",
    _linear,
    native.linear_fake,
    lambda results, x, header, tensors, n: _linear_call(results[0], x, header, tensors),
)


def _packed_codes(codes: Tensor, spec: Spec) -> Tensor:
    """uint8 [N, G] -> the bytes of cpp/two_level.h."""
    lib = native.library()
    assert lib is not None
    n, groups = codes.shape
    width, per = spec.scale_code[0], SUPER // spec.group
    out = native.large_pages([-(-n // native.ROWS) * native.ROWS * groups * width // 8])
    lib.bitsmith_pack_levels(codes.contiguous().data_ptr(), n, groups, per, width, out.data_ptr())
    return out


def _unpack_levels(packed: Tensor, n: int, groups: int, per: int, width: int) -> Tensor:
    lib = native.library()
    assert lib is not None
    codes = torch.empty(n, groups, dtype=torch.uint8)
    lib.bitsmith_unpack_levels(packed.data_ptr(), n, groups, per, width, codes.data_ptr())
    return codes


def _unpack_levels_fake(packed: Tensor, n: int, groups: int, per: int, width: int) -> Tensor:
    return packed.new_empty(n, groups)


# The inverse of `_packed_codes`, `per` codes of `width` bits a super block: uint8 [n, groups].
_codes_back = ops.define(
    "native_unpack_levels(Tensor packed, int n, int groups, int per, int width) -> Tensor",
    _unpack_levels,
    _unpack_levels_fake,
)


def _stored(codes: Tensor, spec: Spec) -> Tensor:
    width = spec.scale_code[0]
    return codes if width == 8 else bits.pack(codes, width)
