"""Fast products on the CPU with what torch already has. All run in bfloat16 (a float16 model too: 16-bit floats have
no other fast CPU path).

    weight                                   few rows                  many rows
    groups of whole blocks of 32 inputs,
      with the native library                native.py                 native.py
    scales of two levels, integers times a
      float for 256 inputs, with it; NVFP4
      and MXFP4 with AVX2 or AVX-512         native_two_level.py       native_two_level.py
    the same, codes of a grid                native_grids.py           native_grids.py
    affine 4 and 8 bits, whole groups        int4pack.py               int4pack.py
    affine 8 bits, one symmetric scale
      a row, int8 activations asked for      Int8Linear                Int8Linear
    everything else                          LookUp (kernels/lut.py)   LookUp
    not quantized                            DenseMatmul               DenseMatmul

Classes here take x bfloat16 [M, K], contiguous and already in packed column order; kernels/dispatch.py sees to that.
Left out, all measured slower here: `_weight_int8pack_mm` (1.5 ms at one row of 2048 x 5632, 22 ms at 64, against 1.2
and 12 for two 4-bit planes), `_dyn_quant_matmul_4bit`, `_scaled_mm` on float8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import bits, int4pack, lut, native, native_float, native_grids, native_two_level, probe
from .families import scales
from .pieces import pieces
from .qtensor import QTensor, codes_of

# Weights decoded at a time: 2 MB of bfloat16 stay in a core's second-level cache (half and double of it measured no
# faster).
_PIECE = 1 << 20
_ACT_FLOOR = 1e-12


def by_pieces(x: Tensor, q: QTensor, decode: Callable[[QTensor], Tensor], elements: int) -> Tensor:
    """x [..., K] @ W.T, decoding about `elements` weights at a time."""
    out = []
    for _, _, piece in pieces(q, elements):
        out.append(linear(x, decode(piece)))
    return out[0] if len(out) == 1 else torch.cat(out, -1)


@dataclass(frozen=True)
class LookUp:
    """Keeps the QTensor as it is and decodes it piece by piece at every call."""

    q: QTensor
    name = "lookup"

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        decode = lut.decode if lut.supports(self.q.spec) else _reference
        return by_pieces(x, self.q, decode, _PIECE)

    def qtensor(self) -> QTensor:
        return self.q


def _reference(q: QTensor) -> Tensor:
    return q.dequantize(torch.bfloat16)


@dataclass(frozen=True)
class Int8Linear:
    """W8A8: activations rounded to int8 per token, exact int32 products, oneDNN's uint8 x int8 (VNNI, AMX) kernels.

    int8 activations would be the natural choice, but that form of the operator runs a reference loop (500 times
    slower), hence the 128 added and taken off again.
    """

    name = "int8"
    # The tensor it was made from, without its codes.
    q: QTensor
    # int8 [K, N], an opaque oneDNN tensor; float32 [N].
    packed: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.packed.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        step = activation_step(x)
        quantized = (x / step).round_().add_(128).to(torch.uint8)
        return probe.int8_product(quantized, self.packed, self.scale).mul_(step).to(torch.bfloat16)

    def qtensor(self) -> QTensor:
        codes = (self.packed.to_dense().T.int() + 128).to(torch.uint8)
        parts: Mapping[str, Tensor] = {"codes": bits.pack(codes, 8), **self.q.parts}
        return QTensor(self.q.spec, self.q.shape, parts, self.q.extra)


def activation_step(x: Tensor) -> Tensor:
    """float [..., 1]: the int8 step of each token, largest magnitude over 127."""
    return x.abs().amax(-1, keepdim=True).div_(127).clamp_(min=_ACT_FLOOR)


def int8_linear(q: QTensor) -> Int8Linear | None:
    """W8A8 of `q`, or None where it is not 8 bits with one symmetric scale a row, or the operator is missing."""
    spec = q.spec
    whole = spec.group in (-1, q.shape[1]) and spec.rows == 1 and not spec.view
    if spec.family != "affine" or spec.bits != 8 or spec.zero != "sym" or not whole or not probe.int8_linear():
        return None
    weight = (codes_of(q).int() - 128).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [1, q.shape[1]])
    rest = {name: t for name, t in q.parts.items() if name != "codes"}
    return Int8Linear(QTensor(spec, q.shape, rest, q.extra), packed, scales(spec, q.parts).flatten())


@dataclass(frozen=True)
class DenseMatmul:
    """An unquantized weight. On the CPU in bfloat16 it is held in oneDNN's blocked order (the caller's copy can be
    dropped), which
    saves the reordering F.linear does at every call."""

    # "onednn" (stored is an opaque tensor) or "linear"
    name: str
    stored: Tensor

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if self.name == "linear":
            return linear(x.to(self.stored.dtype), self.stored).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.stored, None, "none", [], "")
        return y.to(x.dtype).view(*x.shape[:-1], self.stored.shape[0])

    def weight(self) -> Tensor:
        """The weight [N, K] as it was given, bit for bit."""
        return self.stored.to_dense() if self.name == "onednn" else self.stored


def prepare_dense(weight: Tensor) -> DenseMatmul:
    """weight [N, K] of a linear layer without bias -> its product. Only bfloat16 on the CPU is rearranged."""
    if weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and probe.dense_linear():
        return DenseMatmul("onednn", torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64))
    return DenseMatmul("linear", weight)


Native = native.NativeLinear | native_two_level.TwoLevelLinear | native_grids.GridLinear | native_float.FloatLinear


def prepare(q: QTensor) -> Native | int4pack.Int4Pack | LookUp:
    """The fastest product of `q`."""
    for each in (native_two_level, native_grids, native, native_float):
        if each.supports(q):
            found: Native = each.pack(q)
            return found
    return int4pack.pack(q) or LookUp(q.read())
