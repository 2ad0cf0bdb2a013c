"""4- and 8-bit affine weights on the CPU through torch's 4-bit operator, which reads weights at memory speed for few
rows.

    y = x @ W.T,  W = (code - 8) * s + z,  z = (8 - zero) * s,  s and z bfloat16 for each group of 32, 64, 128 or 256
    inputs

Wider groups (a whole row too) repeat their scale. An 8-bit code is two 4-bit ones laid side by side along K, 16 *
high + low, whose scales differ by 16; x is doubled, so both halves meet in one float32 accumulator.

The operator costs time in proportion to rows, so many rows decode the same packed bytes (kernels/lut.py's look-up,
block by block) and multiply with oneDNN instead. The packed copy is the only one: `qtensor()` unpacks it. The
operator holds scales in bfloat16, so the three bits a float16 scale loses are kept in one byte a group; integer zero
points are recovered from z / s. What does not come back exactly is kept as it was. Resident bytes against the
QTensor: 1.05 at group 128, 1.09 at 64, 1.17 at 32.

Error against the exact product (RMS, relative; K 2048, inputs of mean 0): 2.3e-3 for few rows, 2.7e-3 (symmetric) to
3.3e-3 for many; rounding y to bfloat16 alone is 1.7e-3. z, rounded too, is the part that grows with the mean of the
inputs: a fractional zero point over a whole row reaches 7e-3 at a mean of 0.3 standard deviations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import bits, probe
from .families import family, scales
from .pieces import flat_scales, straighten
from .qtensor import QTensor
from .spec import Spec

_GROUPS = (256, 128, 64, 32)
# Rows up to which the operator beats decoding, by planes. Measured on one Xeon core with AMX (N 5632, K 2048): one
# plane costs 0.26 ms a row against 15 ms to decode, and multiply, two planes 0.52 against 28.
_ROWS = {1: 64, 2: 48}
# z is rounded to 8 significant bits: up to this many steps of offset its error stays under an eighth of a step.
_LARGEST_OFFSET = 64
_PACK_ELEMENTS = 1 << 24
_DECODE_ROWS = 512


@dataclass(frozen=True)
class Int4Pack:
    """x -> x @ W.T of a weight held in the operator's layout. Made by `pack`."""

    name = "int4pack"
    # Of the tensor it was made from; shapes holds those of its parts, in their order.
    spec: Spec
    shape: tuple[int, int]
    shapes: Mapping[str, torch.Size]
    extra: Mapping[str, Tensor]
    # uint8 [N, planes * K / 2], the operator's layout; planes = 1 for 4-bit codes, 2 (high, low) for 8-bit ones.
    packed: Tensor
    layout: probe.Int4Layout
    planes: int
    # Inputs a scale, of the operator; bfloat16 [planes * K / group, N, 2]: s and z.
    group: int
    scale_zero: Tensor
    # int8: stored float16 scale minus the bfloat16 one, in units of the last place; None where equal or kept.
    delta: Tensor | None
    # Parts that cannot be recovered from the above.
    kept: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        tensors = [self.packed, self.scale_zero, *self.kept.values()]
        return sum(t.nbytes for t in tensors) + (0 if self.delta is None else self.delta.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [M, K] contiguous, columns in packed order -> bfloat16 [M, N]."""
        if x.shape[0] > _ROWS[self.planes]:
            return self._many(x)
        if self.planes > 1:
            x = torch.cat([x] * self.planes, 1)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scale_zero)
        return y

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        n, k = self.shape
        codes = self.layout.unpack(self.packed, n, self.planes * k)
        if self.planes > 1:
            codes = (codes[:, :k] << 4) | codes[:, k:]
        found = dict(self.kept)
        found["codes"] = bits.pack(codes, self.spec.bits)
        if "scales" not in found:
            found["scales"] = _scales_back(self.scale_zero, self.planes, self.delta, self.spec)
        if "zeros" in self.shapes and "zeros" not in found:
            found["zeros"] = _zeros_back(self.scale_zero, self.planes)
        parts = {name: found[name].reshape(shape) for name, shape in self.shapes.items()}
        return QTensor(self.spec, self.shape, parts, self.extra)

    def _many(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.shape[0], dtype=torch.bfloat16)
        for start, stop, block, split in self._runs():
            y = x @ self._weight(start, stop, block, split)
            wanted = out[:, start:stop]
            if split:
                # Undo the lane order of `_weight`; two neighbouring rows travel as one int32.
                lanes = y.view(torch.int32).view(x.shape[0], -1, block // 4, 2).transpose(2, 3)
                wanted.view(torch.int32).unflatten(1, (-1, 2, block // 4)).copy_(lanes)
            else:
                wanted.copy_(y)
        return out

    def _runs(self) -> Iterator[tuple[int, int, int, bool]]:
        """(first row, last row + 1, rows of a block, split) of runs of equal blocks."""
        n, block = self.shape[0], self.layout.block
        whole = n // block * block
        step = _DECODE_ROWS // block * block
        for start in range(0, whole, step):
            yield start, min(start + step, whole), block, self.layout.split
        if whole < n:
            yield whole, n, n - whole, False

    def _weight(self, start: int, stop: int, block: int, split: bool) -> Tensor:
        """bfloat16 [K, stop - start]: rows start..stop of W, transposed; in each split block row h * block/2 + 2j + b
        is at 4j + 2h + b."""
        k, count = self.shape[1], (stop - start) // block
        size = self.planes * k // 2
        codes = self.packed.view(-1)[start * size : stop * size].view(count, self.planes, k, block // 2)
        if self.planes == 1:
            values = _look_up(codes[:, 0], split, 1, 8)
        else:
            values = _look_up(codes[:, 0], split, 16, 8).add_(_look_up(codes[:, 1], split, 1, 0))
        groups = k // self.group
        scale = self.scale_zero[-groups:, start:stop].view(groups, count, block, 2)
        if split:
            scale = scale.unflatten(2, (2, block // 4, 2)).transpose(2, 3).flatten(2, 4)
        s, z = scale.transpose(0, 1).unsqueeze(2).unbind(-1)
        # A strided s would cost three times the product.
        by_group = values.view(count, groups, self.group, block).mul_(s.contiguous())
        if self.spec.zero != "sym":
            # The operator counts both halves of an 8-bit code from 8, `values` counts the low one from 0.
            by_group += (z.contiguous() if self.planes == 1 else z.float() - 8 * s.float()).to(torch.bfloat16)
        return values.transpose(0, 1).reshape(k, count * block)


def pack(q: QTensor) -> Int4Pack | None:
    """`q` in the operator's layout, or None where it cannot be: other families and widths, tails, odd shapes, far
    zero points."""
    group = _operator_group(q)
    layout = probe.int4pack() if group else None
    if layout is None:
        return None
    plain = flat_scales(straighten(q))
    planes = plain.spec.bits // 4
    scale = scales(plain.spec, plain.parts)
    offset = _centre(planes) - _zero(plain)
    if float(offset.abs().max()) > _LARGEST_OFFSET:
        return None
    repeat = (q.shape[1] if q.spec.group == -1 else q.spec.group) // group
    # z from the rounded s: then the whole group scales by one factor, and an input with a mean meets a smaller error.
    rounded = scale.to(torch.bfloat16).float()
    s, z = (t.repeat_interleave(repeat, 1).T for t in (rounded, offset * rounded))
    pairs = [torch.stack([s, z], -1)]
    if planes > 1:
        pairs.insert(0, torch.stack([16 * s, torch.zeros_like(s)], -1))
    scale_zero = torch.cat(pairs).to(torch.bfloat16).contiguous()
    delta, kept = _not_recovered(q, scale_zero, planes, repeat)
    shapes = {name: t.shape for name, t in q.parts.items()}
    packed = _pack_codes(plain)
    return Int4Pack(q.spec, q.shape, shapes, q.extra, packed, layout, planes, group, scale_zero, delta, kept)


def _operator_group(q: QTensor) -> int:
    """The operator's group size for `q`, or 0."""
    spec = straighten(q).spec
    n, k = q.shape
    if (
        spec.family != "affine"
        or spec.bits not in (4, 8)
        or spec.zero == "min"
        or spec.rows != 1
        or spec.view
        or n % 16
    ):
        return 0
    size = k if spec.group == -1 else spec.group
    return next((g for g in _GROUPS if size % g == 0), 0) if k % size == 0 else 0


def _centre(planes: int) -> int:
    return 8 if planes == 1 else 16 * 8 + 8


def _zero(q: QTensor) -> Tensor:
    if "zeros" in q.parts:
        return q.parts["zeros"].float()
    return torch.tensor(family(q.spec).fixed_zero(q.spec) or 0.0)


def _pack_codes(q: QTensor) -> Tensor:
    """Packed in runs of whole blocks, so that the int32 codes the operator wants never exist for the whole weight."""
    n, k = q.shape
    step = max(64, _PACK_ELEMENTS // k // 64 * 64)
    done = []
    for start in range(0, n, step):
        codes = bits.unpack(q.parts["codes"][start : start + step], q.spec.bits, k).int()
        if q.spec.bits == 8:
            codes = torch.cat([codes >> 4, codes & 15], 1)
        done.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    return torch.cat(done)


def _not_recovered(q: QTensor, scale_zero: Tensor, planes: int, repeat: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(delta, parts to keep): what `qtensor` cannot compute from the operator's scales."""
    kept = {name: t for name, t in q.parts.items() if name != "codes"}
    delta = None
    if repeat > 1 or q.spec.two_level:
        return None, kept
    stored = q.parts["scales"]
    if stored.dtype is torch.float16:
        rounded = _scales_back(scale_zero, planes, None, q.spec).reshape(stored.shape)
        exact = stored.view(torch.int16).int() - rounded.view(torch.int16).int()
        if int(exact.abs().max()) < 128:
            delta = exact.to(torch.int8)
    if torch.equal(_scales_back(scale_zero, planes, delta, q.spec).reshape(stored.shape), stored):
        del kept["scales"]
    else:
        delta = None
    if q.spec.zero == "asym" and torch.equal(_zeros_back(scale_zero, planes).reshape(stored.shape), q.parts["zeros"]):
        del kept["zeros"]
    return delta, kept


def _scales_back(scale_zero: Tensor, planes: int, delta: Tensor | None, spec: Spec) -> Tensor:
    """[N, G] in the stored dtype, where each of the operator's groups has its own scale."""
    low = scale_zero[-(scale_zero.shape[0] // planes) :, :, 0].T.contiguous()
    dtype = {"f16": torch.float16, "f32": torch.float32}.get(spec.scale, torch.bfloat16)
    found = low.to(dtype)
    return found if delta is None else (found.view(torch.int16) + delta.reshape(found.shape)).view(torch.float16)


def _zeros_back(scale_zero: Tensor, planes: int) -> Tensor:
    s, z = scale_zero[-(scale_zero.shape[0] // planes) :].float().unbind(-1)
    return (_centre(planes) - z / s).round().clamp(0, 255).T.to(torch.uint8)


def _look_up(codes: Tensor, split: bool, factor: int, centre: int) -> Tensor:
    """codes uint8 [blocks, K, block / 2] -> bfloat16 [blocks, K, block] of (code - centre) * factor, in lane order."""
    table = _table(split, factor, centre)
    # Rows for torch.gather to share among threads; K is a multiple of 32.
    index = codes.view(torch.uint16).long().reshape(-1, 16 * codes.shape[2])
    found = torch.gather(table.expand(index.shape[0], -1), 1, index)
    return found.view(torch.bfloat16).view(codes.shape[0], codes.shape[1], -1)


@cache
def _table(split: bool, factor: int, centre: int) -> Tensor:
    """int64 [65536]: four bfloat16 values of a 16-bit word of codes. A split word holds rows 2j, h+2j, 2j+1, h+2j+1."""
    word = torch.arange(1 << 16)
    nibbles = [(word >> shift) & 15 for shift in ((0, 8, 4, 12) if split else (0, 4, 8, 12))]
    return ((torch.stack(nibbles, 1) - centre) * factor).to(torch.bfloat16).view(torch.int64).flatten()
