"""Every template on every form of weight, at the sizes and strides where masks go wrong, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is. The other files go through each family's variants; here one weight of
each way to decode meets every template: 1 x 1 and sizes that are a multiple of nothing, x transposed.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bitsmith.kernels import activation, cuda, grouped, scaled
from bitsmith.kernels.cuda import CudaMatmul
from bitsmith.kernels.families import scale_shape
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.spec import Spec
from torch import Tensor

from . import triton_interpreted_families as families
from . import triton_interpreted_ops as ops
from . import triton_interpreted_scaled as natives

helpers = families.helpers
_poison = families._poison


def with_mins(text: str, shape: tuple[int, int]) -> QTensor:
    q = helpers.random_qtensor(text, shape)
    mins = helpers.random_scales(q.spec, scale_shape(q.spec, shape))
    return replace(q, parts={**q.parts, "mins": mins["scales"], "super_mins": mins["super_scales"]})


def with_e4m3_scales(text: str, shape: tuple[int, int]) -> QTensor:
    q = helpers.random_qtensor(text.replace("ue4m3", "f16"), shape)
    stored = q.parts["scales"].to(torch.float8_e4m3fn).view(torch.uint8)
    return replace(q, spec=Spec.parse(text), parts={**q.parts, "scales": stored})


FORMS: dict[str, Callable[[str, tuple[int, int]], QTensor]] = {
    "affine3.g32.asym": helpers.random_qtensor,
    "affine4.g20.zf16": helpers.random_qtensor,
    "affine4.g32.min.u6:f16:1": with_mins,
    "minifloat8.e4m3.g128x128.f32": helpers.random_qtensor,
    "minifloat4.e2m1.g32.e8m0": helpers.random_qtensor,
    "minifloat4.e2m1.g16.ue4m3": with_e4m3_scales,
    "codebook4.nf4.g64.u8:f32:256": helpers.random_qtensor,
    "codebook4.rowtable.channel": families.codebooks.random_codebook,
    "codebook8.v4.x2.channel": families.codebooks.random_codebook,
    "codebook15.iq2xxs.v8.g32": lambda text, shape: families.random_grid("iq2xxs", shape, "f16"),
    "trellis3.mcg": families.trellises.random_trellis,
}
# And rows: tiles of 128, 32, 64 and 64 inputs. Which GPU launches which is another matter (cuda.plan).
TEMPLATES = (("gemv", 1), ("gemv", 8), ("gemm", 17), ("dequant", 65))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """`relative_rms`, also where all is 0."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= helpers.TOLERANCE[found.dtype] * wanted.norm()


def transposed(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(k, rows).to(dtype).T


@pytest.mark.parametrize(("shape", "dtype"), [((1, 1), torch.float32), ((39, 172), torch.float16)])
@pytest.mark.parametrize("text", FORMS)
def test_decode_and_products(
    text: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of one number is compared in float32: in float16 its one rounding may be all of the tolerance."""
    q = FORMS[text](text, shape)
    families.check_decode(q)
    product = helpers.poisoned(CudaMatmul(q, dtype))
    for template, rows in TEMPLATES:
        how = cuda.plan_of(template, rows, product.packed.shape)
        monkeypatch.setattr(cuda, "chosen", lambda *_, how=how: how)
        x = transposed(rows, shape[1], dtype)
        assert_near(product(x), x.double() @ q.dequantize().double().T)


@pytest.mark.parametrize("template", ["gemv", "gemm", "dequant"])
@pytest.mark.parametrize("text", FORMS)
def test_experts(text: str, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three experts, of which one gets most rows and one none; pairs of two share a row. A trellis has whole tiles:
    padding, like a step around the product, keeps experts apart."""
    pairs = 6 if template == "gemv" else 24
    if template == "dequant":
        monkeypatch.setattr(grouped, "_DOT_ROWS", 4)
    assert grouped.plan(pairs, 3, 80).kernel == template
    shape = (48, 176) if text.startswith("trellis") else (39, 172)
    tensors = [FORMS[text](text, shape) for _ in range(3)]
    check_experts(tensors, torch.tensor([2] * (pairs - 2) + [0, 3])[torch.randperm(pairs)].view(-1, 2))


@pytest.mark.parametrize("text", [text for text in FORMS if not text.startswith("trellis")])
def test_one_expert_of_one_number(text: str) -> None:
    check_experts([FORMS[text](text, (1, 1))], torch.zeros(1, 2, dtype=torch.int64), torch.float32)


def check_experts(tensors: list[QTensor], experts: Tensor, dtype: torch.dtype = torch.float16) -> None:
    product = grouped.stack([CudaMatmul(q, dtype) for q in tensors])
    assert product is not None
    product.parts = [t if t is None or t.stride(0) == 0 else helpers.before_nan(t) for t in product.parts]
    x = transposed(experts.shape[0], tensors[0].shape[1], dtype)
    found = product(x, grouped.route(experts, len(tensors)), 2)
    assert_near(found, ops.twin(tensors, x, experts, 2, None))


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("affine8.channel.sym", (1, 1)),
        ("affine8.g32.sym", (1, 33)),
        ("minifloat8.e4m3.channel.f32", (1, 1)),
        ("minifloat8.e4m3.g128x128.f32", (129, 1)),
        pytest.param("minifloat8.e4m3.g32.e8m0", (1, 32), marks=natives.no_dot_scaled),
        pytest.param("minifloat4.e2m1.g32.e8m0", (1, 32), marks=natives.no_dot_scaled),
    ],
)
def test_native_dots(text: str, shape: tuple[int, int], rows: int) -> None:
    q = helpers.random_qtensor(text, shape)
    x = transposed(rows, shape[1], torch.float32)
    found = natives.poisoned(scaled.prepare(q, torch.float32))(x)
    wanted = activation.rounded(x, q.spec).double() @ q.dequantize().double().T
    assert found.shape == wanted.shape and (found.double() - wanted).norm() <= 2e-6 * wanted.norm()
