"""`bitsmith bench kernels`: every weight family x shape x rows beside F.linear and installed peers; `--tune` measures
launches instead and writes the table of this GPU (kernels/plans.py)."""

import argparse
import itertools
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._output import note, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bench kernels")
    group.add_argument(
        "--shapes", metavar="NxK,...", help="outputs x inputs, or `small` (default: 4096x4096 to 8192x8192)"
    )
    group.add_argument("--rows", metavar="M,...", help="rows of x (default: 1 to 2048)")
    group.add_argument(
        "--specs", metavar="SPEC,...", help="weight specs, or GGUF types as Q4_K (default: each family's)"
    )
    group.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")
    group.add_argument("--tune", action="store_true", help="measure launches on this GPU and write its table")


def run(args: argparse.Namespace) -> None:
    """Measure, print, record; or tune."""
    from ..eval import kernel_speed as speed
    from ..eval.kernel_peers import PEERS

    if args.path is not None:
        raise UserError(f"bench kernels takes no {args.path!r}: shapes go into --shapes 4096x4096,...")
    shapes, specs = _shapes(args.shapes), _specs(args.specs)
    rows, peers = numbers("--rows", args.rows, speed.ROWS), peers_of(args.against, PEERS)
    device, what = place(args.device)
    if args.tune:
        _tune(device, shapes, rows, specs)
        return
    cases = [speed.Case(spec, shape, m) for spec in specs for shape in shapes for m in rows]
    small = shapes == list(speed.SMALL)
    clock = speed.Clock(device, 1 << 20) if small else speed.Clock(device)
    most = speed.ceiling(clock, 256 if small else 2048 if device.type == "cpu" else 8192)
    if not args.json:
        print_ceiling(what, most)
    found: list[dict[str, Any]] = []
    start = time.perf_counter()
    measured = speed.measure(cases, clock, peers, args.samples, note)
    # A row a weight, when it is done: a run that is cut off keeps what it has.
    for _, group in itertools.groupby(measured, key=lambda pair: (pair[0].spec, pair[0].shape)):
        table: speed.Table = {}
        for case, timings in group:
            table[case] = timings
            lines = speed.rows(case, timings, most)
            found += lines
            if not args.json:
                print_rows(lines)
        if not args.no_record:
            first = next(iter(table))
            said = {
                "model": f"{first.shape[0]}x{first.shape[1]}",
                "spec": first.spec,
                "kv": "",
                "task": f"kernels/{what}",
            }
            record(args, table, most, f"m{first.label} us", said, time.perf_counter() - start)
    if args.json:
        print_json(as_json(what, most, found))


def _shapes(text: str | None) -> list[tuple[int, int]]:
    from ..eval.kernel_speed import SHAPES, SMALL

    if text in (None, "small"):
        return list(SMALL if text else SHAPES)
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", word)
        if not match or any(int(g) % 256 or not int(g) for g in match.groups()):
            raise UserError(f"--shapes {word!r}: accepted are OUTPUTSxINPUTS in multiples of 256, and small")
        found.append((int(match[1]), int(match[2])))
    return found


def numbers(flag: str, text: str | None, default: Sequence[int]) -> list[int]:
    """What is given, comma-separated, or the default. UserError for anything but numbers from 1."""
    if text is None:
        return list(default)
    if wrong := [word for word in text.split(",") if not word.isdecimal() or int(word) < 1]:
        raise UserError(f"{flag} {wrong[0]!r}: accepted are numbers from 1")
    return [int(word) for word in text.split(",")]


def _specs(text: str | None) -> list[str]:
    from ..eval.kernel_speed import SPECS
    from ..kernels.spec import Spec
    from ..quant_formats.gguf_blocks import BLOCKS

    if text is None:
        return list(SPECS)
    return [str(BLOCKS[word].spec if word in BLOCKS else Spec.parse(word)) for word in text.split(",")]


def peers_of(text: str | None, known: Iterable[str]) -> list[str]:
    """Those that --against names, all that are known without it. UserError for one that is not."""
    known = list(known)
    names = [] if text == "none" else known if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--against {unknown[0]!r} is not known; accepted: {', '.join(known)}, or none")
    return names


def place(text: str | None) -> tuple[Any, str]:
    """The device of --device, and what its rows call it: the GPU's name, or the CPU's threads."""
    import torch

    device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        return device, f"cpu/{torch.get_num_threads()} threads"
    return device, torch.cuda.get_device_name(device)


def _tune(device: Any, shapes: list[tuple[int, int]], rows: list[int], specs: list[str]) -> None:
    import torch

    from ..eval.kernel_speed import half_dtype, random_weight
    from ..kernels import tune
    from ..kernels.cuda import CudaMatmul
    from ..kernels.spec import Spec

    if device.type != "cuda":
        raise UserError(
            "--tune measures launches on a GPU, and there is none here (torch.cuda.is_available() is False)"
        )
    gpu = torch.cuda.get_device_name(device)
    path = tune.default_path(gpu)
    # What is around the product is in no kernel: specs that differ in nothing else share their rows.
    for spec in dict.fromkeys(Spec.parse(text).as_compiled() for text in specs):
        for shape in shapes:
            product = CudaMatmul(random_weight(spec, shape, device), half_dtype(device))
            found = tune.tune([product], rows, told=lambda row: note(f"{row['kernel']} {row['us']} us: {row}"))
            # After each weight: a run that is cut off keeps what it has.
            tune.write(path, gpu, found)
    note(f"table of {gpu}: {path}")


def print_ceiling(what: str, most: Any) -> None:
    """What the machine was measured to do."""
    print(f"{what}: copy {most.copy / 1e9:.1f} GB/s, matmul {most.matmul / 1e12:.2f} TFLOP/s")


def as_json(what: str, most: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All of one run."""
    return {"device": what, "copy_gb_s": most.copy / 1e9, "matmul_tflop_s": most.matmul / 1e12, "rows": rows}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line a peer, what is ours on the first of them."""
    for i, row in enumerate(rows):
        head = (
            f"{row['name']:<44} {row['value']:9.1f} us  {row['gb_s']:7.1f} GB/s ({row['of_copy']:4.0%})  "
            f"{row['tflop_s']:7.2f} TFLOP/s ({row['of_matmul']:4.0%})  {row['path']:<12}"
        )
        versus = f"{row['ratio']:6.2f} x {row['against']} ({row['against_value']:.1f})" if row["against"] else ""
        print((head if not i else " " * len(head)) + versus, flush=True)


def record(args: argparse.Namespace, table: Any, most: Any, metric: str, said: dict[str, Any], seconds: float) -> None:
    """One row of results: microseconds of the first case, all else in its detail. said: model, spec, kv and task."""
    from ..eval.kernel_speed import OURS, detail
    from ..eval.results import FILE_NAME, Result, append, default_dir, here

    timing = next(iter(table.values()))[OURS]
    result = Result(
        **here(),
        **said,
        metric=metric,
        value=timing.value,
        stderr=timing.stderr if len(timing.seconds) > 1 else None,
        n=len(timing.seconds),
        seconds=seconds,
        detail=detail(table, most),
    )
    append((Path(args.results) if args.results else default_dir()) / FILE_NAME, [result])
