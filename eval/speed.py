"""Tokens per second of several engines on one model, measured so that a loaded machine cannot decide the result.

The cases are llama-bench's: `prefill-512` reads one prompt of 512 tokens; `decode-b1` writes 64 tokens after one prompt
token; `decode-b8` and `decode-b32` write 16 tokens for each of 8 or 32 sequences after prompts of 16, aggregate rate.

Every engine runs in a process of its own (`Worker`), so one that crashes takes no other with it (llama.cpp built by gcc
12 for an AMX processor dies in its first product) and thread pools do not meet. Engines are interleaved: every round
measures each case on each engine in turn, so slow drift of the machine hits all alike. A sample is disturbed when its
threads spent more than 7 % of threads x wall time ready to run but not running (Linux's per-thread run-queue wait) or
taken away by the hypervisor (steal time); disturbed samples are measured again, up to a time limit. The figure is the
median of the undisturbed ones; where a cell has none, of all of them, and the row says so. llama.cpp collapses 20-100
times on a loaded machine (its threads spin at barriers), so a run without this rule says nothing.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..errors import UserError

_LOST_LIMIT = 0.07
_CLOCK_TICKS = 100
# A decode sample ends early after this long: on a loaded machine llama.cpp was seen at 0.5 tokens per second.
_SAMPLE_SECONDS = 20.0


@dataclass(frozen=True)
class Case:
    """One kind of measurement.

    `steps` 0 measures the reading of `prompt` tokens, else the writing of `steps` tokens.
    """

    name: str
    sequences: int
    prompt: int
    steps: int


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


class Engine(Protocol):
    """One model in one engine. Sequences share nothing; each call blocks until its logits are there."""

    def prefill(self, tokens: int) -> None:
        """Read one prompt of `tokens` into an empty cache; only the last token's logits."""
        ...

    def start(self, sequences: int, prompt: int) -> None:
        """Empty the cache and read a prompt of `prompt` tokens into each of `sequences`."""
        ...

    def step(self) -> None:
        """One more token for every sequence, logits for each."""
        ...


class Sampler(Protocol):
    """What `measure` asks for figures."""

    def sample(self, case: Case) -> tuple[float, float]:
        """Tokens per second, and the share of threads x wall that was taken away. EngineDied if the engine is gone."""
        ...


class EngineDied(Exception):
    """An engine's process ended while it was being measured."""


class Worker:
    """An engine in a process of its own, which measures itself.

    Raises UserError with the engine's own message where it cannot be built, EngineDied where building kills it.
    """

    def __init__(self, build: Callable[..., Engine], arguments: tuple[Any, ...], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_work, args=(remote, build, arguments, threads), daemon=True)
        self._process.start()
        remote.close()
        try:
            self._receive()
        except (UserError, EngineDied):
            self.close()
            raise

    def sample(self, case: Case) -> tuple[float, float]:
        try:
            self._pipe.send(case)
        except BrokenPipeError:
            raise self._death() from None
        rate, lost = self._receive()
        return rate, lost

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _death(self) -> EngineDied:
        self._process.join()
        return EngineDied(f"its process ended with exit code {self._process.exitcode}")

    def close(self) -> None:
        """End the process and give its memory back."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, build: Callable[..., Engine], arguments: tuple[Any, ...], threads: int) -> None:
    """The worker's side: build, say so, then measure every case that arrives until the other end closes."""
    import torch

    torch.set_num_threads(threads)
    try:
        engine = build(*arguments)
    except UserError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(sample(engine, case, threads))


def measure(
    engines: Mapping[str, Sampler],
    samples: int = 3,
    minutes: float = 10.0,
    cases: Iterable[Case] = CASES,
    died: Callable[[str, str], None] = lambda name, why: None,
) -> Table:
    """Measure every case on every engine until each has `samples` undisturbed samples or `minutes` have passed.

    Every cell is measured at least once. An engine that dies is left out, its cells with it, and `died` told its name
    and why. Keys are (case name, engine name).
    """
    cases, alive = list(cases), dict(engines)
    table = {(case.name, name): Cell() for case in cases for name in engines}
    deadline = time.monotonic() + 60 * minutes
    with tqdm(total=len(table) * samples, desc="bench", unit="sample", file=sys.stderr, disable=None) as bar:
        while True:
            for case in cases:
                for name in list(alive):
                    cell = table[case.name, name]
                    if len(cell.clean) >= samples or (cell.samples and time.monotonic() > deadline):
                        continue
                    try:
                        cell.samples.append(alive[name].sample(case))
                    except EngineDied as error:
                        died(name, str(error))
                        del alive[name]
                        continue
                    bar.update(int(cell.samples[-1][1] <= _LOST_LIMIT))
            table = {key: cell for key, cell in table.items() if key[1] in alive}
            if time.monotonic() > deadline or all(len(cell.clean) >= samples for cell in table.values()):
                return table


def sample(engine: Engine, case: Case, threads: int) -> tuple[float, float]:
    """One measurement: tokens per second, and the share of threads x wall that was taken away."""

    def read() -> int:
        engine.prefill(case.prompt)
        return case.prompt

    def write() -> int:
        deadline, written = time.monotonic() + _SAMPLE_SECONDS, 0
        while written < case.steps and time.monotonic() < deadline:
            engine.step()
            written += 1
        return case.sequences * written

    if case.steps:
        engine.start(case.sequences, case.prompt)
        # The first step after a change of batch allocates.
        engine.step()
    else:
        engine.prefill(min(16, case.prompt))
    tokens, seconds, lost = _timed(write if case.steps else read, threads)
    return tokens / seconds, lost


def _timed(work: Callable[[], int], threads: int) -> tuple[int, float, float]:
    """What `work` returned, its wall seconds, and the share of threads x wall that was taken from it."""
    waited, start = _waited(), time.perf_counter()
    tokens = work()
    wall = time.perf_counter() - start
    return tokens, wall, (_waited() - waited) / (threads * wall)


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


def rows(table: Table, ours: str, peers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One row per case and peer: our value, and its ratio to the best of the peer's configurations (engine names).

    Keys: name, value, unit, ratio (ours / peer's), against, against_value, clean (undisturbed samples behind the weaker
    of the two figures; 0 means: measured on a loaded machine, do not quote). Where nothing is left to compare with,
    ratio, against and against_value are None.
    """
    found = []
    for name in dict.fromkeys(case for case, _ in table):
        cell = table[name, ours]
        row = {"name": name, "value": cell.value, "unit": "tok/s"}
        compared = []
        for peer, configurations in peers.items():
            cells = [table[name, engine] for engine in configurations if (name, engine) in table]
            if not cells:
                continue
            best = max(cells, key=lambda each: each.value)
            versus = {"ratio": cell.value / best.value, "against": peer, "against_value": best.value}
            compared.append(row | versus | {"clean": min(len(cell.clean), len(best.clean))})
        alone = row | {"ratio": None, "against": None, "against_value": None, "clean": len(cell.clean)}
        found += compared or [alone]
    return found
