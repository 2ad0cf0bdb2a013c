"""Native low-precision dots against their torch twins, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is, which also has the helpers.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from bitsmith.kernels import activation, cuda, scaled
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.spec import Spec
from torch import Tensor


def _helpers() -> Any:
    spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("triton_interpreted.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helpers = _helpers()
_poison = helpers._poison
before_nan, random_qtensor, relative_rms = helpers.before_nan, helpers.random_qtensor, helpers.relative_rms

KINDS = {"affine8.channel.sym": "int8", "minifloat8.e4m3.g128.f32": "fp8", "minifloat8.e4m3.g32.e8m0": "mx"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", [*KINDS, "minifloat8.e4m3.channel.f32"])
def test_activations_are_quantized_as_their_twin(text: str, dtype: torch.dtype) -> None:
    """Exactly (a zero may lose its sign): an odd width, a row of zeros, rows of very different sizes, ties."""
    spec = Spec.parse(text)
    x = torch.randn(6, 327) * torch.tensor([1.0, 0.0, 1e-6, 1e4, 30.0, 1.0])[:, None]
    x[4, :256] = torch.arange(-128, 128)
    x[5] = (torch.arange(327) - 100) / 64
    x = before_nan(x.to(dtype))
    wanted, wanted_steps = activation.quantize(x, spec)
    found, steps = scaled.quantize(x, spec)
    assert torch.equal(steps, wanted_steps)
    assert torch.equal(found.float(), wanted.float())


def test_every_e4m3_number_and_every_tie_between_two() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * (1 + 2e-7), ties * (1 - 2e-7), torch.tensor([448.0])])
    x = torch.cat([x, -x])[None]
    found, steps = scaled.quantize(x, Spec.parse("minifloat8.e4m3.tensor.f32"))
    assert steps.item() == 1.0
    assert torch.equal(found.float(), x.to(torch.float8_e4m3fn).float())


def poisoned(product: scaled.ScaledMatmul) -> scaled.ScaledMatmul:
    parts = {name: before_nan(part) for name, part in product.q.parts.items()}
    weight = before_nan(product.weight.view(torch.uint8)).view(product.weight.dtype)
    return replace(product, q=replace(product.q, parts=parts), weight=weight)


def check(text: str, shape: tuple[int, int], rows: int, dtype: torch.dtype = torch.float16) -> None:
    q = random_qtensor(text, shape)
    assert scaled.layout_problem(q.spec, shape[1]) == ""
    product = poisoned(scaled.prepare(q, dtype))
    assert product.name == f"triton-{activation.kind(q.spec)}"
    back = product.qtensor()
    assert back.spec == q.spec and all(torch.equal(back.parts[name], part) for name, part in q.parts.items())
    x = before_nan(torch.randn(rows, shape[1]).to(dtype))
    wanted = activation.rounded(x.float(), q.spec).double() @ q.dequantize().double().T
    if "perm" in q.spec.pre:
        permuted = activation.rounded(x.float()[:, q.parts["perm"]], q.spec)
        wanted = permuted.double() @ q.dequantize()[:, q.parts["perm"]].double().T
    found = product(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert relative_rms(found, wanted) < {torch.float16: 5e-4, torch.float32: 2e-6}[dtype]


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize(
    "text",
    [
        "affine8.channel.sym",
        "affine8.g64.sym.a8",
        "affine8.g128.sym.perm",
        "minifloat8.e4m3.tensor.f32",
        "minifloat8.e4m3.channel.f32.a8",
        "minifloat8.e4m3.g128x128.f32",
        "minifloat8.e4m3.g32.f16",
    ],
)
def test_product(text: str, rows: int) -> None:
    """39 outputs and 303 inputs: a multiple of nothing."""
    check(text, (39, 303), rows)


def test_product_of_many_rows_and_split_of_the_inputs() -> None:
    check("affine8.g128.sym", (70, 256), 130)
    assert scaled.plan(1, (40, 1300), Spec.parse("affine8.channel.sym"), 108).split > 1
    check("affine8.channel.sym", (40, 1300), 1, torch.float32)
    check("minifloat8.e4m3.g128.f32", (40, 1300), 3, torch.float32)


no_dot_scaled = pytest.mark.skipif(
    triton.__version__.startswith("3.6."), reason="triton 3.6's interpreter cannot run dot_scaled (it compiles)"
)


@no_dot_scaled
@pytest.mark.parametrize(("rows", "k"), [(1, 32), (1, 288), (130, 160)])
@pytest.mark.parametrize("text", ["minifloat8.e4m3.g32.e8m0", "minifloat4.e2m1.g32.e8m0.a8"])
def test_mx_product(text: str, rows: int, k: int) -> None:
    """39 outputs; whole groups of inputs, but no multiple of a tile."""
    check(text, (39, k), rows)


@no_dot_scaled
def test_split_of_the_inputs_of_mxfp4() -> None:
    spec = Spec.parse("minifloat4.e2m1.g32.e8m0")
    assert scaled.plan(1, (40, 1312), spec, 108).split > 1
    check(str(spec), (40, 1312), 1, torch.float32)


@no_dot_scaled
def test_dispatch_takes_the_dot_of_mxfp4_on_sm_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    monkeypatch.setattr(cuda, "capability_of", lambda device: 100)
    q = random_qtensor("minifloat4.e2m1.g32.e8m0", (20, 96))
    asked, own = prepare(q, torch.float16, act="a8"), prepare(replace(q, spec=replace(q.spec, act="a8")), torch.float16)
    assert asked.name == own.name == "triton-mx" and asked.nbytes == q.nbytes
    x = torch.randn(3, 96).half()
    wanted = activation.rounded(x.float(), q.spec).double() @ q.dequantize().double().T
    assert relative_rms(asked(x), wanted) < 5e-4 and torch.equal(asked(x), own(x))


@pytest.mark.parametrize("text", ["affine8.g32.sym", "minifloat8.e4m3.g32.f16"])
def test_codes_and_scales_of_any_strides(text: str) -> None:
    """GPTQ's codes lie transposed; a row of four has a stride that counts as contiguous."""
    for k in (96, 4):
        q = random_qtensor(text, (9, k))
        turned = replace(q, parts={name: part.T.contiguous().T for name, part in q.parts.items()})
        x = torch.randn(2, k)
        product = scaled.prepare(turned, torch.float32)
        assert torch.equal(product(x), scaled.prepare(q, torch.float32)(x))
        assert all(torch.equal(product.qtensor().parts[name], part) for name, part in q.parts.items())


def test_other_strides_and_no_rows() -> None:
    q = random_qtensor("affine8.channel.sym", (5, 64))
    product, x = scaled.prepare(q, torch.float32), torch.randn(4, 3, 128)[..., ::2]
    assert torch.equal(product(x), product(x.contiguous()))
    assert product(x[:0]).shape == (0, 3, 5)


def test_torch_accepts_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    product = scaled.prepare(random_qtensor("affine8.channel.sym", (7, 64)), torch.float16)
    scales: Tensor = product.q.parts["scales"]
    done = torch.library.opcheck(
        scaled.multiply,
        (torch.randn(3, 64).half(), product.weight, scales, "affine8.channel.sym", 7),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    assert set(done.values()) == {"SUCCESS"}


def test_dispatch_takes_the_dot_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on sm_80: int8 has a dot, FP8 has none and is decoded; both give the product of rounded activations."""
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    x = torch.randn(3, 96).half()
    for text, name in (
        ("affine8.channel.sym", "triton-int8"),
        ("affine8.channel.asym", "a8+triton"),
        ("affine4.g32.sym", "a8+triton"),
        ("minifloat8.e4m3.channel.f32", "a8+triton"),
        ("minifloat4.e2m1.g32.e8m0", "a8+triton"),
    ):
        q = random_qtensor(text, (20, 96))
        with caplog.at_level("INFO"):
            product = prepare(q, torch.float16, act="a8")
        assert product.name == name
        wanted = activation.rounded(x.float(), q.spec).double() @ q.dequantize().double().T
        assert relative_rms(product(x), wanted) < 1e-3
        own = random_qtensor(text + ".a8", (20, 96))
        asked = prepare(own, torch.float16)
        assert asked.name == name and asked.qtensor().spec == own.spec
    told = [record.getMessage() for record in caplog.records]
    assert any(m.startswith("minifloat8.e4m3.channel.f32: sm_80 has no fp8 dot; activations are rounded") for m in told)
    assert any("affine4.g32.sym: only symmetric 8-bit codes are int8 as they are" in m for m in told)
    assert prepare(q, torch.float16).name == "triton", "not asked for"


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [("int8", {80, 86, 89, 90, 100, 120}), ("fp8", {89, 90, 100, 120}), ("mx", {100, 103})],
)
def test_which_gpus_have_which_dot(kind: str, capabilities: set[int]) -> None:
    found = {c for c in (60, 70, 75, 80, 86, 89, 90, 100, 103, 120) if not scaled.machine_problem(kind, c)}
    assert capabilities <= found
    assert found <= capabilities | ({103} if kind != "mx" else set())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("affine8.channel.asym", "only symmetric 8-bit codes"),
        ("minifloat8.e5m2.channel.f32", "only E4M3"),
        ("affine8.g48.sym", "32, 64 or a multiple of 128"),
        ("minifloat8.e4m3.g64.e8m0", "one plain level"),
        ("minifloat4.e2m1.g16.ue4m3", "E2M1 with a power of two per 32"),
        ("minifloat4.e2m1.g32.f16", "E2M1 with a power of two per 32"),
    ],
)
def test_what_has_no_native_dot(text: str, words: str) -> None:
    assert words in scaled.layout_problem(Spec.parse(text), 96)
