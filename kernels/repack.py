"""QTensor <-> the layout of the device templates (tiles.py): bit planes [words, N] along K, scales [G, R'].

Done once per tensor at load, on the tensor's device; `unpack` is the exact inverse, so saving never depends on a
device. Bytes stay what they were, but for K padded to a multiple of 32. Nothing is expanded: a scale shared by 128
rows is stored once.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from . import bits
from .families import family
from .lang import HAVE_TRITON, INSTALL
from .qtensor import QTensor
from .spec import Spec
from .tiles import Parts, widths

_METADATA = ("scales", "zeros")


@dataclass(frozen=True)
class Packed:
    """A weight in the device layout. Made by `pack`."""

    # Of the tensor it was made from, and that spec with `view`, `pre` and `act` cleared: what the kernels are
    # compiled for.
    original: Spec
    spec: Spec
    # (out_features N, in_features K)
    shape: tuple[int, int]
    parts: Parts
    # int32 [K] or None: input feature of packed column j.
    perm: Tensor | None


def supported(q: QTensor) -> str:
    """Why the device templates cannot take `q` here (the caller then dequantizes with the torch twin), or ""."""
    return layout_problem(q) or _machine_problem(q)


def layout_problem(q: QTensor) -> str:
    """Why the device layout cannot hold `q`, or ""."""
    spec = q.spec
    if find_spec(f".{spec.family}_device", __package__) is None:
        return f"{spec}: no device code for the {spec.family} family yet"
    if spec.act:
        return f"{spec}: activations are quantized too, which needs the native low-precision dot"
    if spec.view == "axis0":
        return f"{spec}: groups along axis 0 give each input its own scale, so a tile has as many scales as weights"
    if spec.view == "flat" and (q.shape[1] % spec.group or spec.group * spec.bits % 32):
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
    spec = replace(q.spec, view="", pre=())
    n, k = q.shape
    parts = dict(q.parts)
    perm = parts.pop("perm", None)
    for name in _METADATA:
        if name in parts:
            # A flat view of whole groups is the plain one: row r of [N * K / group, 1] is group r % G of output r // G.
            found = parts[name].reshape(n, -1) if q.spec.view == "flat" else parts[name]
            parts[name] = found.T.contiguous()
    parts["codes"] = _planes(parts["codes"].reshape(n, -1), spec.bits, k)
    return Packed(q.spec, spec, q.shape, Parts(**parts), perm)


def unpack(packed: Packed) -> QTensor:
    """The QTensor `packed` was made from, part for part (but for `extra`, which no device reads)."""
    parts = {name: t for name, t in packed.parts._asdict().items() if t is not None}
    for name in _METADATA:
        if name in parts:
            parts[name] = parts[name].T.contiguous()
    parts["codes"] = _stream(parts["codes"], packed.spec.bits, packed.shape[1])
    if packed.original.view == "flat":
        rows = packed.shape[0] * packed.shape[1] // packed.original.group
        parts = {name: t.reshape(rows, -1) if name in ("codes", *_METADATA) else t for name, t in parts.items()}
    if packed.perm is not None:
        parts["perm"] = packed.perm
    return QTensor(packed.original, packed.shape, parts)


def _planes(stream: Tensor, width: int, k: int) -> Tensor:
    """int32 [N, words(K)] bit stream -> int32 [width * ceil(K / 32), N] planes."""
    if 32 % width == 0:
        planes = [(stream, width)]
    else:
        codes, planes, below = bits.unpack(stream, width, k), [], 0
        for w in widths(width):
            planes.append((bits.pack((codes >> below) & ((1 << w) - 1), w), w))
            below += w
    out = torch.zeros(width * -(-k // 32), stream.shape[0], dtype=torch.int32, device=stream.device)
    row = 0
    for plane, w in planes:
        out[row : row + plane.shape[1]] = plane.T
        row += w * -(-k // 32)
    return out


def _stream(planes: Tensor, width: int, k: int) -> Tensor:
    """The inverse of `_planes`."""
    if 32 % width == 0:
        return planes[: bits.words(k, width)].T.contiguous()
    codes = torch.zeros(planes.shape[1], k, dtype=torch.uint8, device=planes.device)
    row = below = 0
    for w in widths(width):
        plane = planes[row : row + bits.words(k, w)].T.contiguous()
        codes |= bits.unpack(plane, w, k) << below
        below += w
        row += w * -(-k // 32)
    return bits.pack(codes, width)
