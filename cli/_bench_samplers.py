"""`bitsmith bench samplers`: every sampler's microseconds a row beside transformers' processors and llama.cpp's."""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._output import note, print_json

_PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
_ROWS, _VOCABULARY = 64, 131_072


def run(args: argparse.Namespace) -> None:
    """Measure, print, record."""
    import torch

    from ..eval import sampler_speed as speed

    rows, vocabulary = _size(args.path)
    peers = _peers(args.against)
    batch = speed.Batch(rows, vocabulary)
    found: list[dict[str, Any]] = []
    for name in speed.SAMPLERS:
        start = time.perf_counter()
        seconds = speed.measure(speed.contenders(name, batch, peers), args.samples)
        lines = speed.rows(name, seconds, rows)
        found += lines
        if not args.json:
            _print(lines)
        if not args.no_record:
            size = f"{rows}x{vocabulary}"
            _record(args, name, size, seconds, rows, torch.get_num_threads(), time.perf_counter() - start)
    if args.json:
        print_json({"rows": found, "batch": rows, "vocabulary": vocabulary, "threads": torch.get_num_threads()})


def _size(text: str | None) -> tuple[int, int]:
    """Rows and vocabulary of "64x131072". UserError for anything else."""
    if text is None:
        return _ROWS, _VOCABULARY
    words = text.split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words) or int(words[1]) < 128:
        raise UserError(f"bench samplers {text!r}: accepted is ROWSxVOCABULARY such as {_ROWS}x{_VOCABULARY}")
    return int(words[0]), int(words[1])


def _peers(text: str | None) -> list[str]:
    names = [] if text == "none" else list(_PEERS) if text is None else text.split(",")
    if unknown := [name for name in names if name not in _PEERS]:
        raise UserError(f"--against {unknown[0]!r} is not known; accepted: {', '.join(_PEERS)}, or none")
    missing = [name for name in names if not find_spec(_PEERS[name])]
    if missing and text is not None:
        raise UserError(f"--against {missing[0]}: it is not installed; `pip install bitsmith[bench]`, or leave it out")
    return [name for name in names if name not in missing]


def _print(lines: list[dict[str, Any]]) -> None:
    for row in lines:
        line = f"{row['name']:<28} {row['value']:9.1f} {row['unit']}"
        if row["against"]:
            line += f"   {row['ratio']:6.2f} x {row['against']} ({row['against_value']:.1f})"
        print(line, flush=True)


def _record(
    args: argparse.Namespace,
    name: str,
    size: str,
    seconds: dict[str, list[float]],
    rows: int,
    threads: int,
    took: float,
) -> None:
    """One row a contender."""
    from ..eval.results import FILE_NAME, Result, append, default_dir, here
    from ..eval.sampler_speed import per_row

    place = here()
    found = [
        Result(
            **place,
            model=size,
            spec="",
            kv="",
            task=f"samplers/{who}/{threads} threads",
            metric=name,
            value=per_row(taken, rows),
            stderr=None,
            n=len(taken),
            seconds=took,
            method="",
        )
        for who, taken in seconds.items()
    ]
    file = (Path(args.results) if args.results else default_dir()) / FILE_NAME
    append(file, found)
    note(f"{len(found)} rows appended to {file}")
