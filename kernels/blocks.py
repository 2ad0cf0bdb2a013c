"""Weights still in the blocks of a file, where codes and scales lie side by side: read where they are, straight into
the native library's layout (cpp/blocks.h), or as the parts of a QTensor once one is asked for.

A format says what its blocks hold (`Layout`) and how its parts are read without the library (`unpack`); no format is
known here.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits
from .pages import large_pages
from .spec import Spec
from .stacked import Parts, Stacked

# Kinds of a Field: cpp/blocks.h says what they are.
HALF, PLANE, NIBBLES, SIXES = range(4)
PARTS = ("codes", "scales", "mins", "super_scales", "super_mins")
# Of cpp/common.h.
ROWS, BLOCK = 16, 32
_LEVELS = ("scales", "mins")


class Field(ctypes.Structure):
    """`Field` of cpp/blocks.h; `part` is an index of PARTS, `at` the offset of its bytes."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("kind", "part", "at", "size", "bits", "run", "place", "flip"))


class _Source(ctypes.Structure):
    """`Source` of cpp/blocks.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("fields", ctypes.POINTER(Field)),
        ("parts", ctypes.c_void_p * len(PARTS)),
        ("n", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("count", "width", "size", "bits", "scale_bits", "groups")),
    )


@dataclass(frozen=True)
class Layout:
    """What a block of `width` neighbours of a row holds, in `size` bytes."""

    spec: Spec
    width: int
    size: int
    fields: tuple[Field, ...]

    @property
    def scale_bits(self) -> int:
        """Bits of a stored scale that is no float16: a code of two levels, a byte; else 0."""
        coded = any(PARTS[field.part] in _LEVELS and field.kind != HALF for field in self.fields)
        return (self.spec.scale_code[0] if self.spec.two_level else 8) if coded else 0

    @property
    def parts(self) -> tuple[str, ...]:
        found = {PARTS[field.part] for field in self.fields} | ({"mins"} if self.spec.zero == "min" else set())
        return tuple(name for name in PARTS if name in found)


class Blocks(Mapping[str, Tensor]):
    """The parts of a weight of whole rows of blocks. What is held changes from blocks to parts when one is asked for,
    so that nothing is held twice.

    rows: uint8 [*, bytes of a row] and int64 [N], which of them are the weight's, in its order; several to be stacked.
    Not copied. unpack: uint8 [N, bytes of a row] -> parts.
    """

    def __init__(
        self, layout: Layout, rows: Sequence[tuple[Tensor, Tensor]], unpack: Callable[[Tensor], Parts]
    ) -> None:
        self.layout, self.rows, self._unpack = layout, tuple(rows), unpack
        self._parts: Parts = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        if self.rows:
            self._parts, self.rows = self._unpack(torch.cat([raw[which] for raw, which in self.rows])), ()
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self.layout.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.parts)

    def __len__(self) -> int:
        return len(self.layout.parts)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parts."""
        layout, spec, n = self.layout, self.layout.spec, sum(which.shape[0] for _, which in self.rows)
        blocks = self.rows[0][0].shape[1] // layout.size
        groups = blocks * layout.width // spec.group
        stored = groups if layout.scale_bits in (0, 8) else bits.words(groups, layout.scale_bits)
        found = {name: (n * blocks,) if name.startswith("super_") else (n, stored) for name in layout.parts}
        found["codes"] = (n, bits.words(blocks * layout.width, spec.bits))
        return {name: torch.Size(shape) for name, shape in found.items()}

    def stacked(self, others: Sequence["Blocks"]) -> "Blocks":
        """These rows, then those of `others`, which have the same layout; all of them in blocks still."""
        return Blocks(self.layout, [r for each in (self, *others) for r in each.rows], self._unpack)


def in_place(parts: Sequence[Parts]) -> list[Blocks]:
    """All of `parts` where each is in blocks still, of one layout; else none."""
    found = [each for each in parts if isinstance(each, Blocks) and each.rows]
    return found if len(found) == len(parts) and len({id(each.layout) for each in found}) == 1 else []


def shapes(parts: Parts) -> dict[str, torch.Size]:
    """Shape of each part."""
    if isinstance(parts, Stacked):
        return parts.shapes
    found = in_place([parts])
    return found[0].shapes if found else {name: t.shape for name, t in parts.items()}


def packed(library: ctypes.CDLL, source: Blocks, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Blocks of a weight [N, K] -> codes uint8 of cpp/common.h; scales and mins [ceil(N / 16), G, 16], codes of them
    uint8 of cpp/two_level.h; super_scales and super_mins float16 [ceil(N / 16), super blocks, 16].
    """
    (n, k), layout = shape, source.layout
    spec, count = layout.spec, -(-n // ROWS)
    parts = {name: large_pages((count, k // layout.width, ROWS), torch.float16) for name in layout.parts}
    groups = k // spec.group
    if layout.scale_bits:
        form = (-1,) if spec.two_level else (count, groups, ROWS)
        for name in parts.keys() & _LEVELS:
            parts[name] = large_pages([count * ROWS * groups * layout.scale_bits // 8]).view(form)
    parts["codes"] = large_pages([count * (k // BLOCK) * 64 * spec.bits])
    # Rows where they lie: stacking them first would copy all.
    at = torch.cat([which * raw.stride(0) + raw.data_ptr() for raw, which in source.rows])
    assert at.shape[0] == n
    what = _Source(
        rows=at.data_ptr(), fields=(Field * len(layout.fields))(*layout.fields), n=n, blocks=k // layout.width,
        count=len(layout.fields), width=layout.width, size=layout.size, bits=spec.bits, scale_bits=layout.scale_bits,
        groups=layout.width // spec.group,
    )  # fmt: skip
    for index, name in enumerate(PARTS):
        what.parts[index] = parts[name].data_ptr() if name in parts else None
    library.bitsmith_pack_blocks(ctypes.byref(what), torch.get_num_threads())
    return parts
