"""GGUF blocks packed straight from the file: bit for bit what the torch route through the common form gives."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.eval.random_models import SHAPES, write_gguf
from bitsmith.kernels import blocks, cpu, native
from bitsmith.kernels.qtensor import QTensor, concat
from bitsmith.models import load
from bitsmith.models.embedding import QuantEmbedding
from bitsmith.models.gguf_checkpoint import GGUFCheckpoint
from bitsmith.models.linear import QuantLinear
from bitsmith.quant_formats import gguf_blocks
from bitsmith.quant_formats.gguf_in_place import in_place
from torch import Tensor

from . import gguf_bytes

pytestmark = pytest.mark.skipif(
    native.best_path() in ("", "generic"),
    reason="no native library for this processor, or built without a C++ compiler",
)

NAMES = (
    "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
SHAPES_OF = ((48, 512), (33, 256), (1, 1024), (5, 768))


def same(found: QTensor, wanted: QTensor) -> bool:
    """Bit for bit, NaN included."""
    assert (found.spec, found.shape, set(found.parts)) == (wanted.spec, wanted.shape, set(wanted.parts))
    return all(identical(found.parts[name], part) for name, part in wanted.parts.items())


def identical(a: Tensor, b: Tensor) -> bool:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def held(q: QTensor) -> bool:
    return bool(blocks.in_place([q.parts]))


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(NAMES, SHAPES_OF)))
def test_packed_as_by_way_of_the_common_form(name: str, shape: tuple[int, int]) -> None:
    raw = gguf_bytes.random_rows(name, *shape)
    wanted, found = gguf_blocks.unpack(name, raw, shape), in_place(name, raw, shape)
    assert held(found) and blocks.shapes(found.parts) == {part: t.shape for part, t in wanted.parts.items()}
    product, other = cpu.prepare(found), cpu.prepare(wanted)
    assert held(found), "a part was asked for on the way"
    assert isinstance(other, cpu.LookUp) or product.parts.keys() == other.parts.keys()
    assert isinstance(other, cpu.LookUp) or all(identical(product.parts[part], t) for part, t in other.parts.items())
    assert product.nbytes == other.nbytes and same(product.qtensor(), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_stacked_and_reordered_where_they_lie(name: str) -> None:
    raw = gguf_bytes.random_rows(name, 40, 256)
    order = torch.randperm(24)
    pieces = [(raw[:24], order), (raw[24:33], None), (raw[33:], None)]
    found = concat([in_place(name, rows, (rows.shape[0], 256), which) for rows, which in pieces])
    wanted = gguf_blocks.unpack(name, torch.cat([raw[:24][order], raw[24:]]), (40, 256))
    assert held(found) and same(cpu.prepare(found).qtensor(), wanted)


@pytest.mark.parametrize("name", gguf_bytes.LAYOUTS)
def test_parts_are_read_when_asked_for_and_held_once(name: str) -> None:
    raw = gguf_bytes.random_rows(name, 9, 512)
    order = torch.arange(9).flip(0)
    found = in_place(name, raw, (9, 512), order)
    assert held(found) == (name in NAMES)
    assert same(found, gguf_blocks.unpack(name, raw[order], (9, 512))) and not held(found)
    assert "perm" not in found.parts and found.parts.get("perm") is None


def test_it_is_unpacked_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert not held(in_place("Q4_K", gguf_bytes.random_rows("Q4_K", 3, 256), (3, 256)))


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "Q4_0"])
def test_a_file_loaded_both_ways(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight, and logits, are those of the route through the common form."""
    write_gguf(SHAPES["tiny"], tmp_path / "model.gguf", kind)
    ids = torch.arange(12)[None]

    def loaded() -> tuple[dict[str, QTensor], Tensor]:
        model = load.load_model(tmp_path / "model.gguf", "cpu", torch.bfloat16)
        modules = dict(model.named_modules())
        table = model.get_input_embeddings()
        assert isinstance(table, QuantEmbedding) and not any(map(held, [table.qtensor()]))
        weights = {n: m.qtensor() for n, m in modules.items() if isinstance(m, QuantLinear | QuantEmbedding)}
        with torch.no_grad():
            return weights, model(ids).logits

    packed: list[Any] = []
    real = blocks.packed
    monkeypatch.setattr(blocks, "packed", lambda *which: packed.append(which) or real(*which))
    found, logits = loaded()
    assert packed
    monkeypatch.setattr("bitsmith.models.gguf_checkpoint.in_place", _unpacked)
    packed.clear()
    wanted, other = loaded()
    assert not packed and found.keys() == wanted.keys() and torch.equal(logits, other)
    assert all(same(found[name], q) for name, q in wanted.items())


def _unpacked(name: str, raw: Tensor, shape: tuple[int, int], order: Tensor | None = None) -> QTensor:
    return gguf_blocks.unpack(name, raw if order is None else raw[order], shape)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, False), (torch.bfloat16, True)])
def test_other_models_hold_no_blocks(dtype: torch.dtype, exact: bool, tmp_path: Path) -> None:
    """What is not packed is read while the file is there."""
    write_gguf(SHAPES["tiny"], tmp_path / "model.gguf", "Q4_0")
    model = load.load_model(tmp_path / "model.gguf", "cpu", dtype, exact=exact)
    weights = [m.qtensor() for m in model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    assert weights and not any(map(held, weights))


def test_the_reference_path_holds_no_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(SHAPES["tiny"], tmp_path / "model.gguf", "Q4_0")
    name = next(n for n, packed in GGUFCheckpoint(tmp_path / "model.gguf").weights.items() if packed)
    monkeypatch.setenv("BITSMITH_KERNELS", "reference")
    model = load.load_model(tmp_path / "model.gguf", "cpu", torch.bfloat16)
    weights = [m.qtensor() for m in model.modules() if isinstance(m, QuantLinear)]
    assert name and weights and not any(map(held, weights))
