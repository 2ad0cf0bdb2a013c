"""The README's table of `bench kernels`: of every weight at one shape what a reader asks first.

Rows of x that several runs measured are as the newest one has them. Rows of results without `detail`, from before
2026-11-28, are not shown: they know neither bytes a second nor the machine's ceilings.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..quant_formats.gguf_blocks import BLOCKS
from .results import Result

_SHAPE = "4096x14336"
# Rows of x beside F.linear, and beside llama.cpp.
_DENSE_ROWS, _LLAMA_ROWS = ("1", "8", "64", "2048"), ("1", "8", "64")
_GGUF = {str(block.spec): name for name, block in BLOCKS.items()}


def kernels_table(rows: Iterable[Result]) -> list[list[str]]:
    """One line per weight and machine, in the order of the results; a dash where nobody measured."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.when):
        if row.model == _SHAPE and row.detail:
            cases = found.setdefault((row.spec, _machine(row)), {})
            cases |= row.detail["rows"]
    head = ["weight", "on, threads", "m1, us", "m1, GB/s (of copy)", "m2048, TFLOP/s (of matmul)"]
    peers = (("F.linear", _DENSE_ROWS), ("llama.cpp", _LLAMA_ROWS))
    head += [f"{peer}, times ours: m{' / '.join(wanted)}" for peer, wanted in peers]
    return [head, *(_line(spec, machine, cases) for (spec, machine), cases in found.items())]


def _line(spec: str, machine: str, cases: Mapping[str, Any]) -> list[str]:
    name = f"`{spec}`" + (f" {_GGUF[spec]}" if spec in _GGUF else "")
    one, most = cases.get("1"), cases.get("2048")
    return [
        name,
        machine,
        f"{one['us']:.0f}" if one else "–",
        f"{one['gb_s']:.1f} ({one['of_copy']:.0%})" if one else "–",
        f"{most['tflop_s']:.2f} ({most['of_matmul']:.0%})" if most else "–",
        _ratios(cases, _DENSE_ROWS, "linear"),
        _ratios(cases, _LLAMA_ROWS, "llama.cpp"),
    ]


def _ratios(cases: Mapping[str, Any], wanted: Iterable[str], peer: str) -> str:
    """Times of a peer, in the better of its configurations, over ours: "3.8 / 2.9 / – / 0.9"."""
    words = []
    for rows in wanted:
        case = cases.get(rows, {"against": {}})
        times = [us for name, us in case["against"].items() if name.split(" --")[0] == peer]
        words.append(f"{min(times) / case['us']:.2g}" if times else "–")
    return " / ".join(words) if set(words) != {"–"} else "–"


def _machine(row: Result) -> str:
    """The GPU, or a short name of the CPU and its threads."""
    _, device, *threads = row.task.split("/")
    if device != "cpu":
        return device
    cpu = re.sub(r"\(R\)|\(TM\)| Processor| CPU|@.*?GHz", "", row.machine["cpu"])
    return f"{cpu}, {threads[0].split()[0]}"
