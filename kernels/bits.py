"""Dense little-endian bit streams: codes of 1 to 32 bits in int32 words, any width, row by row.

Code c of a row occupies bits [c*bits, (c+1)*bits) of the row's stream, word 0 first, low bit first, so a code of 3, 5,
6 or 7 bits may straddle two words. This is the order GPTQ (along K) and compressed-tensors use, and the in-memory form
of every family but the trellis: `codes` int32 [rows, ceil(columns*bits/32)]. Codes of more than 8 bits are those of
vectors (kernels/codebook.py).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import ops
from .library import library
from .paths import native_allowed

# Rows unpacked at a time: the int64 intermediate of a 14336-wide row stays under 64 MB.
_ROWS = 512


def words(columns: int, bits: int) -> int:
    """int32 words that hold `columns` codes of `bits` bits."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes integer [R, C], each in 0..2**bits-1 (32 bits: any int32) -> int32 [R, words(C, bits)]; unused high bits of
    the last word are zero.
    """
    r, c = codes.shape
    if bits in (1, 2, 4, 8):
        return _pack_aligned(codes, bits)
    out = torch.zeros(r, words(c, bits) + 1, dtype=torch.int64, device=codes.device)
    for lane in range(min(32, c)):
        word, shift = divmod(lane * bits, 32)
        value = codes[:, lane::32].to(torch.int64) << shift
        span = out[:, word::bits][:, : value.shape[1]]
        span |= value & 0xFFFFFFFF
        if shift + bits > 32:
            out[:, word + 1 :: bits][:, : value.shape[1]] |= value >> 32
    return out[:, : words(c, bits)].to(torch.int32)


def _pack_aligned(codes: Tensor, bits: int) -> Tensor:
    """Widths that divide a byte: build bytes, then reinterpret four of them as a word."""
    r, c = codes.shape
    per_byte = 8 // bits
    padded = torch.zeros(r, words(c, bits) * 4 * per_byte, dtype=torch.uint8, device=codes.device)
    padded[:, :c] = codes
    lanes = padded.view(r, -1, per_byte)
    packed = lanes[..., 0].clone()
    for i in range(1, per_byte):
        packed |= lanes[..., i] << (i * bits)
    return packed.view(torch.int32)


def row_bytes(packed: Tensor) -> Tensor:
    """int32 [R, W] of any strides -> uint8 [R, 4 * W], contiguous."""
    # Flat first: a [R, 1] transpose counts as contiguous, yet cannot be viewed as bytes.
    return packed.contiguous().view(-1).view(torch.uint8).view(packed.shape[0], 4 * packed.shape[1])


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [R, words(columns, bits)] -> [R, columns], uint8 up to 8 bits, else int32: the inverse of `pack`."""
    # A byte a code is a view.
    if bits != 8 and packed.is_cpu and native_allowed() and library() is not None:
        found: Tensor = _codes(packed, bits, columns)
        return found
    return unpack_twin(packed, bits, columns)


def unpack_twin(packed: Tensor, bits: int, columns: int) -> Tensor:
    """`unpack` by torch's operators."""
    if bits in (1, 2, 4, 8):
        lanes = row_bytes(packed)
        if bits < 8:
            mask = (1 << bits) - 1
            lanes = torch.stack([(lanes >> (i * bits)) & mask for i in range(8 // bits)], -1).flatten(1)
        return lanes[:, :columns]
    out = torch.empty(packed.shape[0], columns, dtype=_dtype(bits), device=packed.device)
    for start in range(0, packed.shape[0], _ROWS):
        out[start : start + _ROWS] = _unpack_stream(packed[start : start + _ROWS], bits, columns)
    return out


def _dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def _unpack_stream(packed: Tensor, bits: int, columns: int) -> Tensor:
    groups = -(-columns // 32)
    stream = torch.zeros(packed.shape[0], groups * bits + 1, dtype=torch.int64, device=packed.device)
    stream[:, : packed.shape[1]] = packed.to(torch.int64) & 0xFFFFFFFF
    lanes = []
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = stream[:, word : word + (groups - 1) * bits + 1 : bits] >> shift
        if shift + bits > 32:
            value = value | (stream[:, word + 1 : word + 2 + (groups - 1) * bits : bits] << (32 - shift))
        lanes.append((value & ((1 << bits) - 1)).to(_dtype(bits)))
    return torch.stack(lanes, -1).flatten(1)[:, :columns]


def _dense(packed: Tensor) -> bool:
    return packed.shape[1] == 1 or packed.stride(1) == 1


def _codes_call(out: Tensor, packed: Tensor, bits: int) -> ops.Call:
    lib = library()
    assert lib is not None
    return partial(
        lib.bitsmith_codes, packed.data_ptr(), packed.stride(0), *out.shape, bits, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def _codes_real(packed: Tensor, bits: int, columns: int) -> Tensor:
    out = _codes_fake(packed, bits, columns)
    packed = packed if _dense(packed) else packed.contiguous()
    if out.numel():
        _codes_call(out, packed, bits)()
    return out


def _codes_fake(packed: Tensor, bits: int, columns: int) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=_dtype(bits))


def _codes_bind(results: Sequence[Tensor], packed: Tensor, bits: int, columns: int) -> ops.Call | None:
    return _codes_call(results[0], packed, bits) if _dense(packed) else None


_codes = ops.define(
    "native_codes(Tensor packed, int bits, int columns) -> Tensor", _codes_real, _codes_fake, _codes_bind
)
