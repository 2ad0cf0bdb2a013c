"""A file of a given size at the least loss: one type for every tensor, from measured losses.

    minimise sum of loss[t][type(t)]   such that   sum of bytes[t][type(t)] + fixed <= target

A multiple-choice knapsack. Its relaxation is solved exactly by walking the lower convex hulls of all tensors (bytes,
loss) in order of loss saved per byte, which is what a Lagrange multiplier does (Sinha and Zoltners 1979, Operations
Research 27: 503): every state of the walk is the best there is of its size. The walk stops at the first step that does
not fit, so the result is at most that one step's saving above the optimum; what room is left is then filled with the
smaller steps that still fit.

Losses must be of one scale for all tensors, as the predicted KL divergences of sensitivity.py are.
"""

import heapq
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..models.checkpoint import read_json
from .store import write_json

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


class Choice(NamedTuple):
    """One type a tensor could have: what it would weigh and what it would cost."""

    bytes: int
    # In one unit for all tensors; 0 is exact.
    loss: float


# Tensor -> type -> what it means.
Table = Mapping[str, Mapping[str, Choice]]


class Allocation(NamedTuple):
    """The type of every tensor, bytes of the file (fixed ones included) and the sum of losses."""

    types: dict[str, str]
    bytes: int
    loss: float


@dataclass(frozen=True, order=True)
class _Step:
    """Changing a tensor's type; the order is the one steps are taken in, ties by name."""

    # Loss per byte, below zero.
    slope: float
    tensor: str
    kind: str


def allocate(table: Table, target: int, fixed: int = 0) -> Allocation:
    """The types that lose least in at most `target` bytes, of which `fixed` are taken by what has no choice.

    Where two types of a tensor weigh the same, the one with less loss counts; one that weighs more and loses no less is
    never taken. Deterministic. Raises UserError naming the least size where the target is below it, and for a loss that
    is no number.
    """
    for tensor, choices in table.items():
        if bad := [kind for kind, choice in choices.items() if not math.isfinite(choice.loss)]:
            raise UserError(
                f"{tensor}: its loss as {bad[0]} is {choices[bad[0]].loss}. Fix: a source without NaN or inf"
            )
    hulls = {tensor: hull(choices) for tensor, choices in sorted(table.items())}
    at = dict.fromkeys(hulls, 0)
    size = fixed + sum(table[t][kinds[0]].bytes for t, kinds in hulls.items())
    if size > target:
        raise UserError(
            f"the target of {target} bytes is below the smallest file possible, {size} bytes ({fixed} of them for "
            f"tensors that are not quantized). Fix: --target-size {size} or more, or allow smaller types"
        )
    queue = [step for t in hulls if (step := _next(table[t], hulls[t], t, 0))]
    heapq.heapify(queue)
    while queue:
        step = heapq.heappop(queue)
        kinds, index = hulls[step.tensor], at[step.tensor]
        more = table[step.tensor][step.kind].bytes - table[step.tensor][kinds[index]].bytes
        if size + more > target:
            break
        size, at[step.tensor] = size + more, index + 1
        if following := _next(table[step.tensor], kinds, step.tensor, index + 1):
            heapq.heappush(queue, following)
    types = {t: kinds[at[t]] for t, kinds in hulls.items()}
    size = _fill(table, types, size, target)
    return Allocation(types, size, sum(table[t][kind].loss for t, kind in types.items()))


def hull(choices: Mapping[str, Choice]) -> list[str]:
    """The types on the lower convex hull of (bytes, loss), smallest first; loss falls along it, ever more slowly."""
    kept: list[str] = []
    for kind in sorted(choices, key=lambda k: (choices[k], k)):
        if kept and choices[kind].loss >= choices[kept[-1]].loss:
            continue
        while len(kept) > 1 and _slope(choices, kept[-2], kind) <= _slope(choices, kept[-2], kept[-1]):
            kept.pop()
        kept.append(kind)
    return kept


def _slope(choices: Mapping[str, Choice], small: str, large: str) -> float:
    """Loss per byte, `large` being larger."""
    a, b = choices[small], choices[large]
    return (b.loss - a.loss) / (b.bytes - a.bytes)


def _next(choices: Mapping[str, Choice], kinds: list[str], tensor: str, index: int) -> _Step | None:
    if index + 1 == len(kinds):
        return None
    return _Step(_slope(choices, kinds[index], kinds[index + 1]), tensor, kinds[index + 1])


def _fill(table: Table, types: dict[str, str], size: int, target: int) -> int:
    """Spend what is left on whatever saves most a byte and fits, types off the hulls included; returns the new size."""
    while True:
        left = target - size
        steps = [
            _Step((c.loss - now.loss) / (c.bytes - now.bytes), tensor, kind)
            for tensor, held in types.items()
            for now in [table[tensor][held]]
            for kind, c in table[tensor].items()
            if now.bytes < c.bytes <= now.bytes + left and c.loss < now.loss
        ]
        if not steps:
            return size
        best = min(steps)
        size += table[best.tensor][best.kind].bytes - table[best.tensor][types[best.tensor]].bytes
        types[best.tensor] = best.kind


def largest(table: Table, fixed: int = 0) -> int:
    """Bytes of the file with the least loss: a target beyond it buys nothing."""
    return fixed + sum(choices[hull(choices)[-1]].bytes for choices in table.values())


def check_target(table: Table, target: int, fixed: int = 0) -> None:
    """UserError where `target` is more than every tensor at its best type takes: a mistyped unit, most likely."""
    most = largest(table, fixed)
    if target > most:
        raise UserError(
            f"the target of {target} bytes is above the largest file that the candidate types give, {most} bytes. Fix: "
            f"--target-size {most} or less, or allow larger types"
        )


def parse_size(text: str) -> int:
    """--target-size: "5GiB", "4.7GB", "600M" (binary, as GiB) or bytes -> bytes. UserError saying what is accepted."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not found or found[2].lower() not in units or not float(found[1]):
        raise UserError(
            f"--target-size {text!r}: expected a number above 0 and a unit, such as 5GiB, 4.7GB or 600MiB; accepted: "
            f"B, KiB, MiB, GiB, TiB (1024), KB, MB, GB, TB (1000)"
        )
    return int(float(found[1]) * units[found[2].lower()])


def parse_bpw(text: str, weights: int) -> int:
    """--target-bpw: bits per weight over all `weights` of the file -> bytes. UserError for what is no such number."""
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0.5 <= bits <= 32:
        raise UserError(f"--target-bpw {text!r}: expected bits per weight, a number from 0.5 to 32, such as 4.25")
    return int(bits * weights / 8)


class Measured:
    """Losses as they are measured, kept in a JSON file so that a run that was killed measures on where it stopped."""

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        """`plan` is what the numbers depend on (source, calibration, candidates ...); a file of another is dropped."""
        self.path, self.plan = path, json.loads(json.dumps(plan))
        self.table: dict[str, dict[str, Choice]] = {}
        found = read_json(path) if path.exists() else {}
        if found.get("plan") == self.plan:
            self.table = {t: _choices(path, t, kinds) for t, kinds in found.get("tensors", {}).items()}

    def put(self, tensor: str, choices: Mapping[str, Choice]) -> None:
        """Add a tensor's losses; they are on disk when this returns."""
        self.table[tensor] = dict(choices)
        rows = {t: {kind: list(c) for kind, c in kinds.items()} for t, kinds in self.table.items()}
        write_json(self.path, {"plan": self.plan, "tensors": rows})


def _choices(path: Path, tensor: str, kinds: Any) -> dict[str, Choice]:
    try:
        return {kind: Choice(int(size), float(loss)) for kind, (size, loss) in kinds.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {tensor} is {kinds!r:.80}, expected type: [bytes, loss]. Fix: delete it") from error
