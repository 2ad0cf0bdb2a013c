# mypy: allow-untyped-defs
"""Hadamard transform of blocks of a power of two, a vector multiplied in before or after: transform.py on a device.

Every stage adds and subtracts neighbours and puts sums before differences, which is a rotation of the index's bits:
after log2(block) stages of the same code each bit has had its turn and is back in its place. float32 throughout, one
rounding to the output's dtype. Compiled for sm_60 to sm_120 a program of 128 threads makes two loads, seven to nine
barriers and takes 4 KB of shared memory (block 4096: eight loads, 16 KB).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cases import Case, Target, Weight
from .lang import EXACT, jit, tl

# Numbers a program holds.
_SIZE = 1024


@jit(do_not_specialize=["ROWS"])
def hadamard(
    x, vector, y, ROWS, K, BLOCKS, BLOCK: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """x [ROWS, K] -> y [ROWS, BLOCKS * BLOCK], inputs beyond K being 0. vector [BLOCKS * BLOCK] or None: multiplied in
    before the transform (FIRST) or after. BLOCK = 2**STAGES, TILE blocks a program. Grid (ceil(ROWS * BLOCKS / TILE),).
    """
    block = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    row = block // BLOCKS
    k = (block % BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < ROWS)[:, None]
    v = tl.load(x + row[:, None] * K + k, mask=inside & (k < K), other=0).to(tl.float32)
    if vector is not None and FIRST:
        v *= tl.load(vector + k, mask=inside, other=0).to(tl.float32)
    for _ in tl.static_range(STAGES):
        a, b = tl.split(v.reshape(TILE, BLOCK // 2, 2))
        v = tl.join(a + b, a - b).permute(0, 2, 1).reshape(TILE, BLOCK)
    v *= BLOCK**-0.5
    if vector is not None and not FIRST:
        v *= tl.load(vector + k, mask=inside, other=0).to(tl.float32)
    tl.store(y + row[:, None] * BLOCKS * BLOCK + k, v.to(y.dtype.element_ty), mask=inside)


def launch(x: Tensor, vector: Tensor | None, block: int, first: bool) -> Tensor:
    """transform.rotate by the kernel: x [M, K] contiguous -> [M, K padded to whole blocks]."""
    rows, k = x.shape
    blocks = -(-k // block)
    y = torch.empty(rows, blocks * block, dtype=x.dtype, device=x.device)
    if not rows:
        return y
    how = _constants(block, first)
    hadamard[(-(-rows * blocks // how["TILE"]),)](x, vector, y, rows, k, blocks, **how, **_OPTIONS)
    return y


_OPTIONS = {"num_warps": 4, **EXACT}


def _constants(block: int, first: bool) -> dict[str, int]:
    return {"BLOCK": block, "STAGES": block.bit_length() - 1, "TILE": max(1, _SIZE // block), "FIRST": first}


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """EXL3's block before and after the product, and the largest."""
    for block, first in ((128, True), (128, False), (4096, True)):
        pointers = dict.fromkeys(("x", "y"), f"*{target.dtype}") | {"vector": "*fp16"}
        name = f"had{block}" if first else f"outhad{block}"
        yield Case(
            "hadamard", 1, name, "transform", hadamard, pointers | dict.fromkeys(("ROWS", "K", "BLOCKS"), "i32"),
            _constants(block, first), _OPTIONS, target.dtype,
        )  # fmt: skip
