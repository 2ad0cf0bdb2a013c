"""llama.cpp's products through ctypes: the numbers of ours, in both of its configurations."""

import gc
from typing import Any

import pytest
import torch
from bitsmith.eval import ggml_peer
from bitsmith.eval.kernel_peers import PEERS
from bitsmith.eval.kernel_speed import random_weight
from bitsmith.kernels.dispatch import prepare
from bitsmith.kernels.spec import Spec
from bitsmith.quant_formats import gguf_blocks

CPU = torch.device("cpu")
KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XS", "NVFP4", "Q2_K", "MXFP4", "TQ2_0")


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        ggml_peer.load()
    except ImportError as error:
        pytest.skip(str(error))


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_ours(kind: str, rows: int) -> None:
    spec = gguf_blocks.spec(kind)
    assert spec is not None
    torch.manual_seed(0)
    q = random_weight(spec, (256, 1024), CPU)
    x = torch.randn(rows, 1024).bfloat16()
    ours = prepare(q, torch.bfloat16)(x).float()
    exact = x.float() @ q.dequantize().T
    held = ggml_peer.weights(q)
    assert list(held)[-1] == "blocks"
    for weight in held.values():
        graph = weight.bind(x)
        found = weight(graph)
        assert found.shape == (rows, 256) and weight.nbytes == 256 * gguf_blocks.row_bytes(kind, 1024)
        # Both round activations to 8 bits, each in its own groups.
        assert _relative(found, exact) < 2e-2 and _relative(found, ours) < 2e-2


def test_contenders_are_both_configurations_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_weight(Spec.parse("affine4.g32.sym"), (64, 256), CPU)
    both = ["llama.cpp", "llama.cpp --no-repack"]
    # Not every CPU has a layout to rearrange weights into.
    assert list(PEERS["llama.cpp"](q, torch.bfloat16)) == both[: len(ggml_peer.weights(q))]
    monkeypatch.setattr(ggml_peer, "_takes", lambda *_: False)
    assert {name: found.path for name, found in PEERS["llama.cpp"](q, torch.bfloat16).items()} == {both[0]: "blocks"}


@pytest.mark.parametrize("text", ["affine4.g128.asym", "trellis3.mcg", "affine4.g32.min"])
def test_weights_that_are_no_gguf_type_have_no_such_product(text: str) -> None:
    found = ggml_peer.weights(random_weight(Spec.parse(text), (64, 256), CPU))
    assert list(found) == (["blocks"] if text == "affine4.g32.min" else [])


def test_memory_goes_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[Any] = []
    real = ggml_peer.load().ggml_backend_buffer_free
    monkeypatch.setattr(
        ggml_peer.load(), "ggml_backend_buffer_free", lambda buffer: freed.append(buffer) or real(buffer)
    )
    (weight,) = ggml_peer.weights(random_weight(Spec.parse("affine8.g32.sym"), (64, 256), CPU)).values()
    graph = weight.bind(torch.randn(2, 256))
    weight(graph)
    freed.clear()
    del graph
    gc.collect()
    assert len(freed) == 1
    del weight
    gc.collect()
    assert len(freed) == 2
