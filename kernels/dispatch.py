"""Which product a quantized weight gets on this machine: `prepare` once at load, then call the result.

    exact=True or float32        Reference: dequantize in float32, multiply in x's dtype; the oracle of all others
    CUDA tensors                 kernels/cuda.py (Triton)
    CPU tensors                  kernels/cpu.py, in bfloat16

`BITSMITH_KERNELS=reference|triton|cpu` (paths.py) forces one of the three, whatever the dtype. A model loaded with
exact=True stays exact, and its activations are never rounded: a spec that ends in `.a8` or `.a4` then means its weights
alone. To see what its activations cost, load it in float32 without exact=True.

What a product holds replaces the QTensor: it gives the very same one back (`qtensor`), so saving after a forward pass
equals saving before, and nothing is kept twice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from . import activation, cpu, int8_copy
from .paths import forced
from .qtensor import QTensor, core, core_shape, with_steps
from .spec import ACTS, Spec
from .transform import apply_post, apply_pre, sides

log = logging.getLogger(__name__)

# Weights dequantized at a time by the reference: 16 MB of float32.
_PIECE = 1 << 22


class Matmul(Protocol):
    """x [..., K], any float dtype and strides -> x @ W.T [..., N] in x's dtype. No bias."""

    @property
    def name(self) -> str:
        """Which path this is: reference, triton, native, native-a8, int4pack, lookup, int8; a8+ or a4+one of them, and
        one of them+int8 with a copy beside the weight (int8_copy.py)."""
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
    """Makes a Matmul of a Core: any leading shape, strides and dtype; the steps around the product."""

    core: Core
    spec: Spec
    # (out_features N, in_features K)
    shape: tuple[int, int]
    # in_scale, perm, out_scale
    sides: Mapping[str, Tensor]
    # Whether there are steps or padding: asking the spec at every call would cost five microseconds.
    stepped: bool

    @property
    def name(self) -> str:
        return self.core.name

    @property
    def nbytes(self) -> int:
        return self.core.nbytes + sum(t.nbytes for t in self.sides.values())

    def __call__(self, x: Tensor) -> Tensor:
        n, k = self.shape
        rows = x.reshape(-1, k).to(torch.bfloat16)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], n)
        if self.stepped:
            rows = apply_pre(self.spec, self.sides, rows, core_shape(self.spec, self.shape)[1])
        y = self.core(rows.contiguous())
        if self.stepped:
            y = apply_post(self.spec, self.sides, y, n)
        return y.to(x.dtype).reshape(*x.shape[:-1], n)

    def qtensor(self) -> QTensor:
        return with_steps(self.core.qtensor(), self.spec, self.shape, self.sides)


@dataclass(frozen=True)
class RoundedInput:
    """Activations of fewer bits by arithmetic: each token is rounded to what activation.py says goes with the weight,
    then any Matmul follows."""

    inner: Matmul
    # Of the weight, with the activations asked for.
    spec: Spec
    step: Tensor | None

    @property
    def name(self) -> str:
        return f"{self.spec.act}+{self.inner.name}"

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(activation.rounded(x, self.spec, self.step))

    def qtensor(self) -> QTensor:
        return self.inner.qtensor()


def prepare(q: QTensor, dtype: torch.dtype, *, exact: bool = False, act: str = "", copy: bool = False) -> Matmul:
    """The product of `q` for inputs of `dtype`. The caller drops `q`.

    exact: dequantized values exactly, whatever it costs, and activations as they are. act: what the spec asks for (""),
    or instead "a8" (activations in 8 bits, activation.py), or "a4", which only weights that `takes_a4` follow. copy: a
    copy in int8 beside the weight (int8_copy.py, whose `check` says whether it has a use). Raises UserError for what
    `check_act` refuses, an unknown BITSMITH_KERNELS, or one that this tensor's device rules out.
    """
    check_act(act, exact)
    spec = replace(q.spec, act="" if exact else _asked(q.spec, act))
    path = "reference" if exact else _path(q, dtype)
    inner = core(q)
    product: Matmul
    if path == "cpu" and spec.act and (found := cpu.int8_linear(inner)):
        return _shaped(found, q)
    if path == "cpu":
        product = _shaped(int8_copy.beside(cpu.prepare(inner), inner) if copy else cpu.prepare(inner), q)
    elif path == "triton" and spec.act and (native := _native(q, spec, dtype)):
        return native
    elif path == "triton":
        product = _triton(q, dtype)
    else:
        product = Reference(q.read())
    return RoundedInput(product, spec, q.parts.get("act_step")) if spec.act else product


def check_act(act: str, exact: bool) -> None:
    """UserError for an activation quantization that is unknown, or asked for beside `exact`."""
    if act not in ACTS:
        raise UserError(
            f"activation quantization is {act!r}; accepted: a8 (8 bits per token), a4 (FP4, where weights are NVFP4), "
            "or leave it out"
        )
    if exact and act:
        raise UserError(
            f"exact=True never rounds activations and act={act!r} asks for {act.removeprefix('a')} bits of them; "
            "leave one of the two out"
        )


def _asked(spec: Spec, act: str) -> str:
    if act == "a4" and not spec.takes_a4:
        log.info("%s: a4 activations go with NVFP4 weights only; left as the spec says", spec)
        return spec.act
    return act or spec.act


def _path(q: QTensor, dtype: torch.dtype) -> str:
    device = q.device.type
    path = forced()
    if not path:
        return "reference" if dtype is torch.float32 else "triton" if device == "cuda" else "cpu"
    if path == "cpu" and device != "cpu":
        raise UserError(
            f"BITSMITH_KERNELS is 'cpu' but the weights are on {device}; load with device='cpu' or unset it"
        )
    return path


def _shaped(product: Core, q: QTensor) -> Shaped:
    stepped = bool(q.spec.pre or q.spec.post) or core_shape(q.spec, q.shape) != q.shape
    return Shaped(product, q.spec, q.shape, sides(q.parts), stepped)


def _native(q: QTensor, spec: Spec, dtype: torch.dtype) -> Matmul | None:
    """The product in 8- or 4-bit tensor cores, or None where the GPU or the layout has none; spec: with the activations
    asked for."""
    from . import cuda, scaled

    capability = cuda.capability_of(q.parts["codes"].device)
    if problem := scaled.problem(spec, q.shape[1], capability):
        log.info("%s: %s; activations are rounded and weights decoded", q.spec, problem)
        return None
    return scaled.prepare(q, cuda.compute_dtype(dtype, capability), spec.act)


def _triton(q: QTensor, dtype: torch.dtype) -> Matmul:
    from . import cuda, repack

    problem = repack.supported(q)
    if problem:
        log.warning("%s; dequantizing at every call instead", problem)
        return Reference(q)
    return cuda.CudaMatmul(q, dtype)
