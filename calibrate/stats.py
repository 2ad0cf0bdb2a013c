"""Stats: what calibration saw of one distinct input, and the hooks that gather it.

q, k and v read the same tensor, so they share one Stats; so do gate and up. The error every method is judged by is
tr(dW H dW^T): the mean squared error of the layer's output on the calibration inputs, dW being the weight's error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn


@dataclass
class Stats:
    """Running statistics of one input of width K. Set by `gather`, read by methods."""

    width: int
    # Tokens seen.
    n: int = 0
    # float32 [K, K]: mean of x x^T.
    hessian: Tensor = field(default_factory=lambda: torch.empty(0))
    # float32 [K]: largest |x|, mean |x|.
    absmax: Tensor = field(default_factory=lambda: torch.empty(0))
    mean: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, x: Tensor) -> None:
        """x [..., K]."""
        flat = x.detach().reshape(-1, self.width).float()
        if not flat.shape[0]:
            return
        if not self.n:
            self.hessian = torch.zeros(self.width, self.width, device=x.device)
            self.absmax = torch.zeros(self.width, device=x.device)
            self.mean = torch.zeros(self.width, device=x.device)
        total = self.n + flat.shape[0]
        # The running mean keeps the sums near 1 whatever the number of tokens, so float32 suffices.
        self.hessian.mul_(self.n / total).addmm_(flat.T, flat, alpha=1 / total)
        self.mean.mul_(self.n / total).add_(flat.abs().sum(0), alpha=1 / total)
        self.absmax = torch.maximum(self.absmax, flat.abs().amax(0))
        self.n = total

    @property
    def squares(self) -> Tensor:
        """float64 [K]: sum of x^2."""
        return self.hessian.diagonal().double() * self.n

    @property
    def importance(self) -> Tensor:
        """float32 [K]: mean of x^2."""
        return self.hessian.diagonal()

    def relative_error(self, w: Tensor, w_hat: Tensor) -> float:
        """tr(dW H dW^T) / tr(W H W^T)."""
        return output_error(w_hat - w, self.hessian) / max(output_error(w, self.hessian), 1e-30)


@dataclass
class Squares:
    """The part of `Stats` that an importance matrix is made of: K numbers where a Hessian has K * K."""

    width: int
    n: int = 0
    # float64 [K]: sum of x^2.
    squares: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, x: Tensor) -> None:
        """x [..., K]."""
        flat = x.detach().reshape(-1, self.width).double()
        if not self.n:
            self.squares = torch.zeros(self.width, dtype=torch.float64, device=x.device)
        self.squares += flat.square().sum(0)
        self.n += flat.shape[0]

    @property
    def importance(self) -> Tensor:
        """float32 [K]: mean of x^2."""
        return (self.squares / self.n).float()

    def relative_error(self, w: Tensor, w_hat: Tensor) -> float:
        """The same as that of `Stats`, were inputs not correlated."""
        importance = self.importance.to(w.device)
        return float(((w_hat - w).square() @ importance).sum() / (w.square() @ importance).sum().clamp(min=1e-30))


class Accumulator(Protocol):
    """What `gather` adds inputs up in: `Stats` or `Squares`, made with the input's width."""

    def add(self, x: Tensor) -> None: ...


_A = TypeVar("_A", bound=Accumulator)


def unseen(width: int) -> Stats:
    """What a method is given for an input calibration never reached (an expert no token was routed to): white noise."""
    return Stats(width, 1, torch.eye(width), torch.ones(width), torch.ones(width))


def output_error(delta: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T), delta [N, K], hessian [K, K]: float32 products, as a search can afford, a float64 sum."""
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64))


class Reached(Exception):
    """Raised by `gather` once the last module of interest has its input: the rest of the block need not run."""


@contextmanager
def gather(
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, nn.Module],
    stop_after: str | None,
    kind: Callable[[int], _A],
) -> Iterator[dict[str, _A]]:
    """Within the context, inputs of `modules` (path -> linear) and of each expert are added up under their key, each in
    a `kind(width)`.

    Keys: a linear's path; "path/name/index" for expert `index` of projection `name`. With `stop_after`, `Reached` is
    raised as soon as that linear is called.
    """
    found: dict[str, _A] = {}

    def take(key: str, x: Tensor) -> None:
        if key not in found:
            found[key] = kind(x.shape[-1])
        found[key].add(x)
        if key == stop_after:
            raise Reached

    handles = [m.register_forward_pre_hook(_hook(take, path)) for path, m in modules.items()]
    for path, module in experts.items():
        module.__dict__["observe_expert"] = _observer(take, path)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            del module.__dict__["observe_expert"]


def _hook(take: Callable[[str, Tensor], None], path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: take(path, args[0])


def _observer(take: Callable[[str, Tensor], None], path: str) -> Callable[[str, int, Tensor], None]:
    return lambda name, index, x: take(f"{path}/{name}/{index}", x)
