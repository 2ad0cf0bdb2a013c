"""Fused steps in whole models: found by what modules compute, and the same logits afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsmith.kernels import fused
from bitsmith.models import fused as models_fused
from bitsmith.models.fused import fuse
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def build(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SMALL, **more}), attn_implementation="eager"
    )
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.weight.normal_()
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "more", "norm", "rope", "gated"),
    [
        ("llama", {}, 5, 2, 2),
        # q and k norms beside the layer's.
        ("qwen3", {}, 9, 2, 2),
        ("gemma2", {"query_pre_attn_scalar": 8}, 9, 2, 2),
        ("olmo2", {}, 9, 2, 2),
        # gate and up are halves of one linear.
        ("phi3", {"pad_token_id": 0}, 5, 2, 2),
        # LayerNorm; rotary pairs are neighbours.
        ("cohere", {}, 0, 2, 2),
        # LayerNorm and no gate.
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, 0, 0, 0),
        ("mixtral", {"num_local_experts": 4}, 5, 2, 2),
    ],
)
def test_steps_are_found_and_logits_stay(kind: str, more: dict[str, Any], norm: int, rope: int, gated: int) -> None:
    model = build(kind, **more)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        before = model(ids).logits
        found = fuse(model, CPU)
        after = model(ids).logits
    assert (found["norm"], found["rope"], found["gated"]) == (norm, rope, gated)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_each_form_of_norm_is_told_apart_in_bfloat16() -> None:
    for kind, form in (("llama", "llama"), ("gemma2", "gemma"), ("olmo2", "float")):
        model = build(kind).to(torch.bfloat16)
        assert fuse(model, CPU)["norm"]
        assert model.model.norm.forward.args[2] == form


class _Scaled(nn.Module):
    """A norm by its parameters, not by what it does."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.randn(16)), 1e-6, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(fused.norm_twin(x, self.weight, self.eps, "llama"))


def test_what_is_nearly_the_same_is_left_alone() -> None:
    assert fuse(_Scaled(lambda y: y), CPU)["norm"] == 1
    for change in (
        lambda y: y * 1.001,
        lambda y: y.clamp(max=2),
        lambda y: y.double(),
        lambda y: y[:1],
        lambda y: None,
    ):
        assert not fuse(_Scaled(change), CPU)
    wrong_eps = _Scaled(lambda y: y)
    wrong_eps.eps = 1e-2
    wrong_eps.forward = _Scaled(lambda y: y).forward  # type: ignore[method-assign]
    assert not fuse(wrong_eps, CPU)


class _Gate(nn.Module):
    """An MLP by its parts, not by what it does."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # Square: nothing but the numbers tells gate, up and down apart.
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.c(x)) * self.a(x))


def test_a_gate_is_found_by_its_numbers() -> None:
    for act, count in (
        (nn.functional.silu, 1),
        (nn.functional.relu, 0),
        (lambda x: nn.functional.silu(x).clamp(max=1), 0),
    ):
        module = _Gate(act)
        x = torch.randn(3, 16)
        before = module(x)
        assert fuse(module, CPU)["gated"] == count
        torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)


def test_a_device_without_fused_steps_keeps_the_model() -> None:
    model = build("llama")
    assert not fuse(model, torch.device("meta"))
    assert not any("forward" in vars(m) for m in model.modules())


def test_fusing_changes_one_model_and_no_random_number() -> None:
    model, other = build("llama"), build("llama")
    torch.manual_seed(1)
    fuse(model, CPU)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert not any("forward" in vars(m) for m in other.modules())


def test_another_call_of_the_rotary_function_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    q, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)

    def original(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        seen.append(named)
        return arguments[0], arguments[1]

    for dtype, named in ((torch.float32, {"unsqueeze_dim": 1}), (torch.bfloat16, {})):
        models_fused._rope_call(original, False, q, q, cos.to(dtype), cos.to(dtype), **named)
    assert seen == [{"unsqueeze_dim": 1}, {}]


@pytest.mark.parametrize("act", fused.ACTS)
def test_experts_gates(act: str) -> None:
    model = build("mixtral", num_local_experts=4, hidden_act="silu" if act == "silu" else "gelu_pytorch_tanh")
    assert fuse(model, CPU)["gated"] == 2
    assert model.model.layers[0].mlp.experts._apply_gate.args[0] == act
