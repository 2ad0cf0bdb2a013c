"""Measure launches of the product templates on a GPU and keep the fastest in a table (plans.py).

For each weight and number of rows the search starts from the heuristic plan of every template that can take them,
changes one number at a time (tile, warps, stages, split) to the best of its neighbours until none is better, and keeps
the fastest template. That is tens of compilations instead of the hundreds of a grid, and it finds no optimum that needs
two changes at once. The timer is an argument, so the logic is tested without a GPU.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda, plans
from .lang import HAVE_TRITON, need_triton
from .plans import Plan, file_name, own_dir, read

if HAVE_TRITON:
    import triton
    from triton.errors import TritonError

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
_LEAST_DOT_ROWS = 16
_CHOICES: dict[str, tuple[int, ...]] = {
    "BM": (1, 2, 4, 8, 16, 32, 64, 128),
    "BN": (16, 32, 64, 128, 256),
    "BK": (32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "split": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
}
# Numbers of the accumulator of gemv a program may hold: 256 registers of 4 warps.
_GEMV_LIMIT = 32768


@dataclass(frozen=True)
class Best:
    """What a search found: microseconds of one launch, and how many plans were measured."""

    plan: Plan
    us: float
    tried: int


def starts(rows: int, shape: tuple[int, int], capability: int, processors: int) -> list[Plan]:
    """A first plan of every template that can take `rows` inputs on such a GPU."""
    possible = {"dequant": True, "gemv": rows <= cuda.GEMV_ROWS, "gemm": capability >= 80}
    return [cuda.plan_of(kernel, rows, shape, processors) for kernel, fits in possible.items() if fits]


def neighbours(plan: Plan, rows: int) -> Iterator[Plan]:
    """The plans that differ in one number, by one step, and can be launched for `rows` inputs."""
    for name, choices in _CHOICES.items():
        if name not in plan.tile and (name not in ("num_warps", "num_stages", "split")):
            continue
        if name == "split" and plan.kernel == "dequant":
            continue
        now: int = plan.tile[name] if name in plan.tile else getattr(plan, name)
        below, above = [c for c in choices if c < now], [c for c in choices if c > now]
        for value in (*below[-1:], *above[:1]):
            numbers: Any = {"tile": {**plan.tile, name: value}} if name in plan.tile else {name: value}
            changed = replace(plan, **numbers)
            if _launchable(changed, rows):
                yield changed


def _launchable(plan: Plan, rows: int) -> bool:
    tile = plan.tile
    if plan.kernel == "gemv":
        return tile["BM"] >= rows and tile["BM"] * tile["BN"] * tile["BK"] <= _GEMV_LIMIT
    return plan.kernel == "dequant" or tile["BM"] >= _LEAST_DOT_ROWS


def search(start: Plan, rows: int, cost: Callable[[Plan], float]) -> Best:
    """The best plan reached from `start` by single changes; `cost` gives microseconds, infinity where it cannot run."""
    best, us, seen = start, cost(start), {repr(start)}
    while True:
        better = best
        for candidate in neighbours(best, rows):
            if repr(candidate) in seen:
                continue
            seen.add(repr(candidate))
            if (found := cost(candidate)) < us:
                better, us = candidate, found
        if better is best:
            return Best(best, us, len(seen))
        best = better


def tune(
    products: Iterable[Any],
    rows: Sequence[int] = ROWS,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows of a table for each CudaMatmul and number of rows. `timer` gives the microseconds of what it is given;
    `told` sees each row as it is found. Raises UserError where triton is missing."""
    need_triton("tuning kernels")
    found = []
    for product in products:
        packed, capability, processors = product.packed, product.capability, product.processors
        for m in rows:
            x = torch.randn(m, packed.shape[1], device=packed.parts.codes.device).to(product.dtype)
            candidates = [
                search(start, m, _cost(product, x, timer or device_timer))
                for start in starts(m, packed.shape, capability, processors)
            ]
            best = min(candidates, key=lambda each: each.us)
            row = {
                "spec": str(packed.spec),
                "n": packed.shape[0],
                "k": packed.shape[1],
                "m": m,
                "kernel": best.plan.kernel,
                "tile": best.plan.tile,
                "num_warps": best.plan.num_warps,
                "num_stages": best.plan.num_stages,
                "split": best.plan.split,
                "us": round(best.us, 2),
            }
            told(row)
            found.append(row)
    return found


def _cost(product: cuda.CudaMatmul, x: Tensor, timer: Callable[[Callable[[], Any]], float]) -> Callable[[Plan], float]:
    packed, n = product.packed, product.packed.shape[0]

    def run(how: Plan) -> Tensor:
        if how.kernel == "dequant":
            return torch.nn.functional.linear(x, cuda.decode(packed.parts, packed.spec, packed.shape, x.dtype, how))
        return cuda.launch(x, packed.parts, packed.spec, n, how)

    def cost(how: Plan) -> float:
        try:
            return timer(lambda: run(how))
        except TritonError:
            # More shared memory or registers than there are: a plan this device does not have.
            return inf

    return cost


def device_timer(run: Callable[[], Any]) -> float:
    """Median microseconds on the GPU, the second-level cache emptied before each run."""
    return 1000 * float(triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median"))


def default_path(gpu: str) -> Path:
    """Where the table of a device is written: results/tune of a checkout, the user's own folder otherwise."""
    checkout = (plans.PACKAGED.parents[1] / ".git").exists()
    return (plans.PACKAGED if checkout else own_dir()) / file_name(gpu)


def write(path: Path, gpu: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the table at `path`, made if absent; one row a line. A row of the same weight and m is replaced."""
    kept = {_key(row): row for row in (read(path)["rows"] if path.is_file() else [])}
    kept |= {_key(row): row for row in rows}
    version = triton.__version__ if HAVE_TRITON else ""
    lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"gpu": {json.dumps(gpu)}, "triton": {json.dumps(version)}, "rows": [\n{lines}\n]}}\n')


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["spec"], row["n"], row["k"], row["m"]
