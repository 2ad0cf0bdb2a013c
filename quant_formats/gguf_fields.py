"""The fields of a GGUF block: where its bytes keep codes, scales and mins. Facts from llama.cpp's ggml-common.h and
ggml-quants.c (MIT).

A field is `size` consecutive bytes of every block. `read` adds what they hold to a dict of parts, `write` is its exact
inverse:

    codes           uint8 or int32 [B, codes of a block], the code of kernels/qtensor.py; fields are or-ed together
    scales, mins    float16 [B, groups], or uint8 codes of two-level ones
    super_scales, super_mins   float16 [B, 1]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Field(Protocol):
    @property
    def size(self) -> int: ...

    def read(self, raw: Tensor, parts: Parts) -> None:
        """raw uint8 [B, size], contiguous."""
        ...

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        """-> uint8 [B, size]."""
        ...


@dataclass(frozen=True)
class Half:
    """A float16. negative: what is stored is subtracted, so the part has the other sign (exact, NaN included)."""

    part: str
    negative: bool = False
    size: int = 2

    def read(self, raw: Tensor, parts: Parts) -> None:
        parts[self.part] = self._flipped(raw).view(torch.float16)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self._flipped(parts[self.part].contiguous().view(torch.uint8))

    def _flipped(self, raw: Tensor) -> Tensor:
        return (raw.view(torch.int16) ^ -0x8000).view(torch.uint8) if self.negative else raw


@dataclass(frozen=True)
class Plane:
    """`bits` bits of each of 8 / bits * size codes: field f of byte i of a run of `run` bytes is code f * run + i.

    place: where they go in the code. flip: exclusive-or of the field (0x80 makes a signed byte offset binary). per,
    step: the fields of `per` neighbours go into one code, `step` bits apart.
    """

    part: str
    size: int
    bits: int
    run: int
    place: int = 0
    flip: int = 0
    per: int = 1
    step: int = 0
    # Whether the part has more than 8 bits.
    wide: bool = False

    def read(self, raw: Tensor, parts: Parts) -> None:
        lanes = raw.view(raw.shape[0], -1, 1, self.run)
        found = torch.cat([lanes >> shift for shift in range(0, 8, self.bits)], 2) & ((1 << self.bits) - 1)
        fields = (found ^ self.flip).flatten(1)
        codes = (fields.int() if self.wide else fields).view(raw.shape[0], -1, self.per)
        for i in range(self.per):
            _add(parts, self.part, codes[..., i] << (self.place + i * self.step))

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, mask = parts[self.part], (1 << self.bits) - 1
        fields = [codes >> (self.place + i * self.step) & mask for i in range(self.per)]
        flat = torch.stack(fields, -1).to(torch.uint8).flatten(1) ^ self.flip
        lanes = flat.view(codes.shape[0], -1, 8 // self.bits, self.run)
        out = lanes[:, :, 0].clone()
        for i in range(1, 8 // self.bits):
            out |= lanes[:, :, i] << (i * self.bits)
        return out.flatten(1)


@dataclass(frozen=True)
class ScaleMinNibbles:
    """Q2_K: a scale in the low half of a byte, a min in the high one."""

    size: int

    def read(self, raw: Tensor, parts: Parts) -> None:
        parts["scales"], parts["mins"] = raw & 15, raw >> 4

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["scales"] | parts["mins"] << 4


@dataclass(frozen=True)
class ScaleMinSixes:
    """Q4_K and Q5_K: eight scales and eight mins of 6 bits; the last four of each have their upper two bits above the
    first four."""

    size: int = 12

    def read(self, raw: Tensor, parts: Parts) -> None:
        scale, low, last = raw.view(-1, 3, 4).unbind(1)
        parts["scales"] = torch.cat([scale & 63, (last & 15) | (scale >> 6 << 4)], 1)
        parts["mins"] = torch.cat([low & 63, (last >> 4) | (low >> 6 << 4)], 1)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        (scale, scale_last), (low, low_last) = parts["scales"].split(4, 1), parts["mins"].split(4, 1)
        last = (scale_last & 15) | (low_last & 15) << 4
        return torch.cat([scale | scale_last >> 4 << 6, low | low_last >> 4 << 6, last], 1)


@dataclass(frozen=True)
class Trits:
    """TQ1_0: bytes of five trits (the last four of four), as ceil(number * 256 / 243), the first trit most significant.

    Only bytes that are written so come back the same: those of every quantizer, not any byte.
    """

    size: int = 52
    # Bytes of a run, trits a byte: trit n of byte i of a run is code n * bytes + i.
    runs: tuple[tuple[int, int], ...] = ((32, 5), (16, 5), (4, 4))

    def read(self, raw: Tensor, parts: Parts) -> None:
        found = []
        for lanes, (_, count) in zip(raw.split([size for size, _ in self.runs], 1), self.runs, strict=True):
            # Modulo 256, as bytes multiply.
            found += [((lanes * 3**n).int() * 3 >> 8).to(torch.uint8) for n in range(count)]
        parts["codes"] = torch.cat(found, 1)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        found = []
        for codes, (size, count) in zip(
            parts["codes"].split([size * count for size, count in self.runs], 1), self.runs, strict=True
        ):
            trits = codes.int().view(-1, count, size).unbind(1)
            number = sum(t * 3 ** (4 - n) for n, t in enumerate(trits))
            found.append((number * 256 + 242) // 243)
        return torch.cat(found, 1).to(torch.uint8)


@dataclass(frozen=True)
class Repeat:
    """`count` times the same few fields."""

    count: int
    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        return self.count * sum(field.size for field in self.fields)

    def read(self, raw: Tensor, parts: Parts) -> None:
        inner: Parts = {}
        pieces = raw.view(raw.shape[0] * self.count, -1).split([field.size for field in self.fields], 1)
        for field, piece in zip(self.fields, pieces, strict=True):
            field.read(piece.contiguous(), inner)
        for name, found in inner.items():
            _add(parts, name, found.view(raw.shape[0], -1))

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        blocks = next(iter(parts.values())).shape[0]
        # A super scale is one of the whole block, and no field that repeats reads it.
        inner = {
            name: part.reshape(blocks * self.count, -1) for name, part in parts.items() if not name.startswith("super_")
        }
        return torch.cat([field.write(inner) for field in self.fields], 1).view(blocks, -1)


@dataclass(frozen=True)
class SignsAndScale:
    """IQ2_XXS and IQ3_XXS: 7 sign bits of each of 4 codes, then the 4-bit scale of all of them."""

    place: int
    size: int = 4

    def read(self, raw: Tensor, parts: Parts) -> None:
        word = raw.view(torch.int32)
        signs = torch.cat([word >> shift & 127 for shift in (0, 7, 14, 21)], 1)
        _add(parts, "codes", signs << self.place)
        parts["scales"] = (word >> 28 & 15).to(torch.uint8)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        word = parts["scales"].int() << 28
        for i, code in enumerate(parts["codes"].split(1, 1)):
            word = word | (code >> self.place & 127) << (7 * i)
        return word.view(torch.uint8)


@dataclass(frozen=True)
class ShiftAndScale:
    """IQ1_S: 3 high index bits of each of 4 codes, then the 3-bit scale of all of them and above it their shift."""

    size: int = 2

    def read(self, raw: Tensor, parts: Parts) -> None:
        word = raw.view(torch.int16).int()
        high = torch.cat([word >> shift & 7 for shift in (0, 3, 6, 9)], 1)
        _add(parts, "codes", high << 8)
        parts["scales"] = (word >> 12 & 15).to(torch.uint8)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        word = parts["scales"].int() << 12
        for i, code in enumerate(parts["codes"].split(1, 1)):
            word = word | (code >> 8 & 7) << (3 * i)
        return word.to(torch.int16).view(torch.uint8)


@dataclass(frozen=True)
class ScalesAroundSuper:
    """IQ1_M: four words of four 3-bit scales, and a quarter of the float16 super scale in the top bits of each."""

    size: int = 8

    def read(self, raw: Tensor, parts: Parts) -> None:
        words = raw.view(torch.int16).int() & 0xFFFF
        scales = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], -1)
        parts["scales"] = scales.flatten(1).to(torch.uint8)
        quarters = (words >> 12) << torch.tensor([0, 4, 8, 12], device=raw.device)
        parts["super_scales"] = quarters.sum(1, keepdim=True).to(torch.int16).view(torch.float16)

    def write(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales = parts["scales"].int().view(-1, 4, 4)
        words = (parts["super_scales"].view(torch.int16).int() >> torch.tensor([0, 4, 8, 12]) & 15) << 12
        for i in range(4):
            words = words | scales[..., i] << (3 * i)
        return words.to(torch.int16).view(torch.uint8)


def _add(parts: Parts, name: str, found: Tensor) -> None:
    parts[name] = parts[name] | found if name in parts else found
