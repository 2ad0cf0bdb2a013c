"""BITSMITH_KERNELS: what is forced runs everywhere, and nothing else does. Triton's part is in triton_interpreted_paths.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from bitsmith.calibrate.driver import quantize
from bitsmith.errors import UserError
from bitsmith.kernels import attention, fused, native, native_layer, ops, transform
from bitsmith.models.linear import DenseLinear, QuantLinear, _Member
from bitsmith.models.load import load_model
from bitsmith.serve.engine import Engine, EngineConfig
from torch import Tensor, nn

from .test_paged import prompts, staggered
from .test_recording import counted

SMALL = EngineConfig(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_blocks=100)
needs_native = pytest.mark.skipif(
    native.best_path() in ("", "generic"),
    reason="no native library for this processor, or built without a C++ compiler",
)


def refused() -> NoReturn:
    raise AssertionError("the native library was asked for")


def library(monkeypatch: pytest.MonkeyPatch, stands_for: Callable[[], Any]) -> None:
    monkeypatch.setattr(native, "library", stands_for)
    monkeypatch.setattr(native_layer, "_library", stands_for)


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Any], byte_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        source, out = tmp_path / "source", tmp_path / "q"
        tiny_model(name).save_pretrained(source)
        byte_tokenizer.save_pretrained(source)
        quantize(source, out, format="rtn", group_size=32, progress=False)
        return out

    return make


def served(model: Any, tokenizer: Any) -> list[Tensor]:
    """The logits of every step of four prompts: chunks of them, decode rows, and both together."""
    engine = Engine(model, tokenizer, SMALL)
    seen: list[Tensor] = []
    engine.runner.forward = counted(engine.runner.forward, seen)  # type: ignore[method-assign]
    staggered(engine, prompts())
    return seen


@needs_native
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Phi3", "GptOss", "Mixtral"])
def test_reference_serves_without_the_library_and_gives_the_twins_logits(
    name: str, checkpoint: Callable[[str], Path], byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: with a library that must not be touched, and, exact, with none at all."""
    path = checkpoint(name)
    with monkeypatch.context() as patch:
        library(patch, lambda: None)
        wanted = served(load_model(path, dtype="bfloat16", exact=True), byte_tokenizer)
    library(monkeypatch, refused)
    with pytest.raises(AssertionError, match="the native library was asked for"):
        served(load_model(path, dtype="bfloat16"), byte_tokenizer)
    monkeypatch.setenv("BITSMITH_KERNELS", "reference")
    found = served(load_model(path, dtype="bfloat16"), byte_tokenizer)
    assert len(found) == len(wanted) > 5 and all(map(torch.equal, found, wanted))


def replaced(model: nn.Module) -> dict[str, bool]:
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return {
        "fused": any("forward" in vars(m) for m in model.modules()),
        "prepacked": any(isinstance(m, DenseLinear) for m in model.modules()),
        "stacked": any(isinstance(m.matmul, _Member) for m in linears),
        "reference": all("reference" in m.matmul.name for m in linears),
    }


@pytest.mark.parametrize(
    ("path", "dtype", "wanted"),
    [
        ("", "bfloat16", {"fused", "prepacked", "stacked"}),
        ("cpu", "bfloat16", {"fused", "prepacked", "stacked"}),
        ("cpu", "float32", {"stacked"}),
        ("", "float32", {"stacked", "reference"}),
        ("reference", "bfloat16", {"reference"}),
        ("reference", "float32", {"reference"}),
    ],
)
def test_what_a_loaded_model_is_made_of(
    path: str, dtype: str, wanted: set[str], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head stays dense, so there is something to prepack."""
    monkeypatch.setenv("BITSMITH_KERNELS", path)
    found = replaced(load_model(checkpoint("Llama"), dtype=dtype))
    assert {name for name, is_so in found.items() if is_so} == wanted


def small_steps() -> dict[str, Callable[[], Any]]:
    """One call of every step that the native library has."""
    x, angle = torch.randn(3, 4, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    slots, ints = torch.arange(3), torch.ones(3, dtype=torch.int32)
    cache = (torch.randn(16, 4, 64).bfloat16(),)
    paged: dict[str, Any] = {
        "cu_q": torch.arange(4, dtype=torch.int32), "context_len": ints, "block_table": ints[:, None], "num_decode": 3,
        "block_size": 4, "decode": lambda parts: parts[0], "scale": 0.1,
    }  # fmt: skip
    return {
        "norm": lambda: fused.rms_norm(x, x[0, 0], 1e-5, "llama"),
        "rope": lambda: fused.rope(x, x, angle, angle, False),
        "gated": lambda: fused.gated(x, x, "silu"),
        "attention": lambda: attention.paged_attention(x, cache, cache, **paged),
        "store": lambda: attention.store(cache, x, slots, lambda t: (t,)),
        "residual": lambda: ops.BINDS[torch.ops.aten.add.Tensor]([x.clone()], x, x),
    }


@needs_native
@pytest.mark.parametrize("path", ["", "cpu", "reference"])
@pytest.mark.parametrize("name", small_steps())
def test_small_steps_ask_at_every_call(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = small_steps()[name]
    library(monkeypatch, refused)
    monkeypatch.setenv("BITSMITH_KERNELS", path)
    if path == "reference":
        step()
    else:
        with pytest.raises(AssertionError, match="the native library was asked for"):
            step()


@pytest.mark.parametrize("name", ["norm", "rope", "gated"])
def test_triton_cannot_be_forced_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")
    monkeypatch.setattr("bitsmith.kernels.paths.HAVE_TRITON", True)
    words = r"BITSMITH_KERNELS is 'triton' but the tensors are on cpu: set TRITON_INTERPRET=1 .*; or unset it"
    with pytest.raises(UserError, match=words):
        small_steps()[name]()
    with pytest.raises(UserError, match=words):
        transform.rotate(torch.randn(2, 64), None, 64, True)
    monkeypatch.setattr("bitsmith.kernels.paths.HAVE_TRITON", False)
    with pytest.raises(
        UserError, match=r"'triton' but this needs triton .* not installed: pip install .*; or unset it"
    ):
        small_steps()[name]()


def test_unknown_paths_are_refused_by_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", "turbo")
    with pytest.raises(UserError, match="BITSMITH_KERNELS is 'turbo'; accepted: reference, triton, cpu, or unset"):
        small_steps()["norm"]()
