"""`bitsmith bench load PATH|SHAPE`: seconds to load a model for serving on the CPU, and how many times reading it
takes. SHAPE as in `bench decode`."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from ..errors import UserError
from ._bench_model import model_of
from ._output import note, print_json


def run(args: argparse.Namespace, threads: int) -> None:
    """Measure, print, record."""
    from ..eval import load_speed as speed

    if args.path is None:
        raise UserError("bench load needs a model directory, a .gguf file or a shape: bitsmith bench load 1.1b")
    with tempfile.TemporaryDirectory(prefix="bitsmith-bench-") as scratch:
        path = model_of(args, Path(scratch))
        start = time.perf_counter()
        seconds = speed.measure(path, args.samples)
        figures = {name: statistics.median(taken) for name, taken in seconds.items()} | {"ratio": speed.ratio(seconds)}
        if not args.no_record:
            _record(args, path, figures, threads, time.perf_counter() - start)
    if args.json:
        print_json({"model": args.path, "threads": threads, **figures, "samples": seconds})
    else:
        print(f"read {figures[speed.READ]:.2f} s, load {figures[speed.LOAD]:.2f} s: {figures['ratio']:.2f} x reading")


def _record(args: argparse.Namespace, path: Path, figures: dict[str, float], threads: int, took: float) -> None:
    """One row a figure."""
    from ..eval.results import FILE_NAME, Result, append, default_dir, here
    from ..eval.subject import subject

    # What was written for this run is named by its shape.
    who, place = subject(str(path), None if path == Path(args.path) else args.path), here()
    found = [
        Result(
            **place,
            model=who.model,
            spec=who.spec,
            kv="none",
            task=f"load/cpu bf16/{threads} threads",
            metric="load-cold/read-cold" if name == "ratio" else name,
            value=value,
            stderr=None,
            n=args.samples,
            seconds=took,
            method=who.method,
        )
        for name, value in figures.items()
    ]
    file = (Path(args.results) if args.results else default_dir()) / FILE_NAME
    append(file, found)
    note(f"{len(found)} rows appended to {file}")
