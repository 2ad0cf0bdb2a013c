"""The int8 copy of a weight: its definition, which rows meet it, what it leaves as it was, where it is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith import LLM, SamplingParams
from bitsmith.calibrate.driver import quantize
from bitsmith.cli.main import main
from bitsmith.errors import UserError
from bitsmith.eval.kernel_speed import random_weight
from bitsmith.kernels import int8_copy, native
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.native_inputs import rounded_activations
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.rows import look_up, source
from bitsmith.kernels.spec import Spec
from bitsmith.models.linear import QuantLinear
from bitsmith.models.load import load_model
from torch import Tensor

BF16 = torch.bfloat16
SPECS = (
    "affine4.g32.asym",
    "affine4.g32.min.u6:f16:8",
    "affine3.g64.sym.perm",
    "minifloat8.e4m3.g128x128.f32",
    "codebook4.nf4.g64",
    "trellis4.mcg.inscale.had128.outhad128.outscale",
)
native_here = pytest.mark.skipif(native.best_path() in ("", "generic"), reason="no native library for this processor")
bytes_here = pytest.mark.skipif(
    native.best_path() not in ("avx512", "amx"), reason="the copy is for processors with AVX-512's byte products"
)


def weight(text: str, shape: tuple[int, int] = (256, 512)) -> QTensor:
    torch.manual_seed(0)
    q = random_weight(Spec.parse(text), shape, torch.device("cpu"))
    return replace(q, parts={**q.parts, "perm": torch.randperm(shape[1])}) if "perm" in q.spec.pre else q


def relative(y: Tensor, wanted: Tensor) -> float:
    return float((y.float() - wanted.float()).norm() / wanted.float().norm())


def same_parts(a: QTensor, b: QTensor) -> bool:
    return a.spec == b.spec and all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)


@pytest.mark.parametrize("text", SPECS)
def test_it_is_the_nearest_of_255_steps_of_each_row(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = weight(text)
    whole = int8_copy.rounded(q)
    monkeypatch.setattr(int8_copy, "_PIECE", 64 * 512)
    assert same_parts(int8_copy.rounded(q), whole), "cut in pieces it is another"
    dense, found = q.dequantize(), whole.dequantize()
    step = dense.abs().amax(1, keepdim=True) / 127
    assert bool(((dense - found).abs() <= step * 0.5001).all())
    assert torch.equal(whole.parts["scales"], step)


def test_a_row_of_zeros_stays_zero() -> None:
    q = weight("affine4.g32.asym")
    q.parts["scales"][3] = 0
    assert not int8_copy.rounded(q).dequantize()[3].any()


@native_here
@pytest.mark.parametrize("text", SPECS)
def test_few_rows_meet_the_weight_and_many_the_copy(text: str) -> None:
    q = weight(text)
    plain, product = prepare(q, BF16), prepare(q, BF16, copy=True)
    few = int8_copy.FEW if plain.name == "native-a8" else int8_copy.FEW_FLOATS
    assert product.name == f"{plain.name}+int8"
    for m in (1, few, few + 1, 40):
        x = torch.randn(m, 512, dtype=BF16)
        y = product(x)
        assert torch.equal(y, plain(x)) == (m <= few)
        assert relative(y, x.float() @ q.dequantize().T) < 2e-2


@native_here
def test_the_product_is_that_of_the_copy_and_rounded_activations() -> None:
    q = weight("codebook4.nf4.g64", (100, 640))
    product, copy = prepare(q, BF16, copy=True), int8_copy.rounded(q)
    for m in (3, 8, 9, 31, 70):
        x = torch.randn(m, 640, dtype=BF16)
        twin = rounded_activations(x, 640).double() @ copy.dequantize(torch.float64).T
        assert relative(product(x), twin) < 2.5e-3, "more than y's own rounding"


@native_here
@pytest.mark.parametrize("text", SPECS)
def test_the_weight_comes_back(text: str) -> None:
    q = weight(text)
    product = prepare(q, BF16, copy=True)
    assert same_parts(product.qtensor(), q)
    assert product.nbytes == prepare(q, BF16).nbytes + 256 * 512 + 256 * 4


@native_here
def test_embeddings_are_read_past_the_copy() -> None:
    q = weight("affine4.g32.min.u6:f16:8")
    held = source(prepare(q, BF16, copy=True))
    assert held is not None
    ids = torch.tensor([[5, 255], [0, 17]])
    assert torch.equal(look_up(held, ids, BF16), q.dequantize(BF16)[ids])


@native_here
def test_what_would_be_its_own_copy_has_none() -> None:
    assert prepare(weight("affine8.channel.sym"), BF16, copy=True).name == "native-a8"
    assert prepare(weight("affine8.g128.sym"), BF16, copy=True).name == "native-a8+int8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "the model is on cuda"),
        ({"exact": True}, "exact=True multiplies the weights themselves"),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"BITSMITH_KERNELS": "reference"}, "BITSMITH_KERNELS is 'reference'"),
        ({"BITSMITH_ACT": "bf16"}, "BITSMITH_ACT is 'bf16' and a copy meets int8 activations"),
        ({"path": "avx2"}, "this processor has avx2"),
        ({"path": ""}, "this processor has no native library"),
    ],
)
def test_it_is_refused_where_it_has_no_use(
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"device": "cpu", "dtype": BF16, "exact": False, "path": "avx512", **change}
    monkeypatch.setattr(native, "best_path", lambda: how["path"])
    for name in filter(str.isupper, how):
        monkeypatch.setenv(name, str(how[name]))
    with pytest.raises(UserError, match=rf"int8_copy \(--int8-copy\) has no use here: {message}.*\. Fix: \w+"):
        int8_copy.check(torch.device(str(how["device"])), how["dtype"], bool(how["exact"]))  # type: ignore[arg-type]


def test_a_model_that_is_built_is_refused(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="device, dtype and int8_copy are for checkpoints"):
        LLM(tiny_model("Llama"), byte_tokenizer, int8_copy=True)


@pytest.fixture
def quantized(tiny_model: Callable[..., Any], byte_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """`quantized("Llama")` is a small checkpoint of that architecture in 4 bits."""

    def save(name: str) -> Path:
        tiny_model(name).save_pretrained(tmp_path / "plain")
        byte_tokenizer.save_pretrained(tmp_path / "plain")
        quantize(tmp_path / "plain", tmp_path / "q", format="gptq", method="rtn", bits=4, group_size=32, progress=False)
        return tmp_path / "q"

    return save


@bytes_here
def test_models_load_with_copies(quantized: Callable[[str], Path]) -> None:
    path = quantized("Llama")
    plain, copied = (load_model(path, dtype="bfloat16", int8_copy=copy) for copy in (False, True))
    layers = {name: m for name, m in copied.named_modules() if isinstance(m, QuantLinear)}
    assert {m.matmul.name.partition("[")[0] for m in layers.values()} == {"native-a8+int8"}
    assert all(same_parts(m.qtensor(), plain.get_submodule(name).qtensor()) for name, m in layers.items())
    ids = torch.randint(0, 257, (1, 60))
    with torch.no_grad():
        exact = load_model(path, exact=True)(ids).logits
        errors = [relative(model(ids).logits, exact) for model in (plain, copied)]
        assert errors[0] != errors[1] < 1.5 * errors[0], errors
        assert torch.equal(plain(ids[:, :8]).logits, copied(ids[:, :8]).logits)


@bytes_here
def test_experts_have_copies(quantized: Callable[[str], Path]) -> None:
    model = load_model(quantized("Mixtral"), dtype="bfloat16", int8_copy=True)
    held = model.model.layers[0].mlp.experts.__dict__["quantized_experts"]
    assert {product.name for products in held.values() for product in products} == {"native-a8+int8"}


@bytes_here
def test_the_engine_and_the_command_take_it(
    quantized: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantized("Llama")
    llm = LLM(path, int8_copy=True, max_model_len=64, num_blocks=60, block_size=4)
    found = llm.generate(
        ["a prompt of more than eight tokens"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    )[0]
    assert len(found.token_ids) == 4
    words = ["generate", str(path), "-p", "x", "--max-tokens", "2", "--int8-copy"]
    assert main(words) == 0 and capsys.readouterr().out
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    assert main(words) == 2 and "BITSMITH_ACT is 'bf16'" in capsys.readouterr().err
