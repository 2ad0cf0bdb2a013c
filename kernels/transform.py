"""Steps around the product: y = post(pre(x) @ W.T), W being what is stored.

    pre   inscale    x * in_scale [K]                       AWQ's scale, the signs and sizes of EXL3 (suh), SmoothQuant
          perm       column j takes input perm[j]           GPTQ act-order
          had128     Hadamard transform of each 128 inputs  EXL3, QuaRot
    post  outhad128  the same of each 128 outputs
          outscale   y * out_scale [N]                      EXL3 (svh)

The transform is orthonormal and in natural (Sylvester) order: entry (i, j) is (-1)**popcount(i & j) / sqrt(block), so
it is its own inverse. x is padded with zeros to whole blocks, and outputs beyond N are dropped: vectors are as long as
the padded sizes. Each side is computed in float32 and rounded once to x's dtype. `fold` undoes the split: the weight
of the plain product.

On the CPU bfloat16 goes through the native library where there is one (cpp/rotate.h). Else a block of more than 64 is
two products, with the two factors of H(ab) = H(a) (x) H(b). Microseconds for
1 | 32 | 512 rows of 4096, one thread: block 128: 21 | 124 | 2443, against 16 | 197 | 4759 for one product with the
whole matrix and 101 | 1047 | 41485 for log2(block) sums and differences; block 4096: 23 | 222 | 6738, against
3652 | 21087 | 132192 and 145 | 1355 | 47019. On a GPU a kernel does the sums and differences, the vector and the
rounding in one pass (transform_device.py). Left out: transforms of sizes that are no powers of two.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import ops
from .paths import takes_triton
from .spec import Spec

# The parts of a QTensor that belong to steps, and to the rounding of the input (activation.py).
PARTS = ("in_scale", "perm", "out_scale", "act_step")
# Largest block multiplied by its whole matrix.
_WHOLE = 64
# Largest block of the device kernel: 4096 float32 are 32 registers of each of 128 threads.
KERNEL_BLOCK = 4096


def sides(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `parts` that are not the weight's, but of what is done around its product."""
    return {name: parts[name] for name in PARTS if name in parts}


@cache
def matrix(block: int, device: torch.device) -> Tensor:
    """float32 [block, block], symmetric and orthonormal."""
    found = torch.ones(1, 1, device=device)
    while found.shape[0] < block:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found * block**-0.5


def hadamard(x: Tensor, block: int) -> Tensor:
    """float32 [..., K] -> float32 [..., K], each `block` neighbours transformed; K a multiple of block, a power of
    two."""
    if block <= _WHOLE:
        return (x.reshape(-1, block) @ matrix(block, x.device)).view(x.shape)
    inner = 1 << (block.bit_length() // 2)
    rows = (x.reshape(-1, inner) @ matrix(inner, x.device)).view(-1, block // inner, inner)
    return (matrix(block // inner, x.device) @ rows).view(x.shape)


def apply_pre(spec: Spec, parts: Mapping[str, Tensor], x: Tensor, k: int) -> Tensor:
    """x [..., K] -> [..., k] in x's dtype: what meets the k stored columns (K and padding)."""
    vector = parts["in_scale"] if "inscale" in spec.pre else None
    # The transform pads to whole blocks by itself.
    if k != x.shape[-1] and ("perm" in spec.pre or spec.in_block == 1 or k - x.shape[-1] >= spec.in_block):
        x = pad(x, (0, k - x.shape[-1]))
    if "perm" in spec.pre:
        if vector is not None:
            x, vector = (x.float() * vector.float()).to(x.dtype), None
        x = x.index_select(-1, parts["perm"])
    if spec.in_block > 1:
        return _rotated(x, vector, spec.in_block, True)
    return x if vector is None else (x.float() * vector.float()).to(x.dtype)


def apply_post(spec: Spec, parts: Mapping[str, Tensor], y: Tensor, n: int) -> Tensor:
    """y [..., N padded to whole blocks], as the stored weight gives it -> [..., n] in y's dtype."""
    vector = parts["out_scale"] if "outscale" in spec.post else None
    if spec.out_block > 1:
        y = _rotated(y, vector, spec.out_block, False)
    elif vector is not None:
        y = (y.float() * vector.float()).to(y.dtype)
    return y[..., :n]


def fold(spec: Spec, parts: Mapping[str, Tensor], weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The stored weight [N, K] (padded) -> the one of the plain product x @ W.T, of `shape`.

    float32 where there is more to do than to sort columns.
    """
    n, k = shape
    if spec.in_block > 1:
        weight = hadamard(weight, spec.in_block)
    if "perm" in spec.pre:
        weight = weight[:, torch.argsort(parts["perm"])]
    if "inscale" in spec.pre:
        weight = weight.float() * parts["in_scale"].float()
    weight = weight[:, :k]
    if spec.out_block > 1:
        weight = hadamard(weight.T.contiguous(), spec.out_block).T
    if "outscale" in spec.post:
        weight = weight.float() * parts["out_scale"].float()[:, None]
    return weight[:n]


def _rotated(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    found: Tensor = rotate(x.reshape(-1, x.shape[-1]).contiguous(), vector, block, first)
    return found.view(*x.shape[:-1], found.shape[-1])


def _rotate(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    if block <= KERNEL_BLOCK and takes_triton(x):
        from .transform_device import launch

        return launch(x, vector, block, first)
    y = _rotate_fake(x, vector, block, first)
    if call := _rotate_call((y,), x, vector, block, first):
        call()
        return y
    return _rotate_plain(x, vector, block, first)


def _rotate_call(
    results: Sequence[Tensor], x: Tensor, vector: Tensor | None, block: int, first: bool
) -> ops.Call | None:
    # native_layer.py imports what imports this module.
    from . import native_layer

    return native_layer.rotate(results[0], x, vector, block, first) if native_layer.usable(x) else None


def _rotate_plain(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    found = pad(x.float(), (0, -x.shape[1] % block))
    if vector is not None and first:
        found = found * vector.float()
    found = hadamard(found, block)
    if vector is not None and not first:
        found = found * vector.float()
    return found.to(x.dtype)


def _rotate_fake(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // block) * block)


# x [M, K] contiguous -> [M, K padded to whole blocks] in x's dtype; the vector [K padded] is multiplied in before the
# transform (first) or after it.
rotate = ops.define(
    "hadamard(Tensor x, Tensor? vector, int block, bool first) -> Tensor",
    _rotate,
    _rotate_fake,
    _rotate_call,
)
