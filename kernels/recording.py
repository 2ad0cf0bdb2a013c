"""A function of fixed tensors, recorded as the flat list of its operators and repeated without the Python between them:
to a CPU what a CUDA graph is to a GPU.

At one token a step a 1.1 B Llama spends 8 of 30 ms in module calls, views, argument checks and dispatch; the list needs
0.9 ms. Recorded is what torch's dispatcher sees: each operator with its arguments, and the tensors it returned, which
stay. Repeating calls the operators in order; what each returns is written where its first result lies: through its
`out` where torch has one, operators of ops.py through their `bind`, those of the native library that follow each other
as one call (chain.py), and views are skipped. So the function must do the same for any contents of its tensors:
whatever reads a tensor back to Python, or gives results whose shape depends on contents, raises Unrecordable.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import ops
from .chain import merged

_READS = {
    getattr(Tensor, name)
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
_CONTENTS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class Unrecordable(Exception):
    """The function did something that a repetition could not repeat; says what."""


@dataclass(frozen=True)
class Recording:
    """Made by `record`. Holds every tensor of the recorded run."""

    calls: tuple[ops.Call, ...]
    # Arguments and results, for the calls that know them by address only.
    held: tuple[object, ...]
    output: Tensor

    def __call__(self) -> Tensor:
        """Repeat with what the function's tensors hold now -> the same tensor each time."""
        for call in self.calls:
            call()
        return self.output


def record(function: Callable[[], Tensor]) -> Recording:
    """Run `function` once and record it; the result of that run is in `output`.

    To be called, and the recording too, in inference mode. Raises Unrecordable.
    """
    calls: list[ops.Call] = []
    held: list[object] = []
    with _Reads(), _Recorder(calls, held):
        output = function()
    return Recording(tuple(merged(calls)), tuple(held), output)


class _Reads(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            raise Unrecordable(f"{func.__name__} of a tensor")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[ops.Call], held: list[object]) -> None:
        super().__init__()
        self._calls, self._held = calls, held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A composite operator's tags say nothing of those it is made of.
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if any(tag in func.tags for tag in _CONTENTS) and not _by_numbers(func, args):
            raise Unrecordable(f"{func}: what it returns depends on contents")
        result = func(*args, **kwargs)
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _storage(leaf) not in known]
        bind = ops.BINDS.get(func)
        bound = bind and bind(fresh, *args, **kwargs) if fresh or func._schema.is_mutable else None
        if func._schema.is_mutable and fresh:
            raise Unrecordable(f"{func}: it writes an argument and returns another tensor")
        if bound:
            self._calls.extend(bound if isinstance(bound, tuple) else (bound,))
        elif func._schema.is_mutable:
            self._calls.append(partial(func, *args, **kwargs))
        elif fresh:
            self._calls.append(_repeated(fresh, func, args, kwargs))
        self._held.append((args, kwargs, result))
        return result


def _by_numbers(func: Any, args: Sequence[Any]) -> bool:
    """x[i, j] with numbers, whose result is as large as they are; only a mask's depends on what it holds."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and not any(i is not None and i.dtype in masks for i in args[1])


def _repeated(results: Sequence[Tensor], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ops.Call:
    """`func` once more, into `results`; without a tensor between them where torch has a way."""
    if func in _COPIES:
        return partial(results[0].copy_, args[0])
    out = _writes(func)
    if out and len(results) == 1:
        return partial(out, *args, **kwargs, out=results[0])
    return partial(_again, results, func, args, kwargs)


@cache
def _writes(func: Any) -> Any:
    """The overload of `func` that takes its one result as `out`, or None."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        found = getattr(func.overloadpacket, name)
        taken = [argument for argument in found._schema.arguments if not argument.is_out]
        if len(found._schema.arguments) == len(taken) + 1 and [(a.name, str(a.type)) for a in taken] == wanted:
            return found
    return None


def _again(results: Sequence[Tensor], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    found = func(*args, **kwargs)
    for old, new in zip(results, (found,) if isinstance(found, Tensor) else found, strict=True):
        old.copy_(new)


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except NotImplementedError as error:
        raise Unrecordable(f"an opaque tensor, as oneDNN packs them: {error}") from error
