"""QTensor <-> the layout of the device templates (tiles.py): bit planes [words, N] along K, scales [G, R'].

Done once per tensor at load, on the tensor's device; `unpack` is the exact inverse, so saving never depends on a
device. Bytes stay what they were, but for K padded to a multiple of 32, the 2 bits of a word that codes of two-level
scales of 3 or 6 bits leave (0.6 % of Q4_K), and the vectors of a named grid, once a device. Nothing is expanded:
a scale shared by 128 rows is stored once. Codes a family keeps in tiles of its own (trellis) are left as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import bits, grids
from .codebook import FIXED, table
from .families import family, level_codes
from .lang import HAVE_TRITON, INSTALL
from .qtensor import QTensor, core, matrix_shape, whole_words, with_steps
from .spec import GRIDS, Spec
from .tiles import Parts, a_word, plane_rows, widths
from .transform import sides

_METADATA = ("scales", "zeros", "mins")


@dataclass(frozen=True)
class Packed:
    """A weight in the device layout. Made by `pack`."""

    # Of the tensor it was made from, and that spec's `as_compiled`.
    original: Spec
    spec: Spec
    # (out_features, in_features) of the tensor it was made from, and (N, K) of the packed weight: whole tiles of codes
    # and whole Hadamard blocks.
    weight_shape: tuple[int, int]
    shape: tuple[int, int]
    parts: Parts
    # in_scale, perm, out_scale: what the steps around the product need.
    sides: Mapping[str, Tensor]


def supported(q: QTensor) -> str:
    """Why the device templates cannot take `q` here (the caller then dequantizes with the torch twin), or ""."""
    return layout_problem(q) or _machine_problem(q)


def layout_problem(q: QTensor) -> str:
    """Why the device layout cannot hold `q`, or ""."""
    spec = q.spec
    if spec.view == "axis0":
        return f"{spec}: groups along axis 0 give each input its own scale, so a tile has as many scales as weights"
    if spec.view == "flat" and (q.shape[1] % spec.group or not whole_words(spec, spec.group)):
        return f"{spec}: rows of {q.shape[1]} are not whole groups, so groups straddle rows"
    return ""


def _machine_problem(q: QTensor) -> str:
    device, least = q.parts["codes"].device, family(q.spec).min_capability
    if not HAVE_TRITON:
        return f"{q.spec}: {INSTALL}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < least:
            return f"{q.spec}: the kernels need sm_{least} or newer and {device} is sm_{major}{minor}"
    return ""


def pack(q: QTensor) -> Packed:
    """The device form of `q`, on its device; `layout_problem(q)` must be empty."""
    assert not layout_problem(q), layout_problem(q)
    inner = core(q)
    spec = inner.spec.as_compiled()
    n, k = inner.shape
    parts = dict(inner.parts)
    if spec.table in FIXED:
        parts["table"] = _fixed(spec, parts["codes"].device)
    narrow = _narrow(parts, spec)
    for name in narrow:
        parts[name] = level_codes(spec, parts[name], parts[f"super_{name}"])
    for name in _METADATA:
        if name in parts:
            # A flat view of whole groups is the plain one: row r of [N * K / group, 1] is group r % G of output r // G.
            found = parts[name].reshape(n, -1) if q.spec.view == "flat" else parts[name]
            parts[name] = (_level_words(found, spec) if name in narrow else found).T.contiguous()
    if family(spec).code_tile is None:
        parts["codes"] = _planes(parts["codes"].reshape(n, -1), spec, k)
    return Packed(q.spec, spec, q.shape, inner.shape, Parts(**parts), sides(q.parts))


def unpack(packed: Packed) -> QTensor:
    """The QTensor `packed` was made from, part for part (but for `extra`, which no device reads)."""
    parts = {name: t for name, t in packed.parts._asdict().items() if t is not None}
    for name in _METADATA:
        if name in parts:
            parts[name] = parts[name].T.contiguous()
    if packed.spec.table in FIXED:
        del parts["table"]
    narrow = _narrow(parts, packed.spec)
    for name in narrow:
        parts[name] = _level_codes(parts[name], parts[f"super_{name}"], packed.spec)
    if family(packed.spec).code_tile is None:
        parts["codes"] = _stream(parts["codes"], packed.spec, packed.shape[1])
    if packed.original.view == "flat":
        rows = matrix_shape(packed.original, packed.shape)[0]
        parts = {name: t.reshape(rows, -1) if name in ("codes", *_METADATA) else t for name, t in parts.items()}
    for name in narrow:
        parts[name] = bits.pack(parts[name], packed.spec.scale_code[0])
    inner = QTensor(packed.original.without_steps(), packed.shape, parts)
    return with_steps(inner, packed.original, packed.weight_shape, packed.sides)


@cache
def _fixed(spec: Spec, device: torch.device) -> Tensor:
    """A table that no tensor holds, in the dtype devices read: one for all weights, so that caches hold it once."""
    if spec.table in GRIDS:
        return grids.vectors(spec.table).to(device, torch.int8)
    return table(spec).to(device)


def _narrow(parts: Mapping[str, Tensor], spec: Spec) -> list[str]:
    """Parts that are codes of two levels, narrower than bytes."""
    narrow = spec.two_level is not None and spec.scale_code[0] < 8
    return [name for name in ("scales", "mins") if narrow and name in parts]


def _level_words(codes: Tensor, spec: Spec) -> Tensor:
    """uint8 [R', G] -> int32 [R', ceil(G / per)] (tiles.py)."""
    width = spec.scale_code[0]
    per = a_word(width)
    whole = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per))
    return bits.pack(whole.view(-1, per), width).view(codes.shape[0], -1)


def _level_codes(words: Tensor, supers: Tensor, spec: Spec) -> Tensor:
    """The inverse of `_level_words`; the number of super scales says how many groups there are."""
    assert spec.two_level is not None
    width, rows = spec.scale_code[0], words.shape[0]
    codes = bits.unpack(words.reshape(-1, 1), width, a_word(width)).view(rows, -1)
    return codes[:, : supers.numel() * spec.two_level[1] // rows]


def _planes(stream: Tensor, spec: Spec, k: int) -> Tensor:
    """int32 [N, words] bit stream -> int32 planes [rows, N] (tiles.py)."""
    width, count = spec.width, -(-k // spec.vec)
    if 32 % width == 0:
        planes = [(stream, width)]
    else:
        codes, planes, below = bits.unpack(stream, width, count), [], 0
        for w in widths(width):
            planes.append((bits.pack((codes >> below) & ((1 << w) - 1), w), w))
            below += w
    rows = sum(plane_rows(k, w, spec.vec) for _, w in planes)
    out = torch.zeros(rows, stream.shape[0], dtype=torch.int32, device=stream.device)
    row = 0
    for plane, w in planes:
        out[row : row + plane.shape[1]] = plane.T
        row += plane_rows(k, w, spec.vec)
    return out


def _stream(planes: Tensor, spec: Spec, k: int) -> Tensor:
    """The inverse of `_planes`."""
    width, count = spec.width, -(-k // spec.vec)
    if 32 % width == 0:
        return planes[: bits.words(count, width)].T.contiguous()
    codes = torch.zeros(planes.shape[1], count, dtype=torch.int32, device=planes.device)
    row = below = 0
    for w in widths(width):
        plane = planes[row : row + bits.words(count, w)].T.contiguous()
        codes |= bits.unpack(plane, w, count).int() << below
        below += w
        row += plane_rows(k, w, spec.vec)
    return bits.pack(codes, width)
