"""What tensors lose as each type: measured once, on a sample, weighed by what their errors do to the predictions."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bitsmith.calibrate import rtn
from bitsmith.calibrate.allocate import Measured, allocate
from bitsmith.calibrate.fisher import Curvature
from bitsmith.calibrate.method import Settings
from bitsmith.calibrate.sensitivity import Source, expected_kld, measure, types_for
from bitsmith.errors import UserError
from bitsmith.quant_formats import gguf_blocks
from bitsmith.quant_formats.gguf_mixture import tensor_bytes
from torch import Tensor

CANDIDATES = ("Q4_0", "Q5_0", "Q8_0", "F16")


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

    return [Source(n, tuple(w.shape), lambda n=n: take(n), [curvature(w.shape)]) for n, w in weights.items()], read


def curvature(shape: Sequence[int]) -> Curvature:
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return Curvature(torch.arange(1.0, rows + 1).double(), torch.arange(1.0, columns + 1).double() / columns)


def test_losses_bytes_and_fallbacks(tmp_path: Path) -> None:
    found, _ = sources()
    measured = Measured(tmp_path / "m.json", {})
    measure(found, CANDIDATES, restore, None, measured, progress=False)
    assert list(measured.table["blk.0.ffn_down.weight"]) == ["F16"]
    for source in found[:2]:
        choices = measured.table[source.name]
        assert {k: c.bytes for k, c in choices.items()} == {k: tensor_bytes(k, source.shape) for k in CANDIDATES}
        losses = [choices[k].loss for k in CANDIDATES]
        assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-4 * losses[0]
        w, matter = source.weight(), curvature(source.shape)
        error = torch.stack([restore(m, "Q4_0", None) for m in w.view(-1, *w.shape[-2:])]).view(-1, w.shape[-1])
        fisher = matter.rows[:, None] * matter.columns
        expected = float((fisher * (error - w.view(error.shape)).double() ** 2).sum()) / 2
        assert choices["Q4_0"].loss == pytest.approx(expected, rel=1e-5)
    most = sum(c["F16"].bytes for c in measured.table.values())
    assert set(allocate(measured.table, most).types.values()) == {"F16"}


def test_every_use_of_a_weight_counts() -> None:
    error = torch.randn(1, 6, 4)
    both = expected_kld(error, [curvature((6, 4)), curvature((6, 4))], (6, 4))
    assert both == pytest.approx(2 * expected_kld(error, [curvature((6, 4))], (6, 4)))
    assert expected_kld(error, [], (6, 4)) == 0


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    found, read = sources()
    measure(found[:2], CANDIDATES, restore, None, Measured(tmp_path / "m.json", {}), progress=False)
    first = list(read)
    again = Measured(tmp_path / "m.json", {})
    measure(found, CANDIDATES, restore, None, again, progress=False)
    assert read[len(first) :] == ["blk.0.ffn_down.weight"] and len(again.table) == 3


def test_large_tensors_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    w = torch.randn(512, 64) * torch.linspace(0.1, 3, 512)[:, None]
    seen: list[tuple[int, ...]] = []

    def counting(matrix: Tensor, kind: str, importance: Tensor | None) -> Tensor:
        seen.append(tuple(matrix.shape))
        return restore(matrix, kind, importance)

    monkeypatch.setattr("bitsmith.calibrate.sensitivity._SAMPLE", 4096)
    measured = Measured(tmp_path / "m.json", {})
    matter = Curvature(torch.ones(512).double(), torch.ones(64).double())
    measure([Source("a.weight", (512, 64), lambda: w, [matter])], ["Q4_0"], counting, None, measured, progress=False)
    assert seen == [(64, 64)]
    whole = expected_kld((restore(w, "Q4_0", None) - w)[None], [matter], (1, 64))
    assert measured.table["a.weight"]["Q4_0"].loss == pytest.approx(whole, rel=0.1)


def test_types_that_need_an_imatrix() -> None:
    source = Source("blk.0.attn_q.weight", (4, 256), lambda: torch.zeros(4, 256), [])
    assert types_for(source, ["IQ2_XS", "Q4_K"], covered=False) == ["Q4_K"]
    assert types_for(source, ["IQ2_XS", "Q4_K"], covered=True) == ["IQ2_XS", "Q4_K"]
    with pytest.raises(
        UserError, match=r"blk\.0\.attn_q\.weight: every candidate \(IQ2_XS\) needs an importance matrix"
    ):
        types_for(source, ["IQ2_XS"], covered=False)
