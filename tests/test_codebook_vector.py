"""Codebooks of vectors, of several tables and of a table for each row, weight by weight against their definitions."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import bits, repack
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.families import family, scale_shape
from bitsmith.kernels.grid import Params
from bitsmith.kernels.pieces import pieces
from bitsmith.kernels.qtensor import QTensor, build, can_concat, codes_of, concat, core, matrix_shape
from bitsmith.kernels.spec import Spec
from safetensors.torch import load_file

SPECS = [
    "codebook16.v8.channel",
    "codebook8.v8.x2.channel",
    "codebook12.v8.channel",
    "codebook8.v4.x4.g64.f32",
    "codebook3.v4.x3.channel",
    "codebook6.v2.g24.bf16",
    "codebook8.v8.x2.g16x32",
    "codebook4.rowtable.channel",
    "codebook3.rowtable.g32",
    "codebook5.channel",
    "codebook10.channel",
]


def random_codebook(text: str, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> QTensor:
    spec = Spec.parse(text)
    codes = torch.randint(0, 1 << spec.width, (shape[0], -(-shape[1] // spec.vec)))
    if spec.table == "rowtable":
        entries = torch.randn(shape[0], 1 << spec.bits)
    elif spec.vec > 1:
        entries = torch.randn(spec.books, 1 << spec.bits, spec.vec)
    else:
        entries = torch.randn(1 << spec.bits)
    scales = torch.rand(scale_shape(spec, shape)) + 0.5
    scale = scales.to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[spec.scale])
    return QTensor(spec, shape, {"codes": bits.pack(codes, spec.width), "table": entries.to(dtype), "scales": scale})


def element(q: QTensor, n: int, k: int) -> float:
    """Weight [n, k] in float32, book after book."""
    spec = q.spec
    row = int.from_bytes(q.parts["codes"][n].numpy().tobytes(), "little")
    total = torch.zeros((), dtype=torch.float32)
    for book in range(spec.books):
        code = (row >> ((k // spec.vec * spec.books + book) * spec.bits)) & ((1 << spec.bits) - 1)
        at = {1: (code,), 3: (book, code, k % spec.vec)}.get(q.parts["table"].dim(), (n, code))
        total = total + q.parts["table"][at].float()
    scale = q.parts["scales"][n // spec.rows, 0 if spec.group == -1 else k // spec.group]
    return (total * scale.float()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", SPECS)
def test_dequantize_element_by_element(text: str, dtype: torch.dtype) -> None:
    """75 inputs: the last vector and the last group are cut short."""
    q = random_codebook(text, (18, 75), dtype)
    found = q.dequantize()
    assert found.shape == (18, 75) and found.dtype is torch.float32
    for n in range(18):
        for k in (*range(0, 75, 7), 73, 74):
            assert found[n, k].item() == element(q, n, k), (text, n, k)


def test_sizes_count_codes_and_tables() -> None:
    q = random_codebook("codebook8.v8.x2.channel", (16, 1024))
    # Two bytes per eight weights, two tables of 256 vectors of eight float16, a float16 scale a row.
    assert q.nbytes == 16 * 1024 // 4 + 2 * 256 * 8 * 2 + 16 * 2
    assert q.bpw == 8 * q.nbytes / (16 * 1024)


@pytest.mark.parametrize("text", [text for text in SPECS if "g16x" not in text])
def test_rows_concat_and_pieces(text: str) -> None:
    q = random_codebook(text, (24, 96))
    whole = q.dequantize()
    assert torch.equal(q.rows(8, 20).dequantize(), whole[8:20])
    halves = [q.rows(0, 7), q.rows(7, 24)]
    assert can_concat(halves)
    joined = concat(halves)
    assert all(torch.equal(joined.parts[name], t) for name, t in q.parts.items())
    assert torch.equal(torch.cat([piece.dequantize() for _, _, piece in pieces(q, 500)]), whole)
    if q.spec.table != "rowtable":
        assert not can_concat([q, random_codebook(text, (24, 96))]), "different tables"


@pytest.mark.parametrize("text", ["codebook16.v8.channel", "codebook8.v8.x2.channel", "codebook8.v4.x4.g64.f32"])
def test_shards_of_inputs(text: str) -> None:
    q = random_codebook(text, (6, 256))
    found = [q.shard(1, rank, 2).dequantize() for rank in range(2)]
    assert torch.equal(torch.cat(found, 1), q.dequantize())


def test_vectors_are_not_cut() -> None:
    with pytest.raises(ValueError, match="36 inputs cannot be cut into 3 whole groups and words"):
        random_codebook("codebook16.v8.channel", (6, 36)).shard(1, 0, 3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 75), (18, 256), (33, 320)])
@pytest.mark.parametrize("text", SPECS)
def test_repack_is_invertible(text: str, shape: tuple[int, int]) -> None:
    q = random_codebook(text, shape)
    assert repack.layout_problem(q) == ""
    packed = repack.pack(q)
    back = repack.unpack(packed)
    assert back.spec == q.spec and back.shape == q.shape and back.parts.keys() == q.parts.keys()
    assert all(torch.equal(back.parts[name], t) for name, t in q.parts.items())
    if shape[1] % 256 == 0:
        assert packed.parts.codes.nbytes == q.parts["codes"].nbytes


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("text", SPECS)
def test_product_on_the_cpu(text: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", kernels)
    q = random_codebook(text, (48, 160))
    product = prepare(q, torch.bfloat16)
    back = product.qtensor()
    assert back.spec == q.spec and all(torch.equal(back.parts[name], t) for name, t in q.parts.items())
    x = torch.randn(3, 160).bfloat16()
    wanted = x.double() @ q.dequantize().double().T
    assert (product(x).double() - wanted).norm() / wanted.norm() < 8e-3


def test_aqlm_tensors_as_they_are(shared: Callable[[str], Path]) -> None:
    """A checkpoint's own tensors, weight [n, k] = scale[n] * codebook[code[n, k // 8], k % 8]."""
    tensors = load_file(shared("interop/aqlm-1x12g8") / "model.safetensors")
    name = "model.layers.0.mlp.down_proj."
    codes, table, scale = (tensors[name + part] for part in ("codes", "codebooks", "scales"))
    parts = {
        "codes": bits.pack(codes.flatten(1).int() & 0xFFF, 12),
        "table": table.squeeze(2),
        "scales": scale.flatten(1),
    }
    q = QTensor(Spec.parse("codebook12.v8.channel"), (codes.shape[0], 8 * codes.shape[1]), parts)
    wanted = table[0, :, 0].float()[codes[..., 0].long() & 0xFFF].flatten(1) * scale.flatten(1).float()
    assert torch.equal(q.dequantize(), wanted)
    assert torch.equal(codes_of(q), codes[..., 0].int() & 0xFFF)
    assert core(q).parts.keys() == q.parts.keys() and matrix_shape(q.spec, q.shape) == q.shape


def test_quantizing_is_refused() -> None:
    spec = Spec.parse("codebook8.v8.x2.channel")
    message = (
        "codebook8.v8.x2.channel: its table comes with a checkpoint, and nothing here chooses one; "
        "to quantize, name a table (nf4, fp4, iq4nl, sign) or take another family"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        family(spec).grid.fit(torch.randn(8, 64), spec)


def test_build_packs_whole_vectors_of_codes() -> None:
    q = random_codebook("codebook8.v8.x2.channel", (4, 64))
    params = Params(q.parts["scales"].float(), parts={"table": q.parts["table"]})
    again = build(codes_of(q), params, q.spec, q.shape)
    assert all(torch.equal(again.parts[name], t) for name, t in q.parts.items())
