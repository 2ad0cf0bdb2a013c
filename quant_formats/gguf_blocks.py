"""GGUF tensor types: the spec of each, and raw rows of blocks <-> QTensor. Layouts: llama.cpp's ggml-common.h (MIT).

Parts of the IQ1, IQ2 and IQ3 types: kernels/grids.py. TQ1_0 takes 22 % more memory than in the file (2 bits
instead of five trits a byte), all others what they take there.

`pack(name, unpack(name, raw, shape))` is `raw`, byte for byte, of every file that a quantizer wrote. Bytes that none
writes and that would not come back: those of TQ1_0 that are not the canonical form of their five trits. An E4M3 scale
of 0x7F (NVFP4) is NaN here and 0 in llama.cpp, and an E8M0 scale of 0xFF (MXFP4) infinite here and 2**128 there; both
come back as they were.

Of the dense types F32, F16 and BF16 the spec is None: they are read as numbers, not here. Left out: Q8_1 and Q8_K,
which are activations and never in a file, and the interleaved types that llama.cpp removed from files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import bits
from ..kernels.families import level_codes
from ..kernels.qtensor import QTensor, codes_of
from ..kernels.spec import Spec
from .gguf_fields import (
    Field,
    Half,
    Parts,
    Plane,
    Repeat,
    ScaleMinNibbles,
    ScaleMinSixes,
    ScalesAroundSuper,
    ShiftAndScale,
    SignsAndScale,
    Trits,
)

# Weights converted at a time: their codes take 8 MB as bytes.
_PIECE = 1 << 23


@dataclass(frozen=True)
class Block:
    """One block: `width` neighbours of a row."""

    spec: Spec
    width: int
    # In the order of the file.
    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(field.size for field in self.fields)


def _block(spec: str, width: int, *fields: Field) -> Block:
    return Block(Spec.parse(spec), width, fields)


_D, _M = Half("scales"), Half("mins")
_SUPER, _SUPER_MIN = Half("super_scales"), Half("super_mins", negative=True)
_NIBBLES = Plane("codes", 16, 4, 16)
_NIBBLE_SCALES = Plane("scales", 8, 4, 1)
_FIFTH = Plane("codes", 4, 1, 1, place=4)

BLOCKS = {
    "Q1_0": _block("codebook1.sign.g128", 128, _D, Plane("codes", 16, 1, 1)),
    "Q2_0": _block("affine2.g64.one", 64, _D, Plane("codes", 16, 2, 1)),
    "Q4_0": _block("affine4.g32.sym", 32, _D, _NIBBLES),
    "Q4_1": _block("affine4.g32.min", 32, _D, _M, _NIBBLES),
    "Q5_0": _block("affine5.g32.sym", 32, _D, _FIFTH, _NIBBLES),
    "Q5_1": _block("affine5.g32.min", 32, _D, _M, _FIFTH, _NIBBLES),
    "Q8_0": _block("affine8.g32.sym", 32, _D, Plane("codes", 32, 8, 1, flip=0x80)),
    "Q2_K": _block(
        "affine2.g16.min.u4:f16:16", 256, ScaleMinNibbles(16), Plane("codes", 64, 2, 32), _SUPER, _SUPER_MIN
    ),
    "Q3_K": _block(
        "affine3.g16.sym.s6:f16:16",
        256,
        Plane("codes", 32, 1, 32, place=2),
        Plane("codes", 64, 2, 32),
        Plane("scales", 8, 4, 8),
        Plane("scales", 4, 2, 4, place=4),
        _SUPER,
    ),
    "Q4_K": _block("affine4.g32.min.u6:f16:8", 256, _SUPER, _SUPER_MIN, ScaleMinSixes(), Plane("codes", 128, 4, 32)),
    "Q5_K": _block(
        "affine5.g32.min.u6:f16:8",
        256,
        _SUPER,
        _SUPER_MIN,
        ScaleMinSixes(),
        Plane("codes", 32, 1, 32, place=4),
        Plane("codes", 128, 4, 32),
    ),
    "Q6_K": _block(
        "affine6.g16.sym.s8:f16:16",
        256,
        Plane("codes", 128, 4, 64),
        Plane("codes", 64, 2, 32, place=4),
        Plane("scales", 16, 8, 1, flip=0x80),
        _SUPER,
    ),
    "IQ4_NL": _block("codebook4.iq4nl.g32", 32, _D, _NIBBLES),
    "IQ4_XS": _block(
        "codebook4.iq4nl.g32.s6:f16:8",
        256,
        _SUPER,
        Plane("scales", 2, 2, 1, place=4),
        Plane("scales", 4, 4, 1),
        Plane("codes", 128, 4, 16),
    ),
    "IQ2_XXS": _block(
        "codebook15.iq2xxs.v8.g32.u4:f16:8",
        256,
        _SUPER,
        Repeat(8, (Plane("codes", 4, 8, 1, wide=True), SignsAndScale(8))),
    ),
    "IQ2_XS": _block(
        "codebook16.iq2xs.v8.g16.u4:f16:16",
        256,
        _SUPER,
        Plane("codes", 64, 8, 1, per=2, step=8, wide=True),
        _NIBBLE_SCALES,
    ),
    "IQ2_S": _block(
        "codebook18.iq2s.v8.g16.u4:f16:16",
        256,
        _SUPER,
        Plane("codes", 32, 8, 1, wide=True),
        Plane("codes", 32, 8, 1, place=10, wide=True),
        Plane("codes", 8, 2, 1, place=8, wide=True),
        _NIBBLE_SCALES,
    ),
    "IQ3_XXS": _block(
        "codebook23.iq3xxs.v8.g32.u4:f16:8",
        256,
        _SUPER,
        Plane("codes", 64, 8, 1, per=2, step=8, wide=True),
        Repeat(8, (SignsAndScale(16),)),
    ),
    "IQ3_S": _block(
        "codebook26.iq3s.v8.g32.u4:f16:8",
        256,
        _SUPER,
        Plane("codes", 64, 8, 1, per=2, step=9, wide=True),
        Plane("codes", 8, 1, 1, place=8, per=2, step=9, wide=True),
        Plane("codes", 32, 8, 1, place=18, wide=True),
        Plane("scales", 4, 4, 1),
    ),
    "IQ1_S": _block(
        "codebook11.iq1s.v8.g32.u4:f16:8",
        256,
        _SUPER,
        Plane("codes", 32, 8, 1, wide=True),
        Repeat(8, (ShiftAndScale(),)),
    ),
    "IQ1_M": _block(
        "codebook12.iq1m.v8.g16.u3:f16:16",
        256,
        Plane("codes", 32, 8, 1, wide=True),
        Plane("codes", 16, 4, 1, place=8, wide=True),
        ScalesAroundSuper(),
    ),
    "TQ1_0": _block("affine2.g256.one", 256, Trits(), _D),
    "TQ2_0": _block("affine2.g256.one", 256, Plane("codes", 64, 2, 32), _D),
    "MXFP4": _block("minifloat4.e2m1.g32.e8m0", 32, Plane("scales", 1, 8, 1), _NIBBLES),
    "NVFP4": _block("minifloat4.e2m1.g16.ue4m3", 64, Plane("scales", 4, 8, 1), Plane("codes", 32, 4, 8)),
}
# Bytes of a number.
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
# Type -> spec, None where numbers are stored as they are.
TYPES: dict[str, Spec | None] = {**dict.fromkeys(_DENSE), **{name: block.spec for name, block in BLOCKS.items()}}


def spec(type_name: str) -> Spec | None:
    """The spec of a ggml type ("Q4_K"), None for F32, F16 and BF16. UserError for one that is not in TYPES."""
    if type_name not in TYPES:
        raise UserError(f"GGUF tensor type {type_name!r} is not known here; accepted: {', '.join(TYPES)}")
    return TYPES[type_name]


def row_bytes(type_name: str, width: int) -> int:
    """Bytes of a row of `width` weights. UserError for an unknown type, or a row that is not whole blocks."""
    if spec(type_name) is None:
        return width * _DENSE[type_name]
    block = BLOCKS[type_name]
    if width % block.width:
        raise UserError(
            f"GGUF type {type_name} has blocks of {block.width} weights, and a row of {width} is not whole blocks; "
            "accepted: a type whose block divides the row, as Q4_0 (32) or F16"
        )
    return width // block.width * block.size


def unpack(type_name: str, raw: Tensor, shape: tuple[int, int]) -> QTensor:
    """raw uint8 [N, row_bytes] of a [N, K] weight -> QTensor of spec(type_name).

    UserError for a dense or unknown type, and where raw does not have that shape.
    """
    block = packed_type(type_name, raw, shape)
    pieces = [_stored(block, _read(block, raw[start:stop]), stop - start) for start, stop in _rows(*shape)]
    parts = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return QTensor(block.spec, shape, parts)


def packed_type(type_name: str, raw: Tensor, shape: tuple[int, int]) -> Block:
    """The block of raw uint8 [N, row_bytes] of a [N, K] weight. Errors are those of `unpack`."""
    block = _packed(type_name)
    wanted = (shape[0], row_bytes(type_name, shape[1]))
    if raw.dtype is not torch.uint8 or tuple(raw.shape) != wanted:
        raise UserError(
            f"{type_name} rows of a {shape[0]} x {shape[1]} weight are {raw.dtype} {tuple(raw.shape)}; "
            f"accepted: torch.uint8 {wanted}"
        )
    return block


def pack(type_name: str, q: QTensor) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row_bytes]. UserError where q's spec is not that of the type."""
    block = _packed(type_name)
    if q.spec != block.spec:
        raise UserError(f"a tensor of spec {q.spec} cannot be written as GGUF type {type_name}, which is {block.spec}")
    length = row_bytes(type_name, q.shape[1])
    out = torch.empty(q.shape[0], length, dtype=torch.uint8)
    for start, stop in _rows(*q.shape):
        parts = _fields(block, q.rows(start, stop))
        out[start:stop] = torch.cat([field.write(parts) for field in block.fields], 1).view(stop - start, length)
    return out


def _packed(type_name: str) -> Block:
    if spec(type_name) is None:
        raise UserError(f"{type_name} tensors hold numbers, not blocks; accepted: {', '.join(BLOCKS)}")
    return BLOCKS[type_name]


def _rows(n: int, k: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE // k)
    for start in range(0, n, step):
        yield start, min(start + step, n)


def _read(block: Block, raw: Tensor) -> Parts:
    parts: Parts = {}
    found = raw.reshape(-1, block.size).split([field.size for field in block.fields], 1)
    for field, piece in zip(block.fields, found, strict=True):
        field.read(piece.contiguous(), parts)
    return parts


def _stored(block: Block, fields: Parts, n: int) -> Parts:
    """Fields of all blocks of n rows -> parts of a QTensor."""
    what = block.spec
    parts = {}
    for name, field in fields.items():
        if name.startswith("super_"):
            parts[name] = field.flatten()
        elif name == "codes":
            parts[name] = bits.pack(field.view(n, -1), what.width)
        elif what.two_level and what.scale_code[0] < 8:
            parts[name] = bits.pack(field.view(n, -1), what.scale_code[0])
        else:
            parts[name] = field.view(n, -1)
    return parts


def _fields(block: Block, q: QTensor) -> Parts:
    """The inverse of `_stored`."""
    fields = {}
    count = q.shape[0] * q.shape[1] // block.width
    for name, part in q.parts.items():
        if name == "codes":
            part = codes_of(q)
        elif name in ("scales", "mins") and q.spec.two_level:
            part = level_codes(q.spec, part, q.parts["super_" + name])
        fields[name] = part.reshape(count, -1)
    return fields
