"""`bitsmith inspect PATH`: what a checkpoint holds, and what it weighs; with --validate: is it sound."""

import argparse
from dataclasses import asdict
from typing import Any

from ._output import note, print_json, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("inspect", help="format, bits per weight, per-tensor specs, bytes")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--validate", action="store_true", help="look for NaN, absurd scales and garbage instead; exit code 1 if any"
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print the summary, then one line per tensor."""
    quiet_libraries()
    if args.validate:
        return _validate(args.path, args.json)
    from ..models.inspect import inspect_checkpoint

    found = inspect_checkpoint(args.path)
    if args.json:
        print_json(found)
        return 0
    for name, value in found.items():
        if name != "tensors":
            print(f"{name:<14} {value:.3f}" if isinstance(value, float) else f"{name:<14} {value}")
    width = max(map(len, found["tensors"]), default=0)
    for name, spec in found["tensors"].items():
        print(f"  {name:<{width}}  {spec}")
    return 0


def _validate(path: str, as_json: bool) -> int:
    """A line for everything that is wrong with a weight; 1 where there is any."""
    from ..models.validate import validate_checkpoint

    count, found = validate_checkpoint(path)
    if as_json:
        print_json({"weights": count, "findings": [asdict(finding) for finding in found]})
        return int(bool(found))
    rows = [(f.tensor, f.stored, _share(f.count, f.total), _place(f.first), f.problem) for f in found]
    if rows:
        rows.insert(0, ("tensor", "stored as", "count", "first", "problem"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    note(f"{path}: {count} weights, {len({f.tensor for f in found})} of them with problems")
    return int(bool(found))


def _share(count: int, total: int) -> str:
    return f"{count} of {total}" if total else ""


def _place(index: tuple[int, ...]) -> str:
    return ",".join(map(str, index))
