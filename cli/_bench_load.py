"""`bitsmith bench load PATH`: seconds to load a model for serving on the CPU, and how many times reading it takes."""

import argparse
import statistics
import time
from pathlib import Path

from ..errors import UserError
from ._output import note, print_json


def run(args: argparse.Namespace, threads: int) -> None:
    """Measure, print, record."""
    from ..eval import load_speed as speed

    if args.path is None:
        raise UserError("bench load needs a model directory or a .gguf file: bitsmith bench load model.gguf")
    start = time.perf_counter()
    seconds = speed.measure(args.path, args.samples)
    figures = {name: statistics.median(taken) for name, taken in seconds.items()} | {"ratio": speed.ratio(seconds)}
    if not args.no_record:
        _record(args, figures, threads, time.perf_counter() - start)
    if args.json:
        print_json({"model": args.path, "threads": threads, **figures, "samples": seconds})
    else:
        print(f"read {figures[speed.READ]:.2f} s, load {figures[speed.LOAD]:.2f} s: {figures['ratio']:.2f} x reading")


def _record(args: argparse.Namespace, figures: dict[str, float], threads: int, took: float) -> None:
    """One row a figure."""
    from ..eval.results import FILE_NAME, Result, append, default_dir, here
    from ..eval.subject import subject

    who, place = subject(args.path), here()
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
