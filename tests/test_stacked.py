"""Stacked weights are packed piece by piece: bit for bit what packing a copy of all of them gives."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.eval.random_models import SHAPES, write_checkpoint
from bitsmith.kernels import cpu, dispatch, native, stacked
from bitsmith.kernels.qtensor import QTensor, concat
from bitsmith.models import checkpoint, load
from bitsmith.models.linear import QuantLinear
from bitsmith.quant_formats import gptq
from torch import Tensor

from .test_native import random_qtensor

pytestmark = pytest.mark.skipif(
    native.best_path() in ("", "generic"),
    reason="no native library for this processor, or built without a C++ compiler",
)

SPECS = (
    "affine3.g64.asym", "affine4.g128.sym", "affine4.g32.zf16", "affine8.channel.asym", "minifloat8.e4m3.channel.f32",
    "codebook4.nf4.g64.f32",
)  # fmt: skip


def same(found: QTensor, wanted: QTensor) -> bool:
    assert (found.spec, found.shape, list(found.parts)) == (wanted.spec, wanted.shape, list(wanted.parts))
    return all(torch.equal(found.parts[name], part) for name, part in wanted.parts.items())


def transposed(q: QTensor) -> QTensor:
    """The same, its matrices lying as GPTQ has them."""
    return QTensor(q.spec, q.shape, {k: t.T.contiguous().T if t.dim() == 2 else t for k, t in q.parts.items()})


def refuse(parts: Any) -> Tensor:
    raise AssertionError("pieces were copied together")


@pytest.mark.parametrize("rows", [(32, 16, 16), (48, 7), (5, 16)])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("text", SPECS)
def test_packed_as_one(text: str, columns_first: bool, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random_qtensor(text, (n, 256)) for n in rows]
    names = {name for name, t in weights[0].parts.items() if t.dim() == 2 and name != "table"}
    parts = {k: torch.cat([w.parts[k] for w in weights]) if k in names else t for k, t in weights[0].parts.items()}
    wanted = QTensor(weights[0].spec, (sum(rows), 256), parts)
    if columns_first:
        weights = [transposed(w) for w in weights]
    if all(n % native.ROWS == 0 for n in rows[:-1]):
        monkeypatch.setattr(stacked, "_stack", refuse)
    product, other = cpu.prepare(concat(weights)), cpu.prepare(wanted)
    assert not isinstance(product, cpu.LookUp) and not isinstance(other, cpu.LookUp)
    assert product.parts.keys() == other.parts.keys()
    assert all(torch.equal(product.parts[name], part) for name, part in other.parts.items())
    assert same(product.qtensor(), wanted)


def test_parts_are_held_once() -> None:
    weights = [random_qtensor("affine4.g64.asym", (n, 128)) for n in (16, 8)]
    parts = concat(weights).parts
    assert isinstance(parts, stacked.Stacked) and len(parts.pieces("codes")) == 2
    assert parts.shapes == {name: part.shape for name, part in parts.items()}
    assert all(len(parts.pieces(name)) == 1 and parts[name] is parts[name] for name in parts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_numbers_by_block(dtype: torch.dtype) -> None:
    numbers = (torch.rand(41, 5) * 200).to(dtype)
    padded = torch.cat([numbers, torch.zeros(7, 5, dtype=dtype)])
    wanted = padded.view(3, 16, 5).transpose(1, 2)
    for lying in (numbers, numbers.T.contiguous().T):
        assert torch.equal(native.by_block([lying]), wanted)
        assert torch.equal(native.by_block([lying[:32], lying[32:]]), wanted)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("width", gptq.BITS)
def test_symmetric_zero_points_by_their_words(width: int, version: str) -> None:
    recipe = gptq.detect({"quant_method": "gptq", "bits": width, "checkpoint_format": version})
    assert recipe is not None
    zeros = torch.full((3, 64), 1 << (width - 1), dtype=torch.uint8)
    assert gptq._symmetric(gptq._pack_zeros(zeros, width, recipe), width, recipe)
    for column in range(64):
        other = zeros.clone()
        other[1, column] -= 1
        assert not gptq._symmetric(gptq._pack_zeros(other, width, recipe), width, recipe)


def test_siblings_of_a_gptq_checkpoint_are_never_copied_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path, 4, 32, 8)
    ckpt = checkpoint.open_checkpoint(tmp_path)
    monkeypatch.setattr(stacked, "_stack", refuse)
    model = load.load_model(tmp_path, "cpu", torch.bfloat16)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert any(name.endswith("k_proj") and m.matmul.name.endswith("[1]") for name, m in linears.items())
    for name, m in linears.items():
        assert same(m.qtensor(), ckpt.qtensor(f"{name}.weight", (m.out_features, m.in_features)))


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float32, ""), (torch.bfloat16, "reference")])
def test_other_products_hold_whole_parts(dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        monkeypatch.setenv("BITSMITH_KERNELS", kernels)
    found = dispatch.prepare(concat([random_qtensor("affine4.g64.asym", (16, 128)) for _ in range(2)]), dtype)
    assert isinstance(found, dispatch.Reference) and isinstance(found.q.parts, dict)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_headers_of_all_files_are_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path, 4, 32, 8)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)))
    files = checkpoint.open_checkpoint(tmp_path).files
    assert len(files) > 1 and asked == [(0, checkpoint._HEADER)] * len(files)
