"""`bitsmith bench decode PATH|SHAPE`: tokens per second beside transformers and llama.cpp on the same machine.
`bitsmith bench kernels` is in _bench_kernels.py; attention, samplers and load, which takes a SHAPE too, are in files
named likewise.

SHAPE is a random Llama of that shape (1.1b: TinyLlama's), quantized on the fly; a PATH is measured as it is, its peers
on random weights of its shape. Of a .gguf file, and of a SHAPE with --gguf-type, llama.cpp runs the very file that ours
does. Every engine reads the same number of tokens in the same run, interleaved; see
eval/speed.py.
"""

import argparse
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import _bench_attention, _bench_kernels, _bench_load, _bench_samplers, _threads
from ._bench_model import model_of
from ._output import note, print_json, quiet_libraries

_PEERS = {"transformers": ("transformers",), "llama.cpp": ("llama.cpp", "llama.cpp --no-repack")}
_OURS = "bitsmith"
_KINDS = ("decode", "kernels", "attention", "samplers", "load")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("bench", help="speed, beside other engines")
    parser.add_argument(
        "kind",
        metavar="|".join(_KINDS),
        help="a model, single products, attention over a paged cache, samplers, loading",
    )
    parser.add_argument(
        "path",
        metavar="PATH|SHAPE",
        nargs="?",
        help="decode and load: a model directory or .gguf file, or 1.1b, 8b, tiny; "
        "samplers: ROWSxVOCABULARY (64x131072)",
    )
    parser.add_argument(
        "--against",
        metavar="PEER,...",
        help="decode: transformers, llama.cpp; kernels: torch-int4, gemlite, bitsandbytes, torchao, llama.cpp; "
        "attention: sdpa, sdpa-grouped; samplers: transformers, llama.cpp; or none "
        "(default: those that are installed)",
    )
    parser.add_argument("--bits", type=int, default=4, metavar="B", help="of a SHAPE: 2, 3, 4 or 8 (default: 4)")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="of a SHAPE (default: 128)")
    parser.add_argument("--head-bits", type=int, default=8, metavar="B", help="output head of a SHAPE (default: 8)")
    parser.add_argument(
        "--gguf-type",
        metavar="TYPE",
        help="SHAPE as one GGUF file for all: Q4_0, Q4_K_M or Q8_0 (default: ours is GPTQ, llama.cpp's by --bits)",
    )
    parser.add_argument(
        "--int8-copy", action="store_true", help="decode: ours keeps an int8 copy, as `serve --int8-copy`"
    )
    _threads.add_flag(parser)
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="undisturbed samples a figure (default: 3)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="then stop sampling (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _bench_kernels.add_arguments(parser)
    _bench_attention.add_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--results", metavar="DIR", help="folder to append rows to (default: results/)")
    where.add_argument("--no-record", action="store_true", help="append no rows")


def run(args: argparse.Namespace) -> None:
    """Measure, print, record."""
    if args.kind not in _KINDS:
        raise UserError(f"bench {args.kind!r} does not exist; those that do are: {', '.join(_KINDS)}")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: accepted is 1 or more")
    threads = _threads.apply(args)
    if args.kind == "kernels":
        _bench_kernels.run(args)
        return
    if args.kind == "attention":
        _bench_attention.run(args)
        return
    if args.kind == "samplers":
        _bench_samplers.run(args)
        return
    if args.kind == "load":
        _bench_load.run(args, threads)
        return
    if args.path is None:
        raise UserError("bench decode needs a model directory or a shape: bitsmith bench decode 1.1b")
    peers = _peers(args.against)
    if args.int8_copy:
        _check_copy()
    quiet_libraries()
    from ..eval.speed import CASES, measure, rows

    with tempfile.TemporaryDirectory(prefix="bitsmith-bench-") as scratch:
        path = model_of(args, Path(scratch))
        if _is_gguf(Path(args.path)):
            peers = _peers_of_file(path, peers, args.against is not None)
        gguf = path if _is_gguf(path) else Path(scratch) / f"{_gguf_type(args)}.gguf"
        workers = _workers(args, path, gguf, peers, threads)
        start = time.perf_counter()
        try:
            table = measure(workers, args.samples, args.minutes, CASES, died=_report_death)
        finally:
            for worker in workers.values():
                worker.close()
        found = rows(table, _OURS, {peer: _PEERS[peer] for peer in peers})
        if not args.no_record:
            _record(args, path, table, threads, time.perf_counter() - start)
    if args.json:
        print_json({"model": args.path, "threads": threads, "rows": found})
    else:
        _print(found)


def _check_copy() -> None:
    """UserError where load_model would refuse: here, for a worker's error is no user's."""
    import torch

    from ..kernels.int8_copy import check

    check(torch.device("cpu"), torch.bfloat16, exact=False)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _peers_of_file(path: Path, peers: list[str], asked: bool) -> list[str]:
    """The peers that can run a GGUF file: llama.cpp alone. UserError where another was asked for."""
    if asked and set(peers) - {"llama.cpp"}:
        raise UserError(f"{path} is run by llama.cpp only: pass --against llama.cpp, or none")
    return [peer for peer in peers if peer == "llama.cpp"]


def _gguf_type(args: argparse.Namespace) -> str:
    """The file type of llama.cpp's model: the one asked for, or the usual one of these bits."""
    return args.gguf_type or ("Q8_0" if args.bits == 8 else "Q4_0")


def _peers(text: str | None) -> list[str]:
    """The peers asked for; None takes those that are installed. UserError for one that is unknown or missing."""
    names = [] if text == "none" else list(_PEERS) if text is None else text.split(",")
    unknown = [name for name in names if name not in _PEERS]
    if unknown:
        raise UserError(f"--against {unknown[0]!r} is not known; accepted: {', '.join(_PEERS)}, or none")
    if "llama.cpp" in names and not all(find_spec(package) for package in ("llama_cpp", "gguf")):
        missing = "llama.cpp needs llama-cpp-python and gguf, not installed: `pip install bitsmith[bench]`"
        if text is not None:
            raise UserError(f"{missing}, or leave it out of --against")
        note(missing)
        names.remove("llama.cpp")
    return names


def _workers(args: argparse.Namespace, path: Path, gguf: Path, peers: list[str], threads: int) -> dict[str, Any]:
    """An engine process per configuration; one that dies while it loads is said and left out."""
    from ..eval.engines import BitsmithEngine, LlamaCppEngine, TransformersEngine
    from ..eval.random_models import shape_of, write_gguf
    from ..eval.speed import CASES, EngineDied, Worker

    sequences = max(case.sequences for case in CASES)
    context = max(case.sequences * (case.prompt + case.steps + 2) for case in CASES)
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        _OURS: (BitsmithEngine, (path, sequences, context, args.int8_copy))
    }
    if "transformers" in peers:
        wanted["transformers"] = (TransformersEngine, (shape_of(args.path),))
    if "llama.cpp" in peers:
        if not gguf.exists():
            write_gguf(shape_of(args.path), gguf, gguf.stem)
        for engine, repack in zip(_PEERS["llama.cpp"], (True, False), strict=True):
            wanted[engine] = (LlamaCppEngine, (gguf, threads, sequences, context, repack))
    found: dict[str, Any] = {}
    # One after the other: loading is what takes most memory.
    for engine, (build, arguments) in wanted.items():
        try:
            found[engine] = Worker(build, arguments, threads)
        except EngineDied as error:
            _report_death(engine, str(error))
    return found


def _report_death(name: str, why: str) -> None:
    if name == _OURS:
        raise RuntimeError(f"our own engine died: {why}")
    note(f"{name} is left out: {why}")


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        line = f"{row['name']:<12} {row['value']:9.1f} {row['unit']}"
        if row["against"]:
            line += f"   {row['ratio']:6.2f} x {row['against']} ({row['against_value']:.1f})"
        print(line + ("" if row["clean"] else "   disturbed: do not quote"))


def _record(args: argparse.Namespace, path: Path, table: Any, threads: int, seconds: float) -> None:
    """One row per case and engine."""
    from ..eval.results import FILE_NAME, Result, append, default_dir, here
    from ..eval.subject import subject

    who, place = subject(str(path)), here()
    ours = who.spec + "+int8" * args.int8_copy
    specs = {_OURS: ours, "transformers": "bf16"}
    found = [
        Result(
            **place,
            model=Path(args.path).name,
            spec=specs.get(engine, who.spec if _is_gguf(path) else _gguf_type(args)),
            kv="none" if engine == _OURS else "",
            # Ours is named, so that a peer measured beside two of our forms is compared with the right one.
            task=f"bench/decode/{engine}/{threads} threads/{ours}",
            metric=case,
            value=cell.value,
            stderr=cell.stderr,
            n=len(cell.clean),
            seconds=seconds,
            method=who.method if engine == _OURS else "",
        )
        for (case, engine), cell in table.items()
    ]
    file = (Path(args.results) if args.results else default_dir()) / FILE_NAME
    append(file, found)
    note(f"{len(found)} rows appended to {file}")
