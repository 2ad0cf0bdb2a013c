"""Quantized replacements for the modules that hold weights in a transformers model.

`QuantLinear` stands where an nn.Linear stood; a fused experts module keeps its class and gets its per-expert weights
through transformers' experts interface. Both hold `Matmul`s (kernels/dispatch.py): weights in the form the device
multiplies with, from which the exact QTensor comes back.

Sibling linears fed by the same tensor (q/k/v, gate/up) can share one product over their stacked rows: the first of
them called computes it, the others take their slice.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..kernels.cpu import prepare_dense
from ..kernels.dispatch import Matmul, Reference, prepare
from ..kernels.paths import forced
from ..kernels.qtensor import QTensor, can_concat, concat

EXPERTS = "bitsmith"
# Names a model gives to linears that read the same input, in the order they are stacked.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


class QuantLinear(nn.Module):
    """y[..., N] = x[..., K] @ W.T + bias with W quantized."""

    def __init__(self, matmul: Matmul, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.matmul = matmul
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, built anew at each call: for the model code that reads `.weight` of a linear."""
        return self.qtensor().dequantize(self.dtype)

    def qtensor(self) -> QTensor:
        return self.matmul.qtensor()

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.qtensor().spec}, {self.matmul.name}"


class DenseLinear(nn.Module):
    """An unquantized linear whose weight lies in the order the CPU multiplies with."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.out_features, self.in_features = weight.shape
        self.matmul = prepare_dense(weight.data)
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        return self.matmul.weight()

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias


def is_linear(module: nn.Module) -> bool:
    """Exact types only: routers subclass nn.Linear and return tuples."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear"


def prepack_linears(model: nn.Module) -> None:
    """Put the unquantized linears of a bfloat16 model on the CPU in oneDNN's order (10 to 30 % faster, results/LOG.md).

    A weight that something else reads too (tied embeddings) stays: it would be held twice.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, module in list(model.named_modules()):
        if is_linear(module) and holders[id(module.weight)] == 1:
            model.set_submodule(name, DenseLinear(module))


class _Shared:
    """One product for sibling linears. Holds the last input (by identity) and the slices not yet taken."""

    def __init__(self, matmul: Matmul, sizes: Sequence[int]) -> None:
        self.matmul, self.sizes = matmul, list(sizes)
        self.x: Tensor | None = None
        self.slices: list[Tensor | None] = [None] * len(sizes)

    def take(self, x: Tensor, index: int) -> Tensor:
        found = self.slices[index] if self.x is x else None
        if found is None:
            self.x = x
            self.slices = list(self.matmul(x).split(self.sizes, -1))
            found = self.slices[index]
        assert found is not None
        self.slices[index] = None
        if all(s is None for s in self.slices):
            self.x = None
        return found


class _Member:
    """The Matmul a fused sibling holds: its rows of the shared product."""

    def __init__(self, shared: _Shared, index: int) -> None:
        self.shared, self.index = shared, index
        self.name = f"{shared.matmul.name}[{index}]"
        self.nbytes = shared.matmul.nbytes * shared.sizes[index] // sum(shared.sizes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.shared.take(x, self.index)

    def qtensor(self) -> QTensor:
        start = sum(self.shared.sizes[: self.index])
        return self.shared.matmul.qtensor().rows(start, start + self.shared.sizes[self.index])


def fuse_siblings(parent: nn.Module, dtype: torch.dtype, act: str = "", copy: bool = False) -> int:
    """Give every set of siblings in `parent` that hold their QTensors one shared product; returns how many sets there
    were.

    Sets whose weights differ in spec, width or shared parts stay apart.
    """
    count = 0
    for names in SIBLINGS:
        group = [getattr(parent, name, None) for name in names]
        linears = [m for m in group if isinstance(m, QuantLinear) and isinstance(m.matmul, Reference)]
        if len(linears) != len(names):
            continue
        tensors = [m.qtensor() for m in linears]
        if not can_concat(tensors):
            continue
        shared = _Shared(prepare(concat(tensors), dtype, act=act, copy=copy), [m.out_features for m in linears])
        for index, linear in enumerate(linears):
            linear.matmul = _Member(shared, index)
        count += 1
    return count


def prepare_linears(model: nn.Module, dtype: torch.dtype, act: str = "", copy: bool = False) -> None:
    """Give every QuantLinear that holds its QTensor the product of this machine, siblings one together; one is held
    twice at a time.

    In one pass over the layers: weights are packed about as fast as the disk gives them, and in its order.
    """
    stacked = forced() != "reference"
    for module in model.modules():
        if stacked:
            fuse_siblings(module, dtype, act, copy)
        if isinstance(module, QuantLinear) and isinstance(module.matmul, Reference):
            module.matmul = prepare(module.qtensor(), dtype, act=act, copy=copy)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def set_expert_weight(module: nn.Module, name: str, matmuls: list[Matmul]) -> None:
    """Replace the stacked parameter `name` of an experts module by one Matmul per expert."""
    module._parameters.pop(name, None)
    held = module.__dict__.setdefault("quantized_experts", {})
    held[name] = matmuls
    if all(m.name == "triton" for m in matmuls):
        from ..kernels.grouped import stack

        if (product := stack(matmuls)) is not None:
            module.__dict__.setdefault("grouped_experts", {})[name] = product


def experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden [T, h], top_k_index int [T, k], top_k_weights [T, k] -> [T, h]; registered with transformers as
    "bitsmith".

    Tokens are sorted by expert, so each expert multiplies once. Sums in float32.
    """
    count: int = module.num_experts  # type: ignore[assignment]
    if len(module.__dict__.get("grouped_experts", ())) == 2 and "observe_expert" not in module.__dict__:
        return _grouped_experts(module, hidden, top_k_index, top_k_weights)
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    token = order // top_k_index.shape[1]
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    stop = torch.bincount(flat, minlength=count).cumsum(0).tolist()
    for expert, (start, end) in enumerate(zip([0, *stop], stop[:count], strict=False)):
        if start == end:
            continue
        rows = token[start:end]
        y = _one_expert(module, expert, hidden[rows])
        out.index_add_(0, rows, y.float() * top_k_weights.reshape(-1)[order[start:end], None].float())
    return out.to(hidden.dtype)


def _grouped_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts in two launches (kernels/grouped.py); an expert beyond num_experts, which is elsewhere, adds 0."""
    from ..kernels.grouped import route

    tokens, k = top_k_index.shape
    routing = route(top_k_index, module.num_experts)  # type: ignore[arg-type]
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weights = top_k_weights.float().masked_fill(top_k_index >= module.num_experts, 0)  # type: ignore[operator]
    x = _grouped_product(module, up, hidden, top_k_index, routing, k)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)  # type: ignore[operator]
    if not module.has_bias and not getattr(module, "has_post_expert_norm", False):
        y = _grouped_product(module, "down_proj", x, top_k_index, routing, 1, weights)
    else:
        y = _grouped_product(module, "down_proj", x, top_k_index, routing, 1)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)  # type: ignore[operator]
        y = y * weights.view(-1, 1)
    return y.view(tokens, k, -1).sum(1, dtype=torch.float32).to(hidden.dtype)


def _grouped_product(
    module: nn.Module,
    name: str,
    x: Tensor,
    top_k_index: Tensor,
    routing: Any,
    repeat: int,
    weights: Tensor | None = None,
) -> Tensor:
    y: Tensor = module.__dict__["grouped_experts"][name](x, routing, repeat, weights)
    if not module.has_bias:
        return y
    bias: Tensor = getattr(module, f"{name}_bias")
    return y + bias[top_k_index.reshape(-1).clamp(max=bias.shape[0] - 1)]


def _one_expert(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _expert_product(module, up, expert, x)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)  # type: ignore[operator]
    x = _expert_product(module, "down_proj", expert, x)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)  # type: ignore[operator]
    return x


def _expert_product(module: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    observe = module.__dict__.get("observe_expert")
    if observe is not None:
        observe(name, expert, x)
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    held = module.__dict__.get("quantized_experts", {})
    if name in held:
        y: Tensor = held[name][expert](x)
        return y if bias is None else y + bias
    weight: Tensor = getattr(module, name)[expert]
    return F.linear(x, weight.T if module.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
