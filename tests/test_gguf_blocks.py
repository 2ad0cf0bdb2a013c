"""GGUF blocks: numbers bit for bit those of gguf-py and of llama.cpp's C, bytes back as they were, sizes of the file."""

import re

import numpy
import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.kernels import repack
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.families import scales
from bitsmith.kernels.qtensor import QTensor, can_concat, concat
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import gguf_blocks
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from . import gguf_bytes

NAMES = tuple(gguf_bytes.LAYOUTS)
SHAPE = (5, 1024)


def random_qtensor(name: str, shape: tuple[int, int] = SHAPE, calm: bool = False) -> QTensor:
    return gguf_blocks.unpack(name, gguf_bytes.random_rows(name, *shape, calm=calm), shape)


def test_every_type_of_gguf_py_is_known() -> None:
    activations, integers = {"Q8_1", "Q8_K"}, {"I8", "I16", "I32", "I64", "F64"}
    known = {kind.name for kind in GGMLQuantizationType} - activations - integers
    assert known <= gguf_blocks.TYPES.keys() and set(NAMES) == {n for n, s in gguf_blocks.TYPES.items() if s}
    for name in known:
        width, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert gguf_blocks.row_bytes(name, 4 * width) == 4 * size
    assert [gguf_blocks.spec(name) for name in ("F32", "F16", "BF16")] == [None] * 3
    assert gguf_blocks.spec("Q4_K") == Spec.parse("affine4.g32.min.u6:f16:8")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_gguf_py(name: str) -> None:
    if name in gguf_bytes.NOT_IN_GGUF_PY:
        pytest.skip("gguf-py does not decode it; the C test does")
    raw = gguf_bytes.random_rows(name, *SHAPE)
    with numpy.errstate(over="ignore"):
        wanted = torch.from_numpy(quants.dequantize(raw.numpy(), GGMLQuantizationType[name]))
    found = gguf_blocks.unpack(name, raw, SHAPE).dequantize()
    assert torch.equal(found, wanted) and wanted.isfinite().float().mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_llama_cpp(name: str) -> None:
    raw = gguf_bytes.random_rows(name, *SHAPE)
    assert torch.equal(gguf_blocks.unpack(name, raw, SHAPE).dequantize(), gguf_bytes.c_dequantize(name, raw, SHAPE[1]))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_come_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gguf_bytes.random_rows(name, *SHAPE)
    whole = gguf_blocks.unpack(name, raw, SHAPE)
    assert whole.spec == gguf_blocks.spec(name) and torch.equal(gguf_blocks.pack(name, whole), raw)
    monkeypatch.setattr(gguf_blocks, "_PIECE", 2 * SHAPE[1])
    pieces = gguf_blocks.unpack(name, raw, SHAPE)
    assert all(torch.equal(pieces.parts[part], t) for part, t in whole.parts.items())
    assert torch.equal(gguf_blocks.pack(name, pieces), raw)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_llama_cpp_come_back(name: str) -> None:
    """A matrix with a row of zeros and an outlier, as its quantizer writes it."""
    weight = torch.randn(SHAPE) * 0.02
    weight[1], weight[2, 77] = 0, 0.3
    raw = gguf_bytes.c_quantize(name, weight)
    q = gguf_blocks.unpack(name, raw, SHAPE)
    assert torch.equal(gguf_blocks.pack(name, q), raw)
    assert float((q.dequantize() - weight).norm() / weight.norm()) < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_the_file(name: str) -> None:
    """TQ1_0's five trits a byte become 2 bits each."""
    q = random_qtensor(name, (8, 4096))
    limit = {"TQ1_0": 1.23}.get(name, 1.001)
    assert q.nbytes <= limit * 8 * gguf_blocks.row_bytes(name, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent(name: str) -> None:
    q = random_qtensor(name)
    whole = q.dequantize()
    assert torch.equal(q.rows(1, 4).dequantize(), whole[1:4])
    halves = [q.rows(0, 2), q.rows(2, 5)]
    assert can_concat(halves)
    joined = concat(halves)
    assert all(torch.equal(joined.parts[part], t) for part, t in q.parts.items())
    wide = random_qtensor(name, (3, 8192))
    shards = [wide.shard(1, rank, 2).dequantize() for rank in range(2)]
    assert torch.equal(torch.cat(shards, 1), wide.dequantize())


def test_shards_keep_whole_words_of_scale_codes() -> None:
    """256 inputs of Q4_K are 48 bits of scales."""
    with pytest.raises(ValueError, match="512 inputs cannot be cut into 2 whole groups"):
        random_qtensor("Q4_K", (3, 512)).shard(1, 0, 2)


@pytest.mark.parametrize("path", ["", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_products_with_16_bit_activations(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", path)
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    q = random_qtensor(name, (48, 1024), calm=True)
    product = prepare(q, torch.bfloat16)
    back = product.qtensor()
    assert back.spec == q.spec and all(torch.equal(back.parts[part], t) for part, t in q.parts.items())
    for rows in (1, 3, 70):
        x = torch.randn(rows, 1024).bfloat16()
        wanted = x.double() @ q.dequantize().double().T
        assert (product(x).double() - wanted).norm() / wanted.norm() < 8e-3


@pytest.mark.parametrize("name", NAMES)
def test_device_layout_holds_every_type(name: str) -> None:
    q = random_qtensor(name, (16, 512))
    assert repack.layout_problem(q) == ""
    back = repack.unpack(repack.pack(q))
    assert back.spec == q.spec and all(torch.equal(back.parts[part], t) for part, t in q.parts.items())


@pytest.mark.parametrize("name", NAMES)
def test_device_memory_is_that_of_the_file(name: str) -> None:
    """But for tables, one a device, and TQ1_0 (test_memory_is_that_of_the_file)."""
    packed = repack.pack(random_qtensor(name, (256, 1024)))
    held = sum(t.nbytes for part, t in packed.parts._asdict().items() if t is not None and part != "table")
    limit = {"TQ1_0": 1.23}.get(name, 1.03)
    assert held <= limit * 256 * gguf_blocks.row_bytes(name, 1024)


def test_scale_of_a_whole_tensor() -> None:
    """NVFP4 files may hold one more number a tensor."""
    q = random_qtensor("NVFP4")
    scaled = QTensor(q.spec, q.shape, {**q.parts, "global_scale": torch.tensor(0.37)})
    assert torch.equal(scales(scaled.spec, scaled.parts), scales(q.spec, q.parts) * torch.tensor(0.37))
    assert torch.equal(scaled.rows(1, 3).dequantize(), scaled.dequantize()[1:3])


MESSAGES = {
    "GGUF tensor type 'Q9_K' is not known here; accepted: F32, F16, BF16, Q1_0": lambda: gguf_blocks.spec("Q9_K"),
    "GGUF type Q4_K has blocks of 256 weights, and a row of 300 is not": lambda: gguf_blocks.row_bytes("Q4_K", 300),
    "F16 tensors hold numbers, not blocks; accepted: Q1_0": lambda: gguf_blocks.unpack(
        "F16", torch.zeros(1, 8, dtype=torch.uint8), (1, 4)
    ),
    "Q4_0 rows of a 2 x 64 weight are torch.uint8 (2, 35); accepted: torch.uint8 (2, 36)": lambda: gguf_blocks.unpack(
        "Q4_0", torch.zeros(2, 35, dtype=torch.uint8), (2, 64)
    ),
    "a tensor of spec affine4.g32.sym cannot be written as GGUF type Q4_1, which is affine4.g32.min": lambda: (
        gguf_blocks.pack("Q4_1", random_qtensor("Q4_0"))
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MESSAGES[message]()
