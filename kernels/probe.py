"""Which private torch operators work here: each is run once per process on a small random problem against plain
arithmetic.

These operators are not public API: they may vanish, change their arguments or be missing from a build. A probe that
does not get the right answer says so once, naming the operator and the torch version, and the caller takes the
generic path.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)

# What a missing operator, a changed signature and an unsupported build raise.
_FAILURES = (AttributeError, RuntimeError, TypeError)
# Of a bfloat16 result: its own rounding is 1.7e-3 relative.
TOLERANCE = 8e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float32."""
    return float((got.float() - want.float()).norm() / want.float().norm())


@dataclass(frozen=True)
class Int4Layout:
    """Where `_convert_weight_to_int4pack_for_cpu` puts codes: blocks of `block` rows, each [K, block / 2] bytes.

    In a block, byte d holds row d low and row d + block / 2 high (`split`), or rows 2d and 2d + 1. Rows left over at
    the end form one smaller block of the second kind.
    """

    block: int
    split: bool

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        """Packed bytes, any shape -> uint8 codes [n, k]."""
        flat = packed.reshape(-1)
        whole = n // self.block * self.block
        pieces = [_rows(flat[: whole * k // 2].view(-1, k, self.block // 2), self.split)] if whole else []
        if whole < n:
            pieces.append(_rows(flat[whole * k // 2 :].view(1, k, -1), False))
        return torch.cat(pieces)


def _rows(blocks: Tensor, split: bool) -> Tensor:
    low, high = blocks & 15, blocks >> 4
    wide = torch.cat([low, high], 2) if split else torch.stack([low, high], 3).flatten(2)
    return wide.transpose(1, 2).flatten(0, 1)


# AVX-512, AVX2 and plain C++ of torch 2.11 to 2.13.
LAYOUTS = (Int4Layout(64, True), Int4Layout(32, True), Int4Layout(32, False))


@cache
def int4pack() -> Int4Layout | None:
    """The layout of the 4-bit operator, or None where it cannot be used."""

    def run() -> Int4Layout | None:
        generator = torch.Generator().manual_seed(0)
        n, k, group = 112, 128, 32
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
        scale = torch.rand(k // group, n, 2, generator=generator).to(torch.bfloat16)
        x = torch.randn(3, k, generator=generator).to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale)
        by_group = scale.float().permute(1, 0, 2).repeat_interleave(group, 1)
        want = x.float() @ ((codes - 8) * by_group[..., 0] + by_group[..., 1]).T
        if relative_error(y, want) > TOLERANCE or packed.numel() != n * k // 2:
            return None
        return next(
            (layout for layout in LAYOUTS if torch.equal(layout.unpack(packed, n, k), codes.to(torch.uint8))), None
        )

    return _attempt("aten._weight_int4pack_mm_for_cpu", run)


@cache
def int8_linear() -> bool:
    """Whether `onednn.qlinear_pointwise` multiplies uint8 by int8 without saturating and its packed weight reads
    back."""

    def run() -> bool | None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-128, 128, (48, 96), dtype=torch.int8, generator=generator)
        x = torch.randint(0, 256, (3, 96), dtype=torch.uint8, generator=generator)
        # Pairs of extreme products overflow 16 bits: wrong where vpmaddubsw stands in for VNNI.
        weight[0], x[0] = 127, 255
        scale = torch.rand(48, generator=generator)
        packed = torch.ops.onednn.qlinear_prepack(weight, [1, 96])
        y = int8_product(x, packed, scale)
        want = (x.float() - 128) @ weight.float().T * scale
        return True if relative_error(y, want) < 1e-5 and torch.equal(packed.to_dense().T, weight) else None

    return _attempt("onednn.qlinear_pointwise", run) is not None


def int8_product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """(x - 128) @ weight.T * scale: x uint8 [M, K], weight int8 [N, K] prepacked, scale float32 [N] -> float32 [M,
    N]."""
    zero = torch.zeros(scale.numel(), dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@cache
def dense_linear() -> bool:
    """Whether bfloat16 weights can be stored in oneDNN's blocked order, multiplied so, and read back."""

    def run() -> bool | None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 96, generator=generator).to(torch.bfloat16)
        x = torch.randn(3, 96, generator=generator).to(torch.bfloat16)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        exact = torch.equal(packed.to_dense(), weight)
        return True if relative_error(y, x.float() @ weight.float().T) < TOLERANCE and exact else None

    return _attempt("mkldnn._linear_pointwise", run) is not None


def _attempt(operator: str, run: Callable[[], T | None]) -> T | None:
    try:
        found = run()
    except _FAILURES as error:
        found, problem = None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        problem = "wrong result on a test problem"
    if found is None:
        log.warning(
            "torch %s: torch.ops.%s is not usable here (%s); taking the slower path",
            torch.__version__,
            operator,
            problem,
        )
    return found
