"""FP4 activations (`a4`): their rule number by number, and the products of weights that ask for them."""

from dataclasses import replace

import pytest
import torch
from bitsmith.kernels import activation, bits, native, probe
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.minifloat import E2M1
from bitsmith.kernels.qtensor import QTensor, can_concat, concat
from bitsmith.kernels.spec import Spec
from torch import Tensor

SPEC = Spec.parse("minifloat4.e2m1.g16.ue4m3.a4")
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def random_qtensor(shape: tuple[int, int] = (48, 160), step: float | None = None) -> QTensor:
    parts = {
        "codes": bits.pack(torch.randint(0, 16, shape, dtype=torch.uint8), 4),
        "scales": torch.randint(1, 64, (shape[0], shape[1] // 16), dtype=torch.uint8),
        "global_scale": torch.tensor(0.37),
    }
    if step is not None:
        parts["act_step"] = torch.tensor(step)
    return QTensor(SPEC, shape, parts)


@pytest.mark.parametrize("step", [None, 3e-4, 0.01])
@pytest.mark.parametrize("k", [1, 16, 75])
def test_numbers_are_the_nearest_there_are(k: int, step: float | None) -> None:
    """Searched among all scales and codes, in float64; the steps of all tokens saturate the largest."""
    x = torch.randn(5, k) * torch.tensor([1.0, 0.0, 1e-5, 200.0, 0.3])[:, None]
    given = None if step is None else torch.tensor(step)
    found = activation.rounded(x, SPEC, given)
    for row, values in zip(x.double(), found.double(), strict=True):
        own = max(row.abs().max().item(), activation.FLOOR) / (6 * 448) if given is None else given.item()
        for first in range(0, k, 16):
            group = row[first : first + 16]
            scale = nearest(E4M3, group.abs().max() / 6 / own)
            numbers = torch.tensor([sign * v for v in E2M1 for sign in (1.0, -1.0)], dtype=torch.float64)
            wanted = torch.stack([nearest(numbers * scale * own, v) for v in group])
            torch.testing.assert_close(values[first : first + 16], wanted, rtol=1e-6, atol=0)


def nearest(among: Tensor, v: Tensor) -> Tensor:
    return among[(among - v).abs().argmin()]


def test_groups_too_small_for_a_scale_are_zeros() -> None:
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-20
    codes, scales, steps = activation.quantize_fp4(x, None)
    assert codes[0, :16].eq(7).all() and not codes[0, 16:].any()
    assert scales.float().tolist() == [[448.0, 0.0]] and steps.item() == pytest.approx(1 / 2688)
    assert torch.equal(activation.rounded(x, SPEC)[0], torch.cat([torch.ones(16), torch.zeros(16)]))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("step", [None, 0.002])
def test_products_of_a_cpu_are_of_rounded_activations(
    step: float | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    q = random_qtensor(step=step)
    x = torch.randn(9, 160).bfloat16().float()
    rounded = activation.rounded(x, SPEC, q.parts.get("act_step"))
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)):
        product = prepare(q, dtype)
        assert product.name.startswith("a4+") and (compiled or product.name in ("a4+reference", "a4+lookup"))
        # In bfloat16 a native product rounds them once more, to int8.
        assert probe.relative_error(product(x.to(dtype)).float(), rounded @ q.dequantize().T) < bound
        assert probe.relative_error(product(x.to(dtype)).float(), x @ q.dequantize().T) > 0.05
        back = product.qtensor()
        assert back.spec == q.spec and all(torch.equal(back.parts[name], part) for name, part in q.parts.items())
        assert back.parts.keys() == q.parts.keys()


def test_exact_products_round_nothing() -> None:
    q, x = random_qtensor(step=0.002), torch.randn(3, 160)
    exact = prepare(q, torch.float32, exact=True)
    assert exact.name == "reference" and torch.equal(exact(x), x @ q.dequantize().T)
    assert exact.qtensor() is q


def test_asking_for_fp4_is_for_weights_that_take_it(caplog: pytest.LogCaptureFixture) -> None:
    """Layers of other weights, as most NVFP4 models have, are multiplied as their own spec says."""
    q = random_qtensor()
    plain = replace(q, spec=replace(SPEC, act=""))
    x = torch.randn(3, 160)
    asked = prepare(plain, torch.float32, act="a4")
    assert asked.name == "a4+reference" and torch.equal(asked(x), prepare(q, torch.float32)(x))
    assert asked.qtensor().spec == plain.spec
    assert prepare(q, torch.float32, act="a8").name == "a8+reference", "what is asked for stands above the spec"
    other = Spec.parse("affine8.channel.sym")
    parts = {
        "codes": bits.pack(torch.randint(0, 256, (8, 32), dtype=torch.uint8), 8),
        "scales": torch.ones(8, 1).half(),
    }
    with caplog.at_level("INFO"):
        assert prepare(QTensor(other, (8, 32), parts), torch.float32, act="a4").name == "reference"
        own = QTensor(replace(other, act="a8"), (8, 32), parts)
        assert prepare(own, torch.float32, act="a4").name == "a8+reference"
    assert "affine8.channel.sym: a4 activations go with NVFP4 weights only; left as the spec says" in caplog.text


def test_cut_and_stacked_weights_keep_the_step() -> None:
    """Siblings whose steps differ stay apart: their inputs are rounded differently."""
    q = random_qtensor(step=0.002)
    for cut in (q.rows(3, 9), q.shard(0, 1, 2), q.shard(1, 1, 2)):
        assert torch.equal(cut.parts["act_step"], q.parts["act_step"])
    both = concat([q, random_qtensor((7, 160), step=0.002)])
    assert both.shape == (55, 160) and both.parts["act_step"].item() == pytest.approx(0.002)
    assert not can_concat([q, random_qtensor(step=0.003)]) and not can_concat([q, random_qtensor()])
