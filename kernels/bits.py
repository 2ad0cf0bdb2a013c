"""Dense little-endian bit streams: codes of 1 to 32 bits in int32 words, any width, row by row.

Code c of a row occupies bits [c*bits, (c+1)*bits) of the row's stream, word 0 first, low bit first, so a code of 3, 5,
6 or 7 bits may straddle two words. This is the order GPTQ (along K) and compressed-tensors use, and the in-memory form
of every family but the trellis: `codes` int32 [rows, ceil(columns*bits/32)]. Codes of more than 8 bits are those of
vectors (kernels/codebook.py).
"""

import torch
from torch import Tensor

# Rows unpacked at a time: the int64 intermediate of a 14336-wide row stays under 64 MB.
_ROWS = 512
# Codes up to which ten operators beat one for each of 32 lanes: a row of an embedding takes 43 us, not 350; from some
# millions on they take half as long again.
_FEW = 1 << 16


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
    if bits in (1, 2, 4, 8):
        lanes = row_bytes(packed)
        if bits < 8:
            mask = (1 << bits) - 1
            lanes = torch.stack([(lanes >> (i * bits)) & mask for i in range(8 // bits)], -1).flatten(1)
        return lanes[:, :columns]
    dtype = torch.uint8 if bits < 8 else torch.int32
    if packed.shape[0] * columns <= _FEW:
        return _unpack_few(packed, bits, columns).to(dtype)
    out = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    for start in range(0, packed.shape[0], _ROWS):
        out[start : start + _ROWS] = _unpack_stream(packed[start : start + _ROWS], bits, columns)
    return out


def _stream(packed: Tensor, groups: int, bits: int) -> Tensor:
    """Unsigned words of `groups` times 32 codes and one more, int64 [R, groups * bits + 1]."""
    stream = torch.zeros(packed.shape[0], groups * bits + 1, dtype=torch.int64, device=packed.device)
    stream[:, : packed.shape[1]] = packed.to(torch.int64) & 0xFFFFFFFF
    return stream


def _unpack_few(packed: Tensor, bits: int, columns: int) -> Tensor:
    groups = -(-columns // 32)
    stream = _stream(packed, groups, bits)
    pairs = (stream[:, :-1] | stream[:, 1:] << 32).unflatten(1, (groups, bits))
    at = torch.arange(32, device=packed.device) * bits
    return (pairs[..., at >> 5] >> (at & 31) & ((1 << bits) - 1)).flatten(1)[:, :columns]


def _unpack_stream(packed: Tensor, bits: int, columns: int) -> Tensor:
    groups = -(-columns // 32)
    stream = _stream(packed, groups, bits)
    lanes = []
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = stream[:, word : word + (groups - 1) * bits + 1 : bits] >> shift
        if shift + bits > 32:
            value = value | (stream[:, word + 1 : word + 2 + (groups - 1) * bits : bits] << (32 - shift))
        lanes.append((value & ((1 << bits) - 1)).to(torch.uint8 if bits < 8 else torch.int32))
    return torch.stack(lanes, -1).flatten(1)[:, :columns]
