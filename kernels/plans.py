"""Plan: how one product is launched, and the tables of measured ones.

A table is results/tune/<gpu>.json, <gpu> being torch's name of the device in lower case with dashes (nvidia-h200):

    {"gpu": "NVIDIA H200", "triton": "3.6.0", "rows": [
    {"spec": "affine4.g128.asym", "n": 4096, "k": 4096, "m": 1, "kernel": "gemv",
     "tile": {"BM": 1, "BN": 32, "BK": 128}, "num_warps": 4, "num_stages": 2, "split": 4, "us": 4.1}, ...]}

`spec` is what the kernel is compiled for (`Spec.as_compiled`), since the group, the levels of the scales and the length
of a vector cost as much as the bits do; n and k are outputs and inputs as packed. `m` is the number of rows measured, a
power of two; it serves every number of rows above the next smaller one, and the largest serves all above. A product
takes the row of its spec and shape; without one, the heuristics of cuda.plan. A row of another shape is no substitute:
`split` and BN fill one GPU with one N and K. Nothing is ever measured while a model runs: `bitsmith bench kernels
--tune` does that and writes the table, with --shapes for those of a model.

Looked up in this order: `$XDG_CACHE_HOME/bitsmith/tune` (by default ~/.cache; what --tune of an installed bitsmith
writes), then results/tune of the package, which wheels carry.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lang import EXACT
from .spec import Spec

PACKAGED = Path(__file__).resolve().parents[1] / "results" / "tune"
KERNELS = ("gemv", "gemm", "dequant")
_TILES = {"gemv": {"BM", "BN", "BK"}, "gemm": {"BM", "BN", "BK"}, "dequant": {"BN", "BK"}}
_NUMBERS = ("n", "k", "m", "num_warps", "num_stages", "split")
# spec, n, k
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Plan:
    """How one product is computed. Set by `plan` of a kernel module or read from a table."""

    # gemv | gemm | dequant | scaled | scaled_mx
    kernel: str
    # Tile sizes, as the kernel's constexprs.
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    # Programs that share one output tile, each with its part of K.
    split: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **EXACT}


def power_of_two(n: int) -> int:
    """The smallest one that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def file_name(gpu: str) -> str:
    """Of the table for torch's name of a device."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def own_dir() -> Path:
    """Where a user's own tables are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitsmith" / "tune"


@cache
def tables(gpu: str) -> Mapping[Key, Mapping[int, Plan]]:
    """{spec, n, k: {m: plan}} of every table of that device, the user's own rows first; read once.

    Raises UserError for a damaged table."""
    found: dict[Key, dict[int, Plan]] = {}
    for folder in (PACKAGED, own_dir()):
        path = folder / file_name(gpu)
        if path.is_file():
            for row in read(path)["rows"]:
                key = (row["spec"], row["n"], row["k"])
                plan = Plan(row["kernel"], row["tile"], row["num_warps"], row["num_stages"], row["split"])
                found.setdefault(key, {})[row["m"]] = plan
    return found


def tuned(gpu: str, key: Key, rows: int) -> Plan | None:
    """The measured plan for `rows` inputs, or None where nobody measured one."""
    measured = tables(gpu).get(key)
    if not measured:
        return None
    above = [m for m in measured if m >= rows]
    best = measured[min(above) if above else max(measured)]
    # A gemv holds all its rows at once.
    return None if best.kernel == "gemv" and best.tile["BM"] < rows else best


def read(path: Path) -> dict[str, Any]:
    """A table. Raises UserError naming file and row for one that is damaged."""
    fix = "delete the file, or measure again with `bitsmith bench kernels --tune`"
    try:
        table = json.loads(path.read_text())
        rows = table["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a table of tuned kernels ({error}); {fix}") from None
    for number, row in enumerate(rows, start=1):
        kernel = row.get("kernel") if isinstance(row, dict) else None
        if kernel not in KERNELS:
            raise UserError(f"{path}, row {number}: kernel is {kernel!r}; accepted: {', '.join(KERNELS)}; {fix}")
        if problem := _spec_problem(row.get("spec")):
            raise UserError(f"{path}, row {number}: {problem}; {fix}")
        wrong = [name for name in _NUMBERS if not isinstance(row.get(name), int) or row[name] < 1]
        if wrong:
            raise UserError(f"{path}, row {number}: {wrong[0]} is {row.get(wrong[0])!r}, not a positive number; {fix}")
        tile = row.get("tile")
        if not isinstance(tile, dict) or set(tile) != _TILES[kernel] or any(t & (t - 1) for t in tile.values()):
            raise UserError(
                f"{path}, row {number}: tile is {tile!r}; accepted: a power of two for each of "
                f"{', '.join(sorted(_TILES[kernel]))}; {fix}"
            )
    return dict(table)


def _spec_problem(text: Any) -> str:
    """Why no product would ever look up `text`, or ""."""
    if not isinstance(text, str):
        return f"spec is {text!r}, not a spec such as affine4.g128.asym"
    try:
        compiled = str(Spec.parse(text).as_compiled())
    except UserError as error:
        return str(error)
    return "" if compiled == text else f"spec is {text!r}; kernels are compiled for {compiled!r}"
