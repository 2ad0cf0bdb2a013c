"""QTensor: one quantized weight in memory, in its family's form, whatever file it came from.

The weight [N, K] is seen as a matrix [R, C] (`Spec.view`; almost always the weight itself) whose rows are cut into
groups of `Spec.group` columns. Parts are named tensors:

    codes   int32 [R, words(ceil(C / vec), bits * books)] dense bit stream (kernels/bits.py); trellis: tiles
            [R / 16, C / 16, 8 * bits] (kernels/trellis.py)
    scales  [R', G] = [R / rows, C / group] in the dtype the spec names (rounded up where they do not divide); trellis:
            none. Two levels: codes, uint8, or narrower ones as a bit stream int32 [R', words(G, bits)]
    zeros   like scales: uint8 for `asym`, float for `zf*`; absent for `sym`, `one`, `none` and `min`
    mins    of `min`: exactly like scales
    table   codebook.py gives its shapes
    super_scales, scale_table, scale_offset   the second level of a two-level scale, [R' * G / PER] of them
    super_mins                                that of the mins
    global_scale  float [], multiplies one-level scales (NVFP4)
    act_step      float [], the step of `a4` activations of all tokens (activation.py); absent: each token its own
    in_scale float [K], perm int32 [K] (input feature held by packed column j), out_scale float [N]
            what `pre` and `post` need (kernels/transform.py); K and N are those of the matrix: a Hadamard transform
            takes whole blocks, so its weight is padded to them

No torch.Tensor subclass: functions take a QTensor, a module holds its parts as buffers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import UserError
from . import bits, blocks, transform
from .families import family, scale_shape
from .grid import Params
from .spec import ROW_TABLE, Spec
from .stacked import Stacked, pieces

# Second levels, [R' * G / PER]: a row's are consecutive.
_SUPERS = ("super_scales", "super_mins")


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
        """The exact reference: [N, K], computed in float32 and rounded once to `dtype`; steps around the product are
        folded in, so that it is the weight of the plain x @ W.T."""
        matrix = family(self.spec).decode(self.spec, self.parts, matrix_shape(self.spec, self.shape))
        if not self.spec.post and self.spec.pre in ((), ("perm",)):
            matrix = matrix.to(dtype)
        return transform.fold(self.spec, self.parts, from_matrix(matrix, self.spec, self.shape), self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as they sit in memory."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    @property
    def bpw(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return torch.device("cpu") if blocks.in_place([self.parts]) else pieces(self.parts, "codes")[0].device

    def to(self, device: torch.device | str) -> "QTensor":
        """Parts on `device`, read where they are still in the blocks of a file, and in one where they are in pieces."""
        return replace(self, parts={k: t.to(device) for k, t in self.parts.items()})

    def read(self) -> "QTensor":
        """Itself, or the same with parts that were still in the blocks of a file or in pieces."""
        return self if isinstance(self.parts, dict) else self.to(self.device)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Output rows start..stop. Raises ValueError where the cut would split a tile of scales or codes or a Hadamard
        block, or the view hides the rows."""
        tile = row_tile(self.spec)
        if tile > 1 and (start % tile or (stop % tile and stop != self.shape[0])):
            raise ValueError(f"{self.spec}: rows {start}..{stop} of {self.shape[0]} cut a tile of {tile} rows")
        if self.spec.view or not own_supers(self.spec, self.shape):
            raise ValueError(f"{self.spec}: rows are not independent, so it cannot be cut by rows")
        end = -(-stop // tile) * tile
        cut = dict(self.parts)
        for name, unit in _row_parts(self.spec).items():
            if name in cut and name in _SUPERS:
                cut[name] = cut[name].view(self.shape[0], -1)[start:stop].flatten()
            elif name in cut:
                cut[name] = cut[name][start // unit : -(-end // unit)]
        return QTensor(self.spec, (stop - start, self.shape[1]), cut)

    def shard(self, dim: int, rank: int, world: int) -> "QTensor":
        """Part `rank` of `world` equal parts along output rows (dim 0) or inputs (dim 1).

        Raises ValueError where the dimension does not divide, or a cut of the inputs would split a group, a word, a
        tile of codes or a Hadamard block.
        """
        size, left = divmod(self.shape[dim], world)
        if left:
            raise ValueError(f"dimension {dim} of {self.shape} does not divide by {world} ranks")
        if dim == 0:
            return self.rows(rank * size, (rank + 1) * size)
        spec, tile = self.spec, family(self.spec).code_tile
        if spec.rows != 1 or spec.view or not own_supers(spec, self.shape):
            raise ValueError(f"{spec}: rows are not independent, so it cannot be cut or stacked by rows")
        whole = math.lcm(spec.in_block, _inputs_cut(spec), tile[1] if tile else 1)
        if "perm" in spec.pre or size % whole or not (tile or whole_words(spec, size)):
            raise ValueError(f"{self.spec}: {self.shape[1]} inputs cannot be cut into {world} whole groups and words")
        cut = dict(self.parts)
        lengths = {"codes": size // tile[1] if tile else size // spec.vec * spec.width // 32, "in_scale": size}
        if spec.group != -1:
            lengths |= dict.fromkeys(("scales", "zeros", "mins"), _stored_groups(spec, size))
        if spec.two_level:
            lengths |= dict.fromkeys(_SUPERS, size // spec.group // spec.two_level[1])
        for name, length in lengths.items():
            if name in cut:
                part = cut[name].view(self.shape[0], -1) if name in _SUPERS else cut[name]
                kept = part.narrow(0 if name == "in_scale" else 1, rank * length, length)
                cut[name] = kept.flatten() if name in _SUPERS else kept.contiguous()
        return QTensor(self.spec, (self.shape[0], size), cut)


def _row_parts(spec: Spec) -> dict[str, int]:
    """Parts that are cut and stacked by output rows -> rows that share an entry of their first dimension."""
    tile = family(spec).code_tile
    found = {"codes": tile[0] if tile else 1, "out_scale": 1}
    if spec.rows != -1:
        found |= dict.fromkeys(("scales", "zeros", "mins"), spec.rows)
    if spec.two_level:
        found |= dict.fromkeys(_SUPERS, 1)
    return found | ({"table": 1} if spec.table == ROW_TABLE else {})


def row_tile(spec: Spec) -> int:
    """Output rows that can only be cut together."""
    tile = family(spec).code_tile
    return math.lcm(max(1, spec.rows), spec.out_block, tile[0] if tile else 1)


def independent_rows(q: QTensor) -> bool:
    """Whether `take` works: every output row has its own codes, scales and super scales."""
    return not q.spec.view and row_tile(q.spec) == 1 and own_supers(q.spec, q.shape)


def take(q: QTensor, rows: Tensor) -> QTensor:
    """Output rows `rows`, int64 [T], in their order; nothing is read back to the host.

    Raises ValueError unless `independent_rows`.
    """
    if not independent_rows(q):
        raise ValueError(f"{q.spec}: rows are not independent, so they cannot be taken one by one")
    cut = dict(q.parts)
    for name in _row_parts(q.spec).keys() & cut.keys():
        part = cut[name].view(q.shape[0], -1) if name in _SUPERS else cut[name]
        found = part.index_select(0, rows)
        cut[name] = found.flatten() if name in _SUPERS else found
    return QTensor(q.spec, (rows.shape[0], q.shape[1]), cut)


def whole_words(spec: Spec, columns: int) -> bool:
    """Whether `columns` inputs take a whole number of words of the bit stream."""
    return columns % spec.vec == 0 and columns // spec.vec * spec.width % 32 == 0


def own_supers(spec: Spec, shape: tuple[int, int]) -> bool:
    """Whether no super scale of a two-level scale serves more than one row (true of one level)."""
    level = spec.two_level
    return level is None or (spec.rows == 1 and scale_shape(spec, shape)[1] % level[1] == 0)


def _stored_groups(spec: Spec, columns: int) -> int:
    """Entries of a row of `scales` for `columns` inputs: numbers, or words of a bit stream."""
    groups = columns // spec.group
    return bits.words(groups, spec.scale_code[0]) if spec.two_level and spec.scale_code[0] < 8 else groups


def _inputs_cut(spec: Spec) -> int:
    """Inputs of whole groups, super blocks and words of scale codes."""
    group = max(1, spec.group)
    if spec.two_level is None:
        return group
    width = spec.scale_code[0]
    return group * math.lcm(spec.two_level[1], 1 if width == 8 else 32 // math.gcd(32, width))


def can_concat(tensors: Sequence[QTensor]) -> bool:
    """Whether `concat` works: one spec, one input width, independent rows, equal shared parts."""
    first = tensors[0]
    if first.spec.rows != 1 or first.spec.view or not own_supers(first.spec, first.shape):
        return False
    if any(t.shape[0] % row_tile(first.spec) for t in tensors):
        return False
    shared = [k for k in first.parts if k not in _row_parts(first.spec)]
    return all(
        t.spec == first.spec
        and t.shape[1] == first.shape[1]
        and t.parts.keys() == first.parts.keys()
        and all(torch.equal(t.parts[k], first.parts[k]) for k in shared)
        for t in tensors[1:]
    )


def concat(tensors: Sequence[QTensor]) -> QTensor:
    """Stack along output rows: merged q/k/v, gate/up, or a layer's experts; nothing is copied before a part is asked
    for. Raises ValueError unless `can_concat`.
    """
    if not can_concat(tensors):
        raise ValueError("cannot stack " + ", ".join(f"{t.spec} {t.shape}" for t in tensors))
    first, shape = tensors[0], (sum(t.shape[0] for t in tensors), tensors[0].shape[1])
    if found := blocks.in_place([t.parts for t in tensors]):
        return QTensor(first.spec, shape, found[0].stacked(found[1:]))
    return QTensor(first.spec, shape, Stacked([t.parts for t in tensors], _row_parts(first.spec)))


def matrix_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    """[R, C] of the grouped matrix for a weight of `shape`: whole tiles of codes, whole Hadamard blocks."""
    if not spec.view:
        tile = family(spec).code_tile or (1, 1)
        units = math.lcm(spec.out_block, tile[0]), math.lcm(spec.in_block, tile[1])
        return -(-shape[0] // units[0]) * units[0], -(-shape[1] // units[1]) * units[1]
    return -(-shape[0] * shape[1] // spec.group), spec.group


def to_matrix(weight: Tensor, spec: Spec) -> Tensor:
    """Weight [N, K] -> grouped matrix [R, C]; a flat view is zero-padded to whole groups. Steps around the product are
    the caller's business."""
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
    """Codes [R, C] of the grouped matrix and the params they were chosen with (not spread) -> QTensor.

    Raises UserError for a spec with steps around the product other than `perm`: no method here chooses their vectors.
    """
    if spec.post or spec.pre not in ((), ("perm",)):
        raise UserError(
            f"{spec}: weights are not quantized onto transformed inputs or outputs yet, only read; "
            f"use {replace(spec, pre=(), post=())}"
        )
    parts = {"codes": bits.pack(codes, spec.width), **family(spec).grid.parts(spec, params)}
    if perm is not None:
        parts["perm"] = perm.to(torch.int32)
    return QTensor(spec, shape, parts)


def codes_of(q: QTensor) -> Tensor:
    """The unpacked codes of the grouped matrix: uint8 [R, C], or int32 where they have more than 8 bits."""
    return family(q.spec).unpack(q.spec, q.parts, matrix_shape(q.spec, q.shape))


def core(q: QTensor) -> QTensor:
    """What is between the steps of `q`: the weight of the packed columns, whole Hadamard blocks of it."""
    steps = q.parts.keys() & transform.PARTS
    parts = {name: t for name, t in q.parts.items() if name not in steps} if steps else q.parts
    return QTensor(q.spec.without_steps(), core_shape(q.spec, q.shape), parts, q.extra)


def core_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    """(N, K) of `core`, padding included."""
    return shape if spec.view else matrix_shape(spec, shape)


def with_steps(inner: QTensor, spec: Spec, shape: tuple[int, int], sides: Mapping[str, Tensor]) -> QTensor:
    """The inverse of `core`: `sides` are transform.sides(q.parts)."""
    return QTensor(spec, shape, {**inner.parts, **sides}, inner.extra)
