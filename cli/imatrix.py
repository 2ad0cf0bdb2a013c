"""`bitsmith imatrix MODEL --calib TEXT -o FILE`: the importance matrix that GGUF quantizers weigh errors with.

Options that are not given are not passed on: each default lives in `calibrate.importance.measure`.
"""

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import _calibration, _threads
from ._output import note, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command; option names are keyword arguments of `measure`."""
    parser = subparsers.add_parser(
        "imatrix", help="measure an importance matrix for GGUF", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("src", metavar="MODEL", help="Hugging Face directory, .gguf file or hub id")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".gguf, or .dat for the older form")
    _calibration.add_flags(parser, required=True)
    parser.add_argument("--process-output", action="store_true", help="measure the input of the output weight too")
    parser.add_argument("--device", metavar="DEV")
    _threads.add_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and write; progress and what was not reached go to stderr."""
    quiet_libraries()
    _threads.apply(args)
    from ..calibrate.imatrix import write
    from ..calibrate.importance import measure

    out = Path(args.output)
    if out.suffix not in (".gguf", ".dat"):
        raise UserError(f"-o {out}: the file must end in .gguf or .dat, which says the form it is written in")
    if not out.parent.is_dir():
        raise UserError(f"-o {out}: there is no directory {out.parent}. Fix: make it first")
    options = {name: v for name, v in vars(args).items() if name not in ("command", "src", "output", "threads")}
    imatrix, unreached = measure(args.src, **options)
    for line in unreached:
        note(line)
    write(imatrix, out)
    note(f"wrote {out}: {len(imatrix.entries)} weights, {imatrix.chunk_count} blocks of {imatrix.chunk_size} tokens")
