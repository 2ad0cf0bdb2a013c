"""Put fused steps (kernels/fused.py) where a loaded model computes the same thing in several: norms, rotary embedding,
gated activations.

What a module computes decides, never what it is called: it is run once, at load, on random input, beside the formula it
might be, and replaced only where the two agree. So an architecture nobody thought of is fused where it can be, and one
that looks the same but is not (a scaled norm, a clamped gate) stays as it is. Replaced is the `forward` of the
instance: class, parameters and names stay, and other models in the process are untouched.

A device type that is not one of `DEVICES` keeps the model as it is.
"""

import inspect
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import fused

# What code that was not written for our probe may raise.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
_LARGEST_EPS = 1e-2


# Where kernels/fused.py has more than the torch twins.
DEVICES = ("cpu", "cuda")


@torch.no_grad()
def fuse(model: nn.Module, device: torch.device) -> Counter[str]:
    """Replace what kernels/fused.py computes; returns how many of each kind ("norm", "rope", "gated").

    Call it on a filled model, on its device, after its linears are final. Random input is drawn from a generator of its
    own, so no other random number changes.
    """
    found = Counter[str]()
    if device.type not in DEVICES:
        return found
    kinds = (("norm", _norm), ("gated", _gated), ("rope", _rope))
    for module in model.modules():
        for kind, try_one in kinds:
            if try_one(module, device):
                found[kind] += 1
                break
    return found


# Rows of a probe: an activation that is clamped far out looks like one that is not, near zero.
_SIZES = (1.0, 10.0, 100.0)


def _rows(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = torch.tensor(_SIZES)[:, None].to(device)
    return (_random((len(_SIZES), width), torch.float32, device) * size).to(dtype)


def _identical(a: Any, b: Tensor) -> bool:
    """Bit for bit; infinities and NaN of the far rows count as equal to themselves."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


def _agree(a: Any, b: Tensor) -> bool:
    """Equal up to two roundings."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=2 * torch.finfo(b.dtype).eps, atol=1e-6)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or None where it does not take these arguments."""
    try:
        return function(*arguments)
    except _REFUSALS:
        return None


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it has exactly `count` parameters."""
    return len(inspect.signature(function).parameters) == count


def _norm(module: nn.Module, device: torch.device) -> bool:
    """A module with one vector for a parameter and nothing else."""
    own, held = list(module.parameters()), [*module.children(), *module.buffers()]
    if len(own) != 1 or own[0].dim() != 1 or held:
        return False
    weight = own[0]
    if not weight.dtype.is_floating_point or weight.is_meta or not _takes(module.forward, 1):
        return False
    candidates = {v for v in vars(module).values() if isinstance(v, float) and 0 < v <= _LARGEST_EPS}
    for eps in candidates:
        # One ordinary row, one large, one whose mean square is of the size of eps.
        size = torch.tensor([[1.0], [30.0], [eps**0.5]])
        x = (_random((3, weight.shape[0]), torch.float32, torch.device("cpu")) * size).to(weight.dtype).to(device)
        wanted = _run(module.forward, x)
        for form in _closest_first(wanted, x, weight, eps):
            if _agree(fused.rms_norm(x, weight, eps, form), wanted):
                module.forward = partial(_norm_forward, weight, eps, form)
                return True
    return False


def _closest_first(wanted: Any, x: Tensor, weight: Tensor, eps: float) -> list[str]:
    """The forms that give `wanted` up to rounding, best first: rounding is what tells two of them apart."""
    twins = {form: fused.norm_twin(x, weight, eps, form) for form in fused.FORMS}
    fitting = [form for form, y in twins.items() if _agree(wanted, y)]
    return sorted(fitting, key=lambda form: float((twins[form].float() - wanted.float()).abs().sum()))


def _norm_forward(weight: Tensor, eps: float, form: str, x: Tensor) -> Tensor:
    y: Tensor = fused.rms_norm(x, weight, eps, form)
    return y


_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def _gated(module: nn.Module, device: torch.device) -> bool:
    """down(act(gate(x)) * up(x)), gate and up being two linears or the halves of one; or an experts module's gate."""
    if _takes_gate(module):
        return _experts_gate(module, device)
    linears: list[Any] = [m for m in module.children() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    if len(linears) not in (2, 3) or not _takes(module.forward, 1):
        return False
    for width, pieces, down in _splits(linears):
        with _picking(linears, device):
            act = _act_between(module, pieces, down, _rows(width, _dtype(module), device))
        if act:
            module.forward = partial(_gated_forward, pieces, down, act)
            return True
    return False


def _act_between(module: nn.Module, pieces: Callable[..., Any], down: Any, x: Tensor) -> str:
    """Name of the activation for which the module does what `_gated` says, "" if there is none."""
    wanted, halves = _run(module.forward, x), _run(pieces, x)
    if not isinstance(wanted, Tensor) or halves is None:
        return ""
    fitting = (a for a, f in _ACTS.items() if _identical(_run(down, f(halves[0]) * halves[1]), wanted))
    return next(fitting, "")


@contextmanager
def _picking(linears: list[Any], device: torch.device) -> Iterator[None]:
    """Have each linear pick some of its inputs instead of multiplying: what a module does around them stays, and no
    weight is read (of a 1.1 B model's 0.6 seconds of loading, real products took 0.05)."""
    generator = torch.Generator().manual_seed(0)
    for linear in linears:
        which = torch.randint(linear.in_features, (linear.out_features,), generator=generator).to(device)
        linear.forward = partial(torch.index_select, dim=-1, index=which)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype a module computes in: that of its linears, quantized or not."""
    for child in module.modules():
        found = child.weight if isinstance(child, nn.Linear) else None
        if isinstance(found, Tensor):
            return found.dtype
        if isinstance(vars(child).get("dtype"), torch.dtype):
            return vars(child)["dtype"]
    return torch.get_default_dtype()


def _splits(linears: list[Any]) -> Iterator[tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]], Any]]:
    """(width of x, x -> gate and up, down) of every way the shapes allow."""
    for *first, down in itertools.permutations(linears):
        width = first[0].in_features
        if len(first) == 1 and first[0].out_features == 2 * down.in_features:
            yield width, partial(_halves, first[0], False), down
            yield width, partial(_halves, first[0], True), down
        if len(first) == 2 and all((m.in_features, m.out_features) == (width, down.in_features) for m in first):
            yield width, partial(_pair, *first), down


def _pair(gate: nn.Module, up: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return gate(x), up(x)


def _halves(merged: nn.Module, gate_last: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = merged(x).chunk(2, -1)
    return (b, a) if gate_last else (a, b)


def _gated_forward(pieces: Callable[[Tensor], tuple[Tensor, Tensor]], down: nn.Module, act: str, x: Tensor) -> Tensor:
    y: Tensor = down(fused.gated(*pieces(x), act))
    return y


def _takes_gate(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") and getattr(module, "has_gate", False)


def _experts_gate(module: nn.Module, device: torch.device) -> bool:
    x = _rows(32, torch.float32, device)
    wanted = _run(module._apply_gate, x)  # type: ignore[arg-type]
    a, b = x.chunk(2, -1)
    for act, function in _ACTS.items():
        if _identical(wanted, function(a) * b):
            module._apply_gate = partial(_gate_halves, act)  # type: ignore[assignment]
            return True
    return False


def _gate_halves(act: str, gate_up: Tensor) -> Tensor:
    y: Tensor = fused.gated(*gate_up.chunk(2, -1), act)
    return y


def _rope(module: nn.Module, device: torch.device) -> bool:
    """A forward that calls a function of its file that turns q and k [B, H, T, D] by cos and sin [B, T, D]."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or "forward" in vars(module) or hasattr(forward, "__wrapped__"):
        return False
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not isinstance(function, types.FunctionType) or _required(function) != 4:
            continue
        for interleaved in (False, True):
            if _turns(function, interleaved, device):
                around = forward.__globals__ | {name: partial(_rope_call, function, interleaved)}
                # torch.compile would look names up in the module that a function's globals name, past ours.
                around.pop("__name__", None)
                patched = types.FunctionType(
                    forward.__code__, around, forward.__name__, forward.__defaults__, forward.__closure__
                )
                patched.__kwdefaults__ = forward.__kwdefaults__
                module.forward = types.MethodType(patched, module)
                return True
    return False


def _required(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _turns(function: Callable[..., Any], interleaved: bool, device: torch.device) -> bool:
    q, k = _random((1, 3, 5, 8), torch.float32, device), _random((1, 2, 5, 8), torch.float32, device)
    angle = _random((1, 5, 4), torch.float32, device)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    wanted = _run(function, q, k, angle.cos(), angle.sin())
    if not isinstance(wanted, tuple) or len(wanted) != 2:
        return False
    found = _rope_call(function, interleaved, q, k, angle.cos(), angle.sin())
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(wanted, found, strict=True)
    )


def _rope_call(
    original: Callable[..., Any],
    interleaved: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *more: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """The original where the call is another one than was compared: further arguments, other shapes or dtypes."""
    if more or named or q.dim() != 4 or cos.dim() != 3 or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        found: tuple[Tensor, Tensor] = original(q, k, cos, sin, *more, **named)
        return found
    batch, _, tokens, _ = q.shape
    turns = (t.expand(batch, -1, -1).reshape(batch * tokens, -1) for t in (cos, sin))
    turned = fused.rope(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k)), *turns, interleaved)
    a, b = (t.unflatten(0, (batch, tokens)).transpose(1, 2) for t in turned)
    return a, b
