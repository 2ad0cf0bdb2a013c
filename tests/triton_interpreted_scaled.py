"""Native low-precision dots against their torch twins, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is, which also has the helpers.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from bitsmith.kernels import activation, activation_device, cuda, minifloat, scaled
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.spec import Spec
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


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
    found, steps = activation_device.quantize(x, spec)
    assert torch.equal(steps, wanted_steps)
    assert torch.equal(found.float(), wanted.float())


def test_every_e4m3_number_and_every_tie_between_two() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * (1 + 2e-7), ties * (1 - 2e-7), torch.tensor([448.0])])
    x = torch.cat([x, -x])[None]
    found, steps = activation_device.quantize(x, Spec.parse("minifloat8.e4m3.tensor.f32"))
    assert steps.item() == 1.0
    assert torch.equal(found.float(), x.to(torch.float8_e4m3fn).float())


NVFP4 = "minifloat4.e2m1.g16.ue4m3"


def check_fp4(x: Tensor, step: Tensor | None = None) -> None:
    codes, scales, steps = activation.quantize_fp4(x, step)
    found, found_scales, found_steps = activation_device.quantize_fp4(before_nan(x), step)
    assert torch.equal(found_steps, steps)
    assert torch.equal(found_scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(found, codes[:, ::2] | codes[:, 1::2] << 4)


@pytest.mark.parametrize("k", [16, 336, 8192 + 48])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp4_activations_are_quantized_as_their_twin(dtype: torch.dtype, k: int) -> None:
    """Bit for bit, signs of zeros too: groups of zeros, and of numbers too small for a scale; rows of very different
    sizes; a step of all tokens that saturates some."""
    x = torch.randn(7, k) * torch.tensor([1.0, 0.0, 1e-6, 1e4, 30.0, 1.0, -3.0])[:, None]
    x[4, 16:32], x[5, 32:] = 0.0, x[5, 32:] * 1e-6
    x[6] = (torch.arange(k) % 129 - 64) / 32
    x = x.to(dtype)
    check_fp4(x)
    check_fp4(x, torch.tensor(0.003))
    check_fp4(x, torch.tensor(1e-5))


def test_every_e2m1_number_and_every_tie_between_two() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * (1 + 2e-7), ties * (1 - 2e-7)])
    wanted = torch.tensor([*range(8), 0, 2, 2, 4, 4, 6, 6, *range(1, 8), *range(7)])
    # A 6 makes the scale of each group 1; the last is saturated by the largest scale.
    groups = torch.full((len(x) + 1, 16), 6.0)
    groups[:-1, 0], groups[:-1, 1], groups[-1, 2] = x, -x, -1e30
    check_fp4(groups.view(1, -1), torch.tensor(1.0))
    codes, scales, _ = activation.quantize_fp4(groups.view(1, -1), torch.tensor(1.0))
    codes = codes.view(groups.shape)
    assert scales[0, :-1].eq(1).all() and scales[0, -1] == 448 and codes[-1, :3].tolist() == [0, 0, 15]
    assert torch.equal(codes[:-1, 0], wanted) and torch.equal(codes[:-1, 1], wanted + 8 * (x > 0))


@pytest.fixture
def nvfp4_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dot_scaled, where it has one, takes every scale for E8M0: this is it for E2M1 and E4M3 scales of
    16, which is what the instructions compute (test_aot.py sees to those)."""

    def operand(codes: Any, scales: Any) -> Tensor:
        pairs, factors = torch.from_numpy(codes), torch.from_numpy(scales).view(torch.float8_e4m3fn).double()
        unpacked = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
        return minifloat.value(Spec.parse(NVFP4), unpacked, {}).double() * factors.repeat_interleave(16, -1)

    def dot(builder: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any) -> Any:
        assert a_kind.name == b_kind.name == "E2M1"
        product = operand(a.data, a_scale.data) @ operand(b.data.T.copy(), b_scale.data).T
        return type(a)((product.numpy() + rest[-1].data).astype(np.float32), rest[-1].dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot_scaled", dot, raising=False)


def poisoned(product: scaled.ScaledMatmul) -> scaled.ScaledMatmul:
    parts = {name: before_nan(part) for name, part in product.q.parts.items()}
    weight = before_nan(product.weight.view(torch.uint8)).view(product.weight.dtype)
    return replace(product, q=replace(product.q, parts=parts), weight=weight)


def check(text: str, shape: tuple[int, int], rows: int, dtype: torch.dtype = torch.float16, **parts: Tensor) -> None:
    q = random_qtensor(text, shape)
    q = replace(q, parts={**q.parts, **parts})
    assert scaled.layout_problem(q.spec, shape[1]) == ""
    product = poisoned(scaled.prepare(q, dtype))
    assert product.name == f"triton-{activation.kind(q.spec)}"
    back = product.qtensor()
    assert back.spec == q.spec and all(torch.equal(back.parts[name], part) for name, part in q.parts.items())
    x = before_nan(torch.randn(rows, shape[1]).to(dtype))
    columns = q.parts["perm"].long() if "perm" in q.spec.pre else slice(None)
    rounded = activation.rounded(x.float()[:, columns], q.spec, q.parts.get("act_step"))
    wanted = rounded.double() @ q.dequantize()[:, columns].double().T
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


@pytest.mark.usefixtures("nvfp4_dot")
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (1, 272), (130, 160)])
@pytest.mark.parametrize("text", [NVFP4 + ".a4", NVFP4 + ".perm.a4"])
def test_nvfp4_product(text: str, rows: int, k: int) -> None:
    """39 outputs; whole groups of inputs, but no multiple of a tile. With a step of each token, and of all."""
    check(text, (39, k), rows)
    check(text, (39, k), rows, global_scale=torch.tensor(0.37), act_step=torch.tensor(7e-4))


@pytest.mark.usefixtures("nvfp4_dot")
def test_split_of_the_inputs_of_nvfp4() -> None:
    spec = Spec.parse(NVFP4 + ".a4")
    assert scaled.plan(1, (40, 1312), spec, 108).split > 1
    check(str(spec), (40, 1312), 1, torch.float32, global_scale=torch.tensor([0.37]))


@pytest.mark.usefixtures("nvfp4_dot")
@pytest.mark.parametrize(("capability", "name"), [(90, "a4+triton"), (100, "triton-fp4"), (120, "triton-fp4")])
def test_dispatch_takes_the_dot_of_nvfp4(monkeypatch: pytest.MonkeyPatch, capability: int, name: str) -> None:
    """Where there is none activations are rounded and weights decoded: the same product."""
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    monkeypatch.setattr(cuda, "capability_of", lambda device: capability)
    q = random_qtensor(NVFP4, (20, 96))
    q = replace(q, parts={**q.parts, "global_scale": torch.tensor(0.37), "act_step": torch.tensor(0.01)})
    own = replace(q, spec=replace(q.spec, act="a4"))
    products = [prepare(q, torch.float16, act="a4"), prepare(own, torch.float16)]
    x = torch.randn(3, 96).half()
    wanted = activation.rounded(x.float(), own.spec, q.parts["act_step"]).double() @ q.dequantize().double().T
    for product, was in zip(products, (q, own), strict=True):
        assert product.name == name and relative_rms(product(x), wanted) < 1e-3
        back = product.qtensor()
        assert back.spec == was.spec and back.parts.keys() == q.parts.keys()
        assert all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    assert prepare(q, torch.float16).name == "triton" and prepare(q, torch.float16, act="a8").name == "a8+triton"
    assert prepare(random_qtensor("affine8.channel.sym", (20, 96)), torch.float16, act="a4").name == "triton"


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
        (torch.randn(3, 64).half(), product.weight, scales, "affine8.channel.sym", 7, None, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("nvfp4_dot")
def test_torch_accepts_the_operator_with_scales_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", torch.zeros)
    product = scaled.prepare(random_qtensor(NVFP4 + ".a4", (7, 64)), torch.float16)
    arguments = (torch.randn(3, 64).half(), product.weight, product.q.parts["scales"], product.spec, 7)
    done = torch.library.opcheck(
        scaled.multiply,
        (*arguments, torch.tensor(0.37), torch.tensor(0.01)),
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
    assert any("affine4.g32.sym.a8: only symmetric 8-bit codes are int8 as they are" in m for m in told)
    assert prepare(q, torch.float16).name == "triton", "not asked for"


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("int8", {80, 86, 89, 90, 100, 120}),
        ("fp8", {89, 90, 100, 120}),
        ("mx", {100, 103}),
        ("fp4", {100, 103, 120}),
    ],
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
        ("minifloat4.e2m1.g16.ue4m3.flat.a4", "one plain level"),
        ("minifloat4.e2m1.g16.ue4m3.inscale.a4", "steps around the product"),
    ],
)
def test_what_has_no_native_dot(text: str, words: str) -> None:
    assert words in scaled.layout_problem(Spec.parse(text), 96)


def test_inputs_of_scaled_blocks_are_whole_groups() -> None:
    for text, k in ((NVFP4 + ".a4", 40), ("minifloat4.e2m1.g32.e8m0", 48)):
        assert f"{k} inputs are not whole groups" in scaled.layout_problem(Spec.parse(text), k)
