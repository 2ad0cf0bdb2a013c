"""Tokens per second of several engines on one model, measured so that a loaded machine cannot decide the result.

The cases are llama-bench's: `prefill-512` reads one prompt of 512 tokens; `decode-b1` writes 64 tokens after one prompt token;
`decode-b8` and `decode-b32` write 16 tokens for each of 8 or 32 sequences after prompts of 16, aggregate rate.

Engines are interleaved: every round measures each case on each engine in turn, so slow drift of the machine hits all alike.
A sample is disturbed when its threads spent more than 7 % of threads x wall time ready to run but not running (Linux's per-thread
run-queue wait) or taken away by the hypervisor (steal time); disturbed samples are measured again, up to a time limit. The
figure is the median of the undisturbed ones; where a cell has none, of all of them, and the row says so. llama.cpp collapses
20-100 times on a loaded machine (its threads spin at barriers), so a run without this rule says nothing.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .peers import Engine

_LOST_LIMIT = 0.07
_CLOCK_TICKS = 100


@dataclass(frozen=True)
class Case:
    """One kind of measurement. `steps` 0 measures the reading of `prompt` tokens, else the writing of `steps` tokens."""

    name: str
    sequences: int
    prompt: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.sequences * (self.steps or self.prompt)


CASES = (
    Case("decode-b1", 1, 1, 64),
    Case("prefill-512", 1, 512, 0),
    Case("decode-b8", 8, 16, 16),
    Case("decode-b32", 32, 16, 16),
)


@dataclass
class Cell:
    """Samples of one case on one engine: (tokens per second, share of the time the threads could not run)."""

    samples: list[tuple[float, float]] = field(default_factory=list)

    @property
    def clean(self) -> list[float]:
        return [rate for rate, lost in self.samples if lost <= _LOST_LIMIT]

    @property
    def value(self) -> float:
        """Median of the undisturbed samples, of all of them where every one was disturbed."""
        return statistics.median(self.clean or [rate for rate, _ in self.samples])

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean of the samples behind `value`; None for a single one."""
        used = self.clean or [rate for rate, _ in self.samples]
        return statistics.stdev(used) / len(used) ** 0.5 if len(used) > 1 else None


Table = dict[tuple[str, str], Cell]


def measure(
    engines: Sequence[Engine], threads: int, samples: int = 3, minutes: float = 10.0, cases: Iterable[Case] = CASES
) -> Table:
    """Measure every case on every engine until each has `samples` undisturbed samples or `minutes` have passed.

    Every cell is measured at least once. Keys are (case name, engine name).
    """
    cases = list(cases)
    table = {(case.name, engine.name): Cell() for case in cases for engine in engines}
    deadline = time.monotonic() + 60 * minutes
    with tqdm(total=len(table) * samples, desc="bench", unit="sample", file=sys.stderr, disable=None) as bar:
        while True:
            for case in cases:
                for engine in engines:
                    cell = table[case.name, engine.name]
                    late = time.monotonic() > deadline
                    if len(cell.clean) >= samples or (late and cell.samples):
                        continue
                    cell.samples.append(_sample(engine, case, threads))
                    bar.update(int(cell.samples[-1][1] <= _LOST_LIMIT))
            if time.monotonic() > deadline or all(len(cell.clean) >= samples for cell in table.values()):
                return table


def _sample(engine: Engine, case: Case, threads: int) -> tuple[float, float]:
    def read() -> None:
        engine.prefill(case.prompt)

    def write() -> None:
        for _ in range(case.steps):
            engine.step()

    if case.steps:
        engine.start(case.sequences, case.prompt)
        # The first step after a change of batch allocates.
        engine.step()
    else:
        engine.prefill(min(16, case.prompt))
    seconds, lost = _timed(write if case.steps else read, threads)
    return case.tokens / seconds, lost


def _timed(work: Callable[[], None], threads: int) -> tuple[float, float]:
    """Wall seconds of `work`, and the share of threads x wall that was taken from it."""
    waited, start = _waited(), time.perf_counter()
    work()
    wall = time.perf_counter() - start
    return wall, (_waited() - waited) / (threads * wall)


def _waited() -> float:
    """Seconds that this process's threads have waited for a core, plus seconds the hypervisor took; 0 where not told.

    /proc/self/task/N/schedstat: nanoseconds run, nanoseconds waited on a run queue, time slices. /proc/stat's eighth
    figure is steal, in ticks.
    """
    queued = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        queued += int(task.read_text().split()[1])
    stat = Path("/proc/stat")
    stolen = int(stat.read_text().split(maxsplit=9)[8]) if stat.exists() else 0
    return queued / 1e9 + stolen / _CLOCK_TICKS


def rows(table: Table, ours: str, peers: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One row per case and peer: our value, and its ratio to the better of the peer's configurations (named first).

    Keys: name, value, unit, ratio (ours / peer's), against, against_value, clean (undisturbed samples behind the weaker
    of the two figures; 0 means: measured on a loaded machine, do not quote). Without peers ratio and against are None.
    """
    found = []
    for name in dict.fromkeys(case for case, _ in table):
        cell = table[name, ours]
        row = {"name": name, "value": cell.value, "unit": "tok/s"}
        if not peers:
            found.append(row | {"ratio": None, "against": None, "against_value": None, "clean": len(cell.clean)})
        for configurations in peers:
            best = max((table[name, peer] for peer in configurations), key=lambda peer: peer.value)
            compared = {"ratio": cell.value / best.value, "against": configurations[0], "against_value": best.value}
            found.append(row | compared | {"clean": min(len(cell.clean), len(best.clean))})
    return found
