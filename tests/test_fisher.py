"""The curvature of the KL divergence: against gradients of the whole model, and against what errors really do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from bitsmith.calibrate.fisher import Curvature, curvatures
from bitsmith.calibrate.gguf_size import matter
from bitsmith.calibrate.sensitivity import expected_kld
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_plan import permuted, plan
from torch import Tensor

Make = Callable[..., transformers.PreTrainedModel]
Measured = Callable[..., tuple[transformers.PreTrainedModel, dict[str, list[Curvature]]]]
IDS = torch.randint(2, 250, (11, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def measured(tmp_path: Path, tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """`measured(name)`: a tiny model and the curvatures of its checkpoint, tmp_path / "m", on IDS."""
    monkeypatch.setattr("bitsmith.calibrate.importance.calibration_rows", lambda *_: IDS)

    def make(name: str, **config: bool) -> tuple[transformers.PreTrainedModel, dict[str, list[Curvature]]]:
        model = tiny_model(name, **config)
        model.save_pretrained(tmp_path / "m")
        return model, curvatures(tmp_path / "m", calib="t", seed=3, progress=False)

    return make


def squares_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Squares of the gradients of drawn tokens' log-probabilities, by parameter: mean over tokens."""
    generator, found = torch.Generator().manual_seed(3), {}
    for ids in IDS.split(1):
        likely = model(ids).logits[0].log_softmax(-1)
        drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
        model.zero_grad()
        likely.gather(-1, drawn).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad.double() ** 2 / IDS.numel()
    return found


def test_sums_are_those_of_the_whole_models_gradients(measured: Measured) -> None:
    model, found = measured("Llama")
    wanted = {name: square for name, square in squares_of(model).items() if square.dim() == 2}
    tied = model.config.tie_word_embeddings
    assert not tied and set(found) == set(wanted)
    for name, square in wanted.items():
        (curvature,) = found[name]
        assert torch.allclose(curvature.rows * curvature.columns.sum(), square.sum(1), rtol=1e-3), name
        assert torch.allclose(curvature.columns * curvature.rows.sum(), square.sum(0), rtol=1e-3), name


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts(name: str, measured: Measured, tmp_path: Path) -> None:
    """As the model stacks them, whatever form the checkpoint and the GGUF file have."""
    model, found = measured(name)
    squares = squares_of(model)
    tensors = {each.name: each for each in plan(open_checkpoint(tmp_path / "m"))[1]}
    for kind, part in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
        each = tensors[f"blk.1.ffn_{kind}_exps.weight"]
        (curvature,) = matter(each, found)
        assert curvature.rows.shape == (each.shape[0] * each.shape[1],) and curvature.columns.shape == each.shape[2:]
        whole = squares[f"model.layers.1.mlp.experts.{part}"]
        if name == "Mixtral":
            half = whole.shape[1] // 2
            whole = {"gate": whole[:, :half], "up": whole[:, half:], "down": whole}[kind]
            by_expert = curvature.rows.view(each.shape[0], -1).sum(1) * curvature.columns.sum()
            assert torch.allclose(by_expert / by_expert.sum(), whole.sum((1, 2)) / whole.sum(), atol=0.1), kind
        total = float(curvature.rows.sum() * curvature.columns.sum())
        share = curvature.rows.numel() * curvature.columns.numel() / whole.numel()
        assert total == pytest.approx(share * float(whole.sum()), rel=0.1 if name == "Mixtral" else 1e-3), kind


def test_a_tied_embedding_has_two_uses(measured: Measured, tmp_path: Path) -> None:
    _, found = measured("Llama", tie_word_embeddings=True)
    uses = found["model.embed_tokens.weight"]
    assert len(uses) == 2
    # As output every token of the vocabulary counts, as input those of the text.
    assert bool((uses[0].rows > 0).all()) and set(uses[1].rows.nonzero()[:, 0].tolist()) == set(IDS.unique().tolist())


def test_rows_are_in_the_files_order(measured: Measured, tmp_path: Path) -> None:
    _, found = measured("Llama")
    (each,) = (e for e in plan(open_checkpoint(tmp_path / "m"))[1] if e.name == "blk.0.attn_q.weight")
    (curvature,) = matter(each, found)
    (plain,) = found["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(curvature.rows, permuted(each.link, plain.rows)) and not torch.equal(curvature.rows, plain.rows)


@pytest.mark.parametrize("path", ["layers.1.mlp.down_proj", "layers.0.self_attn.v_proj", "lm_head", "embed_tokens"])
def test_it_predicts_the_divergence(path: str, measured: Measured) -> None:
    model, found = measured("Llama")
    name = f"{path if path == 'lm_head' else f'model.{path}'}.weight"
    weight = model.get_parameter(name).data
    with torch.no_grad():
        before = model(IDS).logits.double().log_softmax(-1)
        kept, predicted, actual = weight.clone(), 0.0, 0.0
        for draw in range(8):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(draw)) * 1e-3 * weight.std()
            weight.copy_(kept + noise)
            after = model(IDS).logits.double().log_softmax(-1)
            actual += float((before.exp() * (before - after)).sum(-1).mean())
            predicted += expected_kld((weight - kept)[None], found[name], weight.shape)
    assert predicted == pytest.approx(actual, rel=0.25)
