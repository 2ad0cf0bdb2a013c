"""QTensor: one quantized weight in memory, in its family's form, whatever file it came from.

The weight [N, K] is seen as a matrix [R, C] (`Spec.view`; almost always the weight itself) whose rows are cut into
groups of `Spec.group` columns. Parts are named tensors:

    codes   int32 [R, words(C, bits)] dense bit stream (kernels/bits.py)
    scales  [R / rows, C / group] in the dtype the spec names (rounded up where they do not divide)
    zeros   like scales: uint8 for `asym`, float for `zf*`; absent for `sym` and `none`
    table   float32 [2**bits] (codebook)
    super_scales, scale_table, scale_offset   the second level of a two-level scale
    perm    int32 [K]: input feature held by packed column j (`pre` = perm)

No torch.Tensor subclass: functions take a QTensor, a module holds its parts as buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import bits
from .families import family
from .grid import Params
from .spec import Spec


@dataclass(frozen=True)
class QTensor:
    """A quantized weight. `shape` is (out_features, in_features)."""

    spec: Spec
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    # What the dialect needs to write the same bytes again and no kernel reads (static activation scales, producer's
    # metadata).
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The exact reference: [N, K], computed in float32 and rounded once to `dtype`."""
        matrix = family(self.spec).decode(self.spec, self.parts, matrix_shape(self.spec, self.shape)).to(dtype)
        weight = from_matrix(matrix, self.spec, self.shape)
        if "perm" in self.spec.pre:
            weight = weight[:, torch.argsort(self.parts["perm"])]
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as they sit in memory."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    @property
    def bpw(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> "QTensor":
        return replace(self, parts={k: t.to(device) for k, t in self.parts.items()})

    def rows(self, start: int, stop: int) -> "QTensor":
        """Output rows start..stop. Raises ValueError where the cut would split a tile of scales or the view hides the
        rows."""
        tile = self.spec.rows
        if tile > 1 and (start % tile or (stop % tile and stop != self.shape[0])):
            raise ValueError(f"{self.spec}: rows {start}..{stop} of {self.shape[0]} cut a tile of {tile} rows")
        if self.spec.view or self.spec.two_level:
            raise ValueError(f"{self.spec}: rows are not independent, so it cannot be cut by rows")
        cut = dict(self.parts)
        cut["codes"] = cut["codes"][start:stop]
        for name in ("scales", "zeros"):
            if name in cut and tile != -1:
                cut[name] = cut[name][start // tile : -(-stop // tile)]
        return QTensor(self.spec, (stop - start, self.shape[1]), cut)

    def shard(self, dim: int, rank: int, world: int) -> "QTensor":
        """Part `rank` of `world` equal parts along output rows (dim 0) or inputs (dim 1).

        Raises ValueError where the dimension does not divide, or a cut of the inputs would split a group or a word.
        """
        size, left = divmod(self.shape[dim], world)
        if left:
            raise ValueError(f"dimension {dim} of {self.shape} does not divide by {world} ranks")
        if dim == 0:
            return self.rows(rank * size, (rank + 1) * size)
        _need_rows(self.spec)
        if self.spec.pre or self.spec.group < 1 or size % self.spec.group or size * self.spec.bits % 32:
            raise ValueError(f"{self.spec}: {self.shape[1]} inputs cannot be cut into {world} whole groups and words")
        word, group = size * self.spec.bits // 32, size // self.spec.group
        cut = dict(self.parts)
        cut["codes"] = cut["codes"][:, rank * word : (rank + 1) * word].contiguous()
        for name in ("scales", "zeros"):
            if name in cut:
                cut[name] = cut[name][:, rank * group : (rank + 1) * group].contiguous()
        return QTensor(self.spec, (self.shape[0], size), cut)


_ROW_PARTS = ("codes", "scales", "zeros")


def _need_rows(spec: Spec) -> None:
    if spec.rows != 1 or spec.view or spec.two_level:
        raise ValueError(f"{spec}: rows are not independent, so it cannot be cut or stacked by rows")


def can_concat(tensors: Sequence[QTensor]) -> bool:
    """Whether `concat` works: one spec, one input width, independent rows, equal shared parts."""
    first = tensors[0]
    if first.spec.rows != 1 or first.spec.view or first.spec.two_level:
        return False
    shared = [k for k in first.parts if k not in _ROW_PARTS]
    return all(
        t.spec == first.spec
        and t.shape[1] == first.shape[1]
        and t.parts.keys() == first.parts.keys()
        and all(torch.equal(t.parts[k], first.parts[k]) for k in shared)
        for t in tensors[1:]
    )


def concat(tensors: Sequence[QTensor]) -> QTensor:
    """Stack along output rows: merged q/k/v, gate/up, or a layer's experts. Raises ValueError unless `can_concat`."""
    if not can_concat(tensors):
        raise ValueError("cannot stack " + ", ".join(f"{t.spec} {t.shape}" for t in tensors))
    first = tensors[0]
    parts = {k: torch.cat([t.parts[k] for t in tensors]) if k in _ROW_PARTS else v for k, v in first.parts.items()}
    return QTensor(first.spec, (sum(t.shape[0] for t in tensors), first.shape[1]), parts)


def matrix_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    """[R, C] of the grouped matrix for a weight of `shape`."""
    if not spec.view:
        return shape
    return -(-shape[0] * shape[1] // spec.group), spec.group


def to_matrix(weight: Tensor, spec: Spec) -> Tensor:
    """Weight [N, K] -> grouped matrix [R, C]; a flat view is zero-padded to whole groups."""
    if not spec.view:
        return weight
    r, c = matrix_shape(spec, (weight.shape[0], weight.shape[1]))
    if spec.view == "axis0":
        return weight.reshape(c, r).T
    flat = torch.zeros(r * c, dtype=weight.dtype, device=weight.device)
    flat[: weight.numel()] = weight.reshape(-1)
    return flat.view(r, c)


def from_matrix(matrix: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_matrix`."""
    if not spec.view:
        return matrix
    flat = matrix.T.reshape(-1) if spec.view == "axis0" else matrix.reshape(-1)
    return flat[: shape[0] * shape[1]].view(shape)


def build(codes: Tensor, params: Params, spec: Spec, shape: tuple[int, int], perm: Tensor | None = None) -> QTensor:
    """uint8 codes [R, C] of the grouped matrix and the params they were chosen with (not spread) -> QTensor."""
    parts = {"codes": bits.pack(codes, spec.bits), **family(spec).grid.parts(spec, params)}
    if perm is not None:
        parts["perm"] = perm.to(torch.int32)
    return QTensor(spec, shape, parts)


def codes_of(q: QTensor) -> Tensor:
    """uint8 [R, C]: the unpacked codes of the grouped matrix."""
    return bits.unpack(q.parts["codes"], q.spec.bits, matrix_shape(q.spec, q.shape)[1])
