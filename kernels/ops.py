"""Operators registered with torch, so that torch.compile and fake tensors see one opaque node where a kernel runs.

How a kernel module publishes an operator:

    def _norm(x, weight, eps): ...          # the real thing: any device, eager, no gradient
    def _norm_fake(x, weight, eps):         # shapes and dtypes only, no data is read
        return torch.empty_like(x)
    rms_norm = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _norm, _norm_fake)

and callers call `rms_norm(x, weight, eps)`. An operator that writes into an argument marks it in the schema, returns
nothing, and its fake does nothing: `store(Tensor(a!) cache, Tensor x, Tensor slots) -> ()`. Results must not alias
arguments. A weight travels as `Tensor?[] parts` (tiles.Parts, in order) and `str spec`: both are then constants or
inputs of a compiled graph, and nothing is looked up in a registry of ours.

An operator may come with a `bind`: (its results, its arguments) -> a function of nothing that computes the results
again (or several, to be called in order), or None for arguments it has no such function for. recording.py repeats a
step on the CPU through it.

CUDA graphs need none of this: they record launches. What they forbid is a read back to the host, so an operator says
in its docstring where it does one.

Cost of a call measured on this CPU, inference mode, over calling the Python function: 1.1 us with three arguments, 2.3
us with a list of seven optional tensors; torch.library.custom_op 3.6 us. A Triton launch costs more than ten times
that, so there is no second way round the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "bitsmith"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
Call = Callable[[], object]
Bind = Callable[..., Call | tuple[Call, ...] | None]
# Of operators that have one.
BINDS: dict[Any, Bind] = {}


def define(
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    bind: Bind | None = None,
) -> Any:
    """Register `schema` under bitsmith:: with its implementation for every device and its fake -> the operator."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if bind is not None:
        BINDS[operator] = bind
    return operator
