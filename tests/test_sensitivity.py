"""What tensors lose as each type: measured once, on a sample, weighed by the inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from bitsmith.calibrate import rtn
from bitsmith.calibrate.allocate import Measured, allocate
from bitsmith.calibrate.imatrix import Entry, Imatrix
from bitsmith.calibrate.method import Settings
from bitsmith.calibrate.sensitivity import Source, gains, measure, relative_loss, types_for
from bitsmith.errors import UserError
from bitsmith.quant_formats import gguf_blocks
from bitsmith.quant_formats.gguf_mixture import tensor_bytes
from torch import Tensor

CANDIDATES = ("Q4_0", "Q5_0", "Q8_0", "F16")
GAIN = {"blk.0.attn_q.weight": 7.0}


def restore(w: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    spec = gguf_blocks.spec(kind)
    return w.half().float() if spec is None else rtn.quantize(w, spec, None, Settings()).dequantize()


def sources() -> tuple[list[Source], list[str]]:
    """A matrix, a stack of experts and rows that few blocks fit; and the names read so far."""
    torch.manual_seed(2)
    weights = {"blk.0.attn_q.weight": torch.randn(24, 64), "blk.0.ffn_up_exps.weight": torch.randn(3, 16, 64),
               "blk.0.ffn_down.weight": torch.randn(8, 36)}  # fmt: skip
    read: list[str] = []

    def take(name: str) -> Tensor:
        read.append(name)
        return weights[name]

    return [Source(n, tuple(w.shape), lambda n=n: take(n)) for n, w in weights.items()], read


def test_losses_bytes_and_fallbacks(tmp_path: Path) -> None:
    found, _ = sources()
    weighty = torch.tensor([[1.0] * 63 + [1000.0]])
    imatrix = Imatrix({"blk.0.attn_q.weight": Entry(weighty, torch.ones(1))}, (), 1, 1)
    measured = Measured(tmp_path / "m.json", {})
    measure(found, CANDIDATES, restore, imatrix, GAIN, measured, progress=False)
    assert list(measured.table["blk.0.ffn_down.weight"]) == ["F16"]
    for source in found[:2]:
        choices = measured.table[source.name]
        assert {k: c.bytes for k, c in choices.items()} == {k: tensor_bytes(k, source.shape) for k in CANDIDATES}
        losses = [choices[k].loss for k in CANDIDATES]
        gain = GAIN.get(source.name, 1.0)
        assert losses == sorted(losses, reverse=True) and losses[0] < 0.02 * gain and losses[-1] < 1e-6 * gain
    w = found[0].weight()
    error = (restore(w, "Q4_0", None) - w).square() * weighty
    expected = float(error.sum() / (w.square() * weighty).sum())
    assert measured.table["blk.0.attn_q.weight"]["Q4_0"].loss == pytest.approx(7 * expected, rel=1e-5)
    most = sum(c["F16"].bytes for c in measured.table.values())
    assert set(allocate(measured.table, most).types.values()) == {"F16"}


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    found, read = sources()
    measure(found[:2], CANDIDATES, restore, None, {}, Measured(tmp_path / "m.json", {}), progress=False)
    first = list(read)
    again = Measured(tmp_path / "m.json", {})
    measure(found, CANDIDATES, restore, None, {}, again, progress=False)
    assert read[len(first) :] == ["blk.0.ffn_down.weight"] and len(again.table) == 3


def test_large_tensors_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(512, 64) * torch.linspace(0.1, 3, 512)[:, None]
    seen: list[tuple[int, ...]] = []

    def counting(matrix: Tensor, kind: str, importance: Tensor | None) -> Tensor:
        seen.append(tuple(matrix.shape))
        return restore(matrix, kind, importance)

    monkeypatch.setattr("bitsmith.calibrate.sensitivity._SAMPLE", 4096)
    measured = Measured(tmp_path / "m.json", {})
    measure([Source("a.weight", (512, 64), lambda: w)], ["Q4_0"], counting, None, {}, measured, progress=False)
    assert seen == [(64, 64)]
    whole = relative_loss(w[None], restore(w, "Q4_0", None)[None], None)
    assert measured.table["a.weight"]["Q4_0"].loss == pytest.approx(whole, rel=0.1)


def test_types_that_need_an_imatrix() -> None:
    source = Source("blk.0.attn_q.weight", (4, 256), lambda: torch.zeros(4, 256))
    assert types_for(source, ["IQ2_XS", "Q4_K"], covered=False) == ["Q4_K"]
    assert types_for(source, ["IQ2_XS", "Q4_K"], covered=True) == ["IQ2_XS", "Q4_K"]
    with pytest.raises(
        UserError, match=r"blk\.0\.attn_q\.weight: every candidate \(IQ2_XS\) needs an importance matrix"
    ):
        types_for(source, ["IQ2_XS"], covered=False)


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GptOss"])
def test_gains_are_what_the_block_loses(
    tmp_path: Path,
    tiny_model: Callable[..., transformers.PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Of one tensor, computed again by hand on the whole model; and that nothing of the probing stays behind."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "m")
    ids = torch.randint(2, 250, (3, 24))
    monkeypatch.setattr("bitsmith.calibrate.importance.calibration_rows", lambda *_: ids)
    found = gains(tmp_path / "m", calib="t", progress=False)
    experts = name != "Llama"
    kinds = [f"ffn_{k}{'_exps' if experts else ''}" for k in ("gate", "up", "down")]
    assert set(found) == {
        f"blk.{layer}.{kind}.weight"
        for layer in (0, 1)
        for kind in ["attn_q", "attn_k", "attn_v", "attn_output", *kinds]
    }
    # Sharp attention multiplies a perturbation of q and k; weights of these models are large.
    assert all(0 < value < 100 for value in found.values()), found
    if experts:
        assert found["blk.1.ffn_gate_exps.weight"] == found["blk.1.ffn_up_exps.weight"]

    layer = model.model.layers[1]
    seen: dict[str, Tensor] = {}
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda module, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids)
        x, y = seen["x"].reshape(-1, seen["x"].shape[-1]), seen["y"]
        w = layer.self_attn.o_proj.weight
        rounded = restore(w.data, "Q4_0", None)
        own = relative_loss(w.data[None], rounded[None], x.square().mean(0)[None])
        w.copy_(rounded)
        model(ids)
    lost = float((seen["y"] - y).square().sum() / y.square().sum())
    assert found["blk.1.attn_output.weight"] == pytest.approx(lost / own, rel=1e-3)
