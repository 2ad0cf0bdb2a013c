"""Experts, native low-precision dots and fused steps against their torch twins, in Triton's interpreter.

Run by test_triton.py, as triton_interpreted.py is, which also has the helpers.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.kernels import cuda, grouped
from bitsmith.kernels.cuda import CudaMatmul
from bitsmith.kernels.qtensor import QTensor
from bitsmith.kernels.tiles import Parts
from bitsmith.models import linear
from torch import Tensor


def _helpers() -> Any:
    spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("triton_interpreted.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helpers = _helpers()
_poison = helpers._poison
before_nan, random_qtensor, relative_rms, TOLERANCE = (
    helpers.before_nan, helpers.random_qtensor, helpers.relative_rms, helpers.TOLERANCE,
)  # fmt: skip


def experts_of(text: str, count: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[QTensor], Any]:
    tensors = [random_qtensor(text, shape) for _ in range(count)]
    product = grouped.stack([CudaMatmul(q, dtype) for q in tensors])
    assert product is not None
    product.parts = [t if t is None or t.stride(0) == 0 else before_nan(t) for t in product.parts]
    return tensors, product


def twin(tensors: list[QTensor], x: Tensor, experts: Tensor, repeat: int, weights: Tensor | None) -> Tensor:
    """float64 [P, N], pair by pair."""
    rows = []
    for pair, expert in enumerate(experts.reshape(-1).tolist()):
        if expert >= len(tensors):
            rows.append(torch.zeros(tensors[0].shape[0], dtype=torch.float64))
            continue
        y = tensors[expert].dequantize().double() @ x[pair // repeat].double()
        rows.append(y if weights is None else y * weights.reshape(-1)[pair].double())
    return torch.stack(rows)


def check_grouped(text: str, experts: Tensor, count: int, repeat: int, weighted: bool, capability: int = 80) -> None:
    shape = (39, 172) if "g64" not in text else (39, 192)
    tensors, product = experts_of(text, count, shape, torch.float16)
    x = before_nan(torch.randn(experts.numel() // repeat, shape[1]).half())
    weights = torch.rand(experts.shape) if weighted else None
    found = product(x, grouped.route(experts, count), repeat, weights)
    wanted = twin(tensors, x, experts, repeat, weights)
    assert found.shape == wanted.shape and found.dtype == torch.float16
    assert relative_rms(found, wanted) < TOLERANCE[torch.float16]


FAMILIES = ["affine4.g32.asym", "minifloat8.e4m3.tensor.f32", "codebook4.nf4.g64.u8:f32:256", "affine3.channel.sym"]


@pytest.mark.parametrize("text", FAMILIES)
def test_experts_of_one_token(text: str) -> None:
    """Five of seven experts once each: the multiply-add body."""
    assert grouped.plan(5, 7, 80).kernel == "gemv"
    check_grouped(text, torch.tensor([[6, 0, 3, 2, 5]]), 7, 5, weighted=False)


@pytest.mark.parametrize("text", FAMILIES)
def test_experts_of_many_tokens(text: str) -> None:
    """Expert 1 gets 21 of 36 rows (two blocks), 2 none, and five rows belong to an expert that is elsewhere."""
    assert grouped.plan(36, 4, 80).kernel == "gemm"
    experts = torch.tensor([1] * 21 + [0] * 6 + [3] * 4 + [4] * 5)[torch.randperm(36)].view(12, 3)
    check_grouped(text, experts, 4, 3, weighted=True)


@pytest.mark.parametrize("repeat", [1, 2])
def test_experts_on_an_old_gpu(repeat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "capability_of", lambda device: 75)
    assert grouped.plan(10, 3, 75) == grouped.Plan("gemv", {"BM": 4, "BN": 32, "BK": 64}, 4, 2)
    check_grouped("affine4.g32.asym", torch.randint(0, 4, (5, 2)), 3, repeat, weighted=True)


def test_experts_with_many_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_DOT_ROWS", 4)
    assert grouped.plan(24, 3, 80).kernel == "dequant"
    check_grouped("affine4.g32.asym", torch.randint(0, 4, (12, 2)), 3, 2, weighted=True)
    check_grouped("affine4.g32.asym", torch.randint(1, 3, (12, 2)), 3, 1, weighted=False)


@pytest.mark.parametrize(("tokens", "k", "count"), [(1, 1, 1), (3, 2, 5), (1, 8, 128), (16, 4, 7), (33, 2, 4)])
def test_sorting_pairs(tokens: int, k: int, count: int) -> None:
    """In one launch, and (66 pairs) by torch; stable, with experts that are elsewhere."""
    experts = torch.randint(0, count + 3, (tokens, k))
    routing = grouped.route(experts, count)
    order, starts = grouped.sort_twin(experts, count)
    assert torch.equal(routing.order, order) and torch.equal(routing.starts, starts)
    flat = experts.reshape(-1).clamp(max=count)
    for e in range(count + 1):
        mine = routing.order[routing.starts[e] : routing.starts[e + 1]]
        assert torch.equal(mine, (flat == e).nonzero()[:, 0])


def test_no_tokens_and_one_expert() -> None:
    _, product = experts_of("affine4.g32.asym", 1, (5, 64), torch.float16)
    assert product(torch.randn(0, 64), grouped.route(torch.zeros(0, 2, dtype=torch.int64), 1), 2).shape == (0, 5)
    check_grouped("affine4.g32.asym", torch.zeros(1, 1, dtype=torch.int64), 1, 1, weighted=False)


def test_stacked_experts_are_held_once_and_still_work_alone() -> None:
    tensors = [random_qtensor("codebook4.nf4.g64.f32", (7, 64)) for _ in range(3)]
    matmuls = [CudaMatmul(q, torch.float16) for q in tensors]
    product = grouped.stack(matmuls)
    assert product is not None
    for index, (q, matmul) in enumerate(zip(tensors, matmuls, strict=True)):
        codes = product.parts[0]
        assert codes is not None and matmul.packed.parts.codes.data_ptr() == codes[index].data_ptr()
        assert torch.equal(matmul.weight(torch.float32), q.dequantize())
        back = matmul.qtensor()
        assert all(torch.equal(back.parts[name], part) for name, part in q.parts.items())
    table = product.parts[Parts._fields.index("table")]
    assert table is not None and table.stride(0) == 0


def test_unequal_experts_stay_apart() -> None:
    def make(text: str, shape: tuple[int, int]) -> CudaMatmul:
        return CudaMatmul(random_qtensor(text, shape), torch.float16)

    one = make("affine4.g32.asym", (8, 64))
    assert grouped.stack([one, make("affine4.g32.sym", (8, 64))]) is None
    assert grouped.stack([one, make("affine4.g32.asym", (9, 64))]) is None
    assert grouped.stack([make("affine4.g32.asym.perm", (8, 64))] * 2) is None
    assert grouped.stack([one, object()]) is None


def test_every_part_of_a_weight_moves_with_its_expert() -> None:
    """The kernel names each part: a new one must be named there too."""
    source = Path(grouped.__file__).read_text()
    assert [name for name in Parts._fields if f"{name}=parts.{name}" not in source] == []


class _Experts(torch.nn.Module):
    """What transformers' experts modules look like to `experts_forward`."""

    num_experts, has_gate, is_transposed = 4, True, False

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.has_bias = has_bias
        self.gate_up_proj_bias, self.down_proj_bias = torch.randn(4, 48).half(), torch.randn(4, 32).half()

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_models_experts_run_grouped(tokens: int, has_bias: bool) -> None:
    """The same layer expert by expert (which an observer forces) and grouped."""
    module, seen = _Experts(has_bias), []
    for name, shape in (("gate_up_proj", (48, 32)), ("down_proj", (32, 24))):
        matmuls = [CudaMatmul(random_qtensor("affine4.g32.asym", shape), torch.float16) for _ in range(4)]
        linear.set_expert_weight(module, name, matmuls)
    assert module.__dict__["grouped_experts"].keys() == {"gate_up_proj", "down_proj"}
    hidden = torch.randn(tokens, 32).half() / 16
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2)
    found = linear.experts_forward(module, hidden, index, weights)
    module.__dict__["observe_expert"] = lambda name, expert, x: seen.append(name)
    wanted = linear.experts_forward(module, hidden, index, weights)
    assert seen and found.dtype == torch.float16
    assert relative_rms(found, wanted.double()) < 2 * TOLERANCE[torch.float16]


def test_an_expert_that_is_elsewhere_adds_nothing() -> None:
    module = _Experts(has_bias=True)
    for name, shape in (("gate_up_proj", (48, 32)), ("down_proj", (32, 24))):
        matmuls = [CudaMatmul(random_qtensor("affine4.g32.asym", shape), torch.float16) for _ in range(4)]
        linear.set_expert_weight(module, name, matmuls)
    hidden, weights = torch.randn(3, 32).half() / 16, torch.rand(3, 2)
    found = linear.experts_forward(module, hidden, torch.tensor([[1, 4], [4, 4], [0, 2]]), weights)
    alone = linear.experts_forward(module, hidden[:1], torch.tensor([[1]]), weights[:1, :1])
    assert relative_rms(found[:1], alone.double()) < TOLERANCE[torch.float16]
    assert not found[1].any()


def test_torch_accepts_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    matmul = CudaMatmul(random_qtensor("affine4.g32.asym", (7, 64)), torch.float16)
    x, spec = torch.randn(3, 64).half(), str(matmul.packed.spec)
    parts = list(matmul.packed.parts)
    _, product = experts_of("affine4.g32.asym", 3, (7, 64), torch.float16)
    routing = grouped.route(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
    for op, arguments in (
        (grouped.sort, (torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)),
        (cuda.multiply, (x, parts, spec, 7)),
        (cuda.dequantize, (parts, spec, 7, 64, torch.float32)),
        (grouped.multiply, (x, product.parts, routing.order, routing.starts, torch.rand(6), spec, 7, 2)),
    ):
        done = torch.library.opcheck(op, arguments, test_utils=checks)
        assert set(done.values()) == {"SUCCESS"}, (op, done)
