"""Registered operators: schema, fakes and autograd registration as torch checks them, and graphs that hold them."""

from typing import Any

import pytest
import torch
from bitsmith.kernels import cuda, fused, grouped, ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

COS = torch.rand(3, 8)
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (fused.rms_norm, (torch.randn(3, 16), torch.randn(16), 1e-5, "llama")),
    (fused.rms_norm, (torch.randn(16, 3).T, torch.randn(16), 1e-5, "gemma")),
    (fused.rms_norm, (torch.randn(2, 3, 4).bfloat16(), torch.randn(4).bfloat16(), 1e-5, "float")),
    (fused.rope, (torch.randn(3, 4, 8), torch.randn(2, 3, 8).transpose(0, 1), COS, COS, False)),
    (fused.rope, (torch.randn(3, 4, 10), torch.randn(3, 1, 10), COS, COS, True)),
    (fused.gated, (torch.randn(3, 10)[:, ::2], torch.randn(3, 5), "silu")),
    (fused.gated, (torch.randn(2, 3, 5).half(), torch.randn(2, 3, 5).half(), "gelu_tanh")),
]


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=[f"{i}-{op.name()}" for i, (op, _) in enumerate(CASES)])
def test_torch_accepts_the_registration(op: Any, arguments: tuple[Any, ...]) -> None:
    done = torch.library.opcheck(op, arguments)
    assert set(done.values()) == {"SUCCESS"}


def parts() -> list[Tensor | None]:
    return [torch.zeros(8, 5, dtype=torch.int32), torch.zeros(2, 5).half(), *[None] * 5]


def test_fakes_of_products_have_the_shapes_and_dtypes_of_results() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 64, dtype=torch.bfloat16)
        y = cuda.multiply(x, parts(), "affine4.g32.sym", 5)
        assert (y.shape, y.dtype) == ((3, 5), torch.bfloat16)
        w = cuda.dequantize(parts(), "affine4.g32.sym", 5, 64, torch.float16)
        assert (w.shape, w.dtype) == ((5, 64), torch.float16)
        order, starts = torch.empty(6, dtype=torch.int64), torch.empty(4, dtype=torch.int32)
        y = grouped.multiply(x, parts(), order, starts, None, "affine4.g32.sym", 5, 2)
        assert (y.shape, y.dtype) == ((6, 5), torch.bfloat16)


def test_a_traced_graph_holds_one_node_per_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        h = cuda.multiply(fused.rms_norm(x, weight, 1e-5, "llama"), parts(), "affine4.g32.sym", 6)
        return fused.gated(*h.chunk(2, -1), "silu")

    graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(3, 64), torch.randn(64))
    called = [str(node.target) for node in graph.graph.nodes if "bitsmith" in str(node.target)]
    assert called == ["bitsmith.rms_norm.default", "bitsmith.matmul.default", "bitsmith.gated.default"]


def test_a_writing_operator_is_defined_the_same_way() -> None:
    """The pattern of ops.py for a store: mutates its argument, returns nothing."""

    def store(cache: Tensor, x: Tensor, slots: Tensor) -> None:
        cache.index_copy_(0, slots, x)

    op = ops.define("test_store(Tensor(a!) cache, Tensor x, Tensor slots) -> ()", store, lambda *_: None)
    cache = torch.zeros(4, 2)
    op(cache, torch.ones(1, 2), torch.tensor([3]))
    assert cache[3].tolist() == [1, 1] and not cache[:3].any()
    done = torch.library.opcheck(op, (torch.zeros(4, 2), torch.ones(2, 2), torch.tensor([3, 1])))
    assert set(done.values()) == {"SUCCESS"}
