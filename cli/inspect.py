"""`bitsmith inspect PATH`: what a checkpoint holds, and what it weighs."""

import argparse
from typing import Any

from ._output import print_json, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("inspect", help="format, bits per weight, per-tensor specs, bytes")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Print the summary, then one line per tensor."""
    quiet_libraries()
    from ..models.inspect import inspect_checkpoint

    found = inspect_checkpoint(args.path)
    if args.json:
        print_json(found)
        return
    for name, value in found.items():
        if name != "tensors":
            print(f"{name:<14} {value:.3f}" if isinstance(value, float) else f"{name:<14} {value}")
    width = max(map(len, found["tensors"]), default=0)
    for name, spec in found["tensors"].items():
        print(f"  {name:<{width}}  {spec}")
