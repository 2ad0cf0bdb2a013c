"""Which product a quantized weight gets on this machine: `prepare` once at load, then call the result.

    exact=True or float32        Reference: dequantize in float32, multiply in x's dtype; the oracle of all others
    CUDA tensors                 kernels/cuda.py (Triton)
    CPU tensors                  kernels/cpu.py, in bfloat16

`BITSMITH_KERNELS=reference|triton|cpu` forces one of the three, whatever the dtype (`triton` on CPU tensors needs
TRITON_INTERPRET=1). A model loaded with exact=True stays exact.

What a product holds replaces the QTensor: it gives the very same one back (`qtensor`), so saving after a forward pass
equals saving before, and nothing is kept twice.
"""

import logging
import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from . import cpu
from .qtensor import QTensor
from .spec import ACTS

log = logging.getLogger(__name__)

PATHS = ("reference", "triton", "cpu")
# Weights dequantized at a time by the reference: 16 MB of float32.
_PIECE = 1 << 22


class Matmul(Protocol):
    """x [..., K], any float dtype and strides -> x @ W.T [..., N] in x's dtype. No bias."""

    @property
    def name(self) -> str:
        """Which path this is: reference, triton, int4pack, lookup, int8, or a8+one of them."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weights held."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def qtensor(self) -> QTensor:
        """The QTensor it was prepared from, bit for bit."""
        ...


class Core(Protocol):
    """A Matmul of x bfloat16 [M, K], contiguous, columns in packed order."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def qtensor(self) -> QTensor: ...


@dataclass(frozen=True)
class Reference:
    """Dequantizes at every call, a bounded piece at a time: float32 values rounded once to x's dtype, then F.linear."""

    q: QTensor
    name = "reference"

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return cpu.by_pieces(x, self.q, lambda piece: piece.dequantize(x.dtype), _PIECE)

    def qtensor(self) -> QTensor:
        return self.q


@dataclass(frozen=True)
class Shaped:
    """Makes a Matmul of a Core: any leading shape, strides and dtype; act-order permutation of the input."""

    core: Core
    # (out_features N, in_features K)
    shape: tuple[int, int]
    perm: Tensor | None

    @property
    def name(self) -> str:
        return self.core.name

    @property
    def nbytes(self) -> int:
        return self.core.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        n, k = self.shape
        rows = x.reshape(-1, k).to(torch.bfloat16)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], n)
        rows = rows.contiguous() if self.perm is None else rows.index_select(1, self.perm)
        return self.core(rows).to(x.dtype).view(*x.shape[:-1], n)

    def qtensor(self) -> QTensor:
        return self.core.qtensor()


@dataclass(frozen=True)
class RoundedInput:
    """int8 activations by arithmetic: each token is rounded to its 255 steps, then any Matmul follows."""

    inner: Matmul

    @property
    def name(self) -> str:
        return f"a8+{self.inner.name}"

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        step = cpu.activation_step(wide)
        return self.inner(((wide / step).round_() * step).to(x.dtype))

    def qtensor(self) -> QTensor:
        return self.inner.qtensor()


def prepare(q: QTensor, dtype: torch.dtype, *, exact: bool = False, act: str = "") -> Matmul:
    """The product of `q` for inputs of `dtype`. The caller drops `q`.

    exact: dequantized values exactly, whatever it costs. act: "" or "a8" (int8 activations per token, W8A8), in
    addition to what the spec asks for. Raises UserError for an unknown `act`, an unknown BITSMITH_KERNELS, or one
    that this tensor's device rules out.
    """
    act = act or q.spec.act
    if act not in ACTS:
        raise UserError(f"activation quantization is {act!r}; accepted: a8 (int8 per token), or leave it out")
    path = "reference" if exact else _path(q, dtype)
    if path == "cpu" and act and (found := cpu.int8_linear(q)):
        return _shaped(found, q)
    if path == "cpu":
        product: Matmul = _shaped(cpu.prepare(q), q)
    elif path == "triton":
        product = _triton(q, dtype)
    else:
        product = Reference(q)
    return RoundedInput(product) if act else product


def _path(q: QTensor, dtype: torch.dtype) -> str:
    device = q.parts["codes"].device.type
    forced = os.environ.get("BITSMITH_KERNELS", "")
    if not forced:
        return "reference" if dtype is torch.float32 else "triton" if device == "cuda" else "cpu"
    if forced not in PATHS:
        raise UserError(
            f"BITSMITH_KERNELS is {forced!r}; accepted: {', '.join(PATHS)}, or unset to choose by device and dtype"
        )
    if forced == "cpu" and device != "cpu":
        raise UserError(
            f"BITSMITH_KERNELS is 'cpu' but the weights are on {device}; load with device='cpu' or unset it"
        )
    return forced


def _shaped(core: Core, q: QTensor) -> Shaped:
    perm = q.parts["perm"] if "perm" in q.spec.pre else None
    return Shaped(core, q.shape, perm)


def _triton(q: QTensor, dtype: torch.dtype) -> Matmul:
    from . import cuda, repack

    problem = repack.supported(q)
    if problem:
        log.warning("%s; dequantizing at every call instead", problem)
        return Reference(q)
    return cuda.CudaMatmul(q, dtype)
