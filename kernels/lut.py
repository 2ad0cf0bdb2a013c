"""Decoding to bfloat16 on the CPU by table look-up: one plain-torch path for every family whose value depends on the
code alone.

The dense bit stream is read in fields of up to 16 bits that hold 2 or 4 whole codes, and each field indexes a table
whose entries are those 2 or 4 values side by side as bfloat16, stored as one int32 or int64:

    bits     1  2  3   4   5   6   7   8
    field    4  8  12  16  10  12  14  16      entries 2**field, at most 64 Ki, shared by all tensors of a kind
    codes    4  4  4   4   2   2   2   2

so 4-bit codes cost one look-up per four weights, and a float8 or NF4 value costs what an integer does. Measured on
11.5 M weights, one thread, before the scales: NF4 4 ms, FP8 7 ms (torch's own float8 to bfloat16 cast: 54 ms;
`table[codes]`: 31 ms or more). `torch.gather` along rows is used because it is the look-up that torch spreads over
threads (1-D `index_select` is serial).

Rounding: table entries, scales and zero points to bfloat16, then each product once. Integers up to 256 and float8
values are exact. Relative error of a weight against the exact value: 2.3e-3 to 3e-3 RMS (a bfloat16 weight alone has
1.7e-3).
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .families import family, scales, spread
from .qtensor import QTensor, from_matrix, matrix_shape
from .spec import ROW_TABLE, Spec

# bits -> (bits of a field, codes in it)
_FIELDS = {1: (4, 4), 2: (8, 4), 3: (12, 4), 4: (16, 4), 5: (10, 2), 6: (12, 2), 7: (14, 2), 8: (16, 2)}
# Families whose value() looks at nothing but the code.
_PER_CODE = ("affine", "minifloat", "codebook")


def supports(spec: Spec) -> bool:
    """Of a `min` weight both terms would be rounded where their sum is small: it is decoded in float32 instead."""
    if spec.family not in _PER_CODE or spec.zero == "min":
        return False
    return spec.bits in _FIELDS and spec.vec == 1 and spec.table != ROW_TABLE


def decode(q: QTensor) -> Tensor:
    """The weight of `q`, bfloat16 [N, K], columns in packed order (a `perm` is the caller's to apply to the input)."""
    shape = matrix_shape(q.spec, q.shape)
    matrix = _values(q.parts["codes"], q.spec.bits, _table_of(q), shape[1])
    scale = scales(q.spec, q.parts).to(torch.bfloat16)
    fraction = None
    if "zeros" in q.parts:
        # A fractional zero point (HQQ) is taken off after scaling: code - zero rounded to bfloat16 would double the
        # error.
        zero = q.parts["zeros"].float()
        whole = zero.round().clamp(-256, 256)
        fraction = None if q.spec.zero == "asym" else (zero - whole) * scale
        _by_group(matrix, whole, q.spec, "sub_")
    _by_group(matrix, scale, q.spec, "mul_")
    if fraction is not None:
        _by_group(matrix, fraction, q.spec, "sub_")
    return from_matrix(matrix, q.spec, q.shape)


def _by_group(matrix: Tensor, per_group: Tensor, spec: Spec, operation: str) -> None:
    """matrix [R, C] -= or *= the value of each group, in place, broadcasting instead of spreading where groups are
    whole."""
    r, c = matrix.shape
    group = c if spec.group == -1 else spec.group
    by_row = spread(per_group, replace(spec, group=-1), (r, c))
    operand = by_row.to(torch.bfloat16)
    whole = c // group * group
    if whole:
        getattr(matrix[:, :whole].unflatten(1, (-1, group)), operation)(operand[:, : whole // group, None])
    if whole < c:
        getattr(matrix[:, whole:], operation)(operand[:, -1:])


def _values(codes: Tensor, bits: int, table: Tensor, columns: int) -> Tensor:
    """codes int32 [R, W] -> bfloat16 [R, columns] of table values; a view of a slightly wider tensor where columns
    are odd."""
    width, lanes = _FIELDS[bits]
    index = _fields(codes, width, -(-columns // lanes))
    found = torch.gather(table.expand(index.shape[0], -1), 1, index)
    return found.view(torch.bfloat16)[:, :columns]


def _fields(codes: Tensor, width: int, count: int) -> Tensor:
    """The first `count` fields of `width` bits of each row's stream: int32 [R, W] -> int64 [R, count]."""
    r = codes.shape[0]
    # Flat first: a [R, 1] transpose counts as contiguous, yet cannot be viewed as bytes.
    words = codes.contiguous().view(-1)
    if width == 16:
        return words.view(torch.uint16).view(r, -1)[:, :count].long()
    stream = words.view(torch.uint8).view(r, -1)
    if width == 8:
        return stream[:, :count].long()
    # Four fields fill width / 2 whole bytes, at most 7: gather those in an int64 and shift the fields out.
    size, quads = width // 2, -(-count // 4)
    stream = pad(stream, (0, max(0, quads * size - stream.shape[1])))[:, : quads * size].unflatten(1, (quads, size))
    word = torch.zeros(r, quads, dtype=torch.int64, device=codes.device)
    octets = word.view(torch.uint8).unflatten(1, (quads, 8))
    for i in range(size):
        octets[..., i] = stream[..., i]
    fields = (word[..., None] >> (torch.arange(4, device=codes.device) * width)).bitwise_and_((1 << width) - 1)
    return fields.flatten(1)[:, :count]


def _table_of(q: QTensor) -> Tensor:
    kind = family(q.spec)
    codes = torch.arange(1 << q.spec.bits, dtype=torch.uint8)
    values = kind.value(q.spec, codes[None], q.parts)[0]
    zero = kind.fixed_zero(q.spec)
    if zero is not None:
        values = values - zero
    return _table(values.numpy().tobytes(), q.spec.bits)


@cache
def _table(values: bytes, bits: int) -> Tensor:
    """float32 values of the 2**bits codes -> int32 or int64 [2**field], each entry the bfloat16 values of the field's
    codes."""
    width, lanes = _FIELDS[bits]
    field = torch.arange(1 << width)
    codes = torch.stack([(field >> (i * bits)) & ((1 << bits) - 1) for i in range(lanes)], 1)
    entries = torch.frombuffer(bytearray(values), dtype=torch.float32).to(torch.bfloat16)[codes]
    return entries.view(torch.int64 if lanes == 4 else torch.int32).flatten()
