"""Moving a scale of a linear's input into whatever produces that input, so that the block computes the same function
(AWQ).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A fold that is no identity changes the output by the scale itself; float32 rounding stays far below this.
_SAME = 1e-4
# Linear -> the sibling whose output rows are its inputs, up to an elementwise product or a weighted mean over rows.
_BEFORE = {"down_proj": "up_proj", "o_proj": "v_proj", "w2": "w3", "dense": "v_proj", "out_proj": "v_proj"}


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read one tensor, in the order they are called."""

    linears: tuple[str, ...]
    # Path of the module whose output is that tensor, "" where none is.
    producer: str


def input_groups(
    block: nn.Module, prefix: str, linears: dict[str, nn.Module], run: Callable[[], None]
) -> list[InputGroup]:
    """Group `linears` (path -> module) by the tensor they read while `run` executes the block once."""
    # Tensors are kept alive so that no identity is reused.
    readers: dict[int, tuple[Tensor, list[str]]] = {}
    made: dict[int, tuple[Tensor, str]] = {}

    def reads(path: str) -> Callable[..., None]:
        return lambda module, args: readers.setdefault(id(args[0]), (args[0], []))[1].append(path)

    def makes(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor):
                made[id(out)] = (out, path)

        return hook

    handles = [m.register_forward_pre_hook(reads(path)) for path, m in linears.items()]
    names = {id(m): path for path, m in linears.items()}
    for name, module in block.named_modules():
        if id(module) not in names and name:
            handles.append(module.register_forward_hook(makes(f"{prefix}.{name}")))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [InputGroup(tuple(paths), made[key][1] if key in made else "") for key, (_, paths) in readers.items()]


def fold(model: nn.Module, group: InputGroup, scale: Tensor, sample: Callable[[], Tensor]) -> bool:
    """Multiply the group's weights by `scale` [K] and divide it out of their input's producer; False, and nothing
    changed, where the block's output (`sample()`) does not stay the same."""
    divided = _producer_tensors(model, group, scale.numel())
    if not divided:
        return False
    multiplied = [model.get_parameter(f"{path}.weight").data for path in group.linears]
    before, kept = sample(), [t.clone() for t in (*divided, *multiplied)]
    for tensor in divided:
        tensor.div_(scale if tensor.dim() == 1 else scale[:, None])
    for tensor in multiplied:
        tensor.mul_(scale)
    after = sample()
    if torch.linalg.vector_norm(after - before) <= _SAME * torch.linalg.vector_norm(before):
        return True
    for tensor, old in zip((*divided, *multiplied), kept, strict=True):
        tensor.copy_(old)
    return False


def _producer_tensors(model: nn.Module, group: InputGroup, width: int) -> list[Tensor]:
    """Weight and bias that the scale would be divided out of: a norm's, or the rows of the linear before."""
    if group.producer:
        module = model.get_submodule(group.producer)
        found: Sequence[Tensor] = [p.data for p in module._parameters.values() if p is not None]
        return list(found) if found and all(t.shape == (width,) for t in found) else []
    parent, _, leaf = group.linears[0].rpartition(".")
    before = getattr(model.get_submodule(parent), _BEFORE.get(leaf, ""), None) if leaf in _BEFORE else None
    if before is None or len(group.linears) > 1 or getattr(before, "out_features", 0) != width:
        return []
    return [p.data for p in before._parameters.values() if p is not None]
