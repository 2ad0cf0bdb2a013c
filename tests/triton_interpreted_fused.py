"""RMS norm, rotary embedding and gated activation against their torch twins, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is.
"""

from typing import Any

import pytest
import torch
from bitsmith.kernels import fused
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One rounding to the dtype; the sums behind it are taken in another order.
CLOSE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        return real(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)


def before_nan(t: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1), torch.full((64,), float("nan"), dtype=t.dtype)])[: t.numel()].view(t.shape)


def same(found: Tensor, wanted: Tensor, roundings: int = 1) -> None:
    """The interpreter cuts float32 to bfloat16 instead of rounding it, so each rounding is up to a step off there."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    close = CLOSE[wanted.dtype] * roundings
    torch.testing.assert_close(found, wanted, rtol=close, atol=close / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", fused.FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 5, 128)])
def test_norm(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    x, weight = before_nan((torch.randn(shape) * 3).to(dtype)), before_nan(torch.randn(shape[-1]).to(dtype))
    roundings = 2 if form == "llama" and dtype is torch.bfloat16 else 1
    same(fused.rms_norm(x, weight, 1e-5, form), fused.norm_twin(x, weight, 1e-5, form), roundings)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 4:12].unflatten(-1, (1, 8)),
        lambda x: x.unflatten(-1, (3, 8))[:, :, 1:],
        lambda x: x.transpose(0, 1)[..., :24],
        lambda x: x[..., ::3],
        lambda x: x[:0],
    ],
)
def test_norm_of_a_view(view: Any) -> None:
    """A slice of a merged product, heads of one, transposed, strided, empty."""
    x = view(torch.randn(4, 6, 24))
    weight = torch.randn(x.shape[-1])
    same(fused.rms_norm(x, weight, 1e-5, "llama"), fused.norm_twin(x, weight, 1e-5, "llama"))


def test_a_small_row_sees_its_epsilon() -> None:
    x = torch.full((1, 16), 1e-4)
    assert fused.rms_norm(x, torch.ones(16), 1e-5, "llama").max() < 0.04


def angles(tokens: int, r: int, interleaved: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, r // 2)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return before_nan(angle.cos().to(dtype)), before_nan(angle.sin().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("hq", "hk", "d", "r"), [(1, 1, 2, 2), (5, 2, 24, 24), (4, 4, 20, 12), (9, 1, 64, 64)])
def test_rope(hq: int, hk: int, d: int, r: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = before_nan(torch.randn(3, hq, d).to(dtype)), before_nan(torch.randn(3, hk, d).to(dtype))
    turns = angles(3, r, interleaved, dtype)
    for found, wanted in zip(
        fused.rope(q, k, *turns, interleaved), fused.rope_twin(q, k, *turns, interleaved), strict=True
    ):
        same(found, wanted)


def test_rope_of_slices_of_one_product() -> None:
    merged = torch.randn(4, 7 * 16)
    q, k = merged[:, :64].view(4, 4, 16), merged[:, 64:96].view(4, 2, 16)
    turns = angles(4, 16, False, torch.float32)
    for found, wanted in zip(fused.rope(q, k, *turns, False), fused.rope_twin(q, k, *turns, False), strict=True):
        same(found, wanted)
    assert fused.rope(q[:0], k[:0], *(t[:0] for t in turns), False)[0].shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", fused.ACTS)
@pytest.mark.parametrize("width", [1, 37, 1030])
def test_gated(width: int, act: str, dtype: torch.dtype) -> None:
    gate, up = before_nan((torch.randn(3, width) * 4).to(dtype)), before_nan(torch.randn(3, width).to(dtype))
    same(fused.gated(gate, up, act), fused.gated_twin(gate, up, act))


def test_gated_halves_of_one_product_and_large_numbers() -> None:
    merged = torch.randn(2, 3, 40)
    merged[0, 0, :4] = torch.tensor([-1e4, 1e4, -1e30, 0.0])
    gate, up = merged.split([20, 20], -1)
    for act in fused.ACTS:
        same(fused.gated(gate, up, act), fused.gated_twin(gate, up, act))
    assert fused.gated(gate[:0], up[:0], "silu").shape == (0, 3, 20)
