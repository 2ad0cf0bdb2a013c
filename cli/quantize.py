"""`bitsmith quantize SRC OUT --format FMT`: write a quantized copy of a checkpoint.

Options that are not given are not passed on: each default lives in one place, `bitsmith.quantize` or the format itself.
"""

import argparse
from typing import Any

from . import _calibration, _threads
from ._output import note, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command; option names are keyword arguments of `bitsmith.quantize`."""
    parser = subparsers.add_parser(
        "quantize", help="write a quantized copy of a checkpoint", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("src", metavar="SRC", help="Hugging Face directory or hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--format", required=True, metavar="FMT", help="see `bitsmith formats`")
    parser.add_argument("--bits", type=int, metavar="B")
    parser.add_argument("--group-size", type=int, metavar="G", help="inputs that share a scale; -1: the whole row")
    parser.add_argument("--method", metavar="M", help="rtn, gptq, awq, hqq; any with any format")
    _calibration.add_flags(parser)
    parser.add_argument("--recipe", metavar="FILE.yaml", help="bits and groups per module")
    parser.add_argument("--head-bits", type=int, metavar="B", help="quantize lm_head too, at this width")
    parser.add_argument("--skip", action="append", metavar="GLOB", help="module to leave alone; may be repeated")
    parser.add_argument("--sym", action="store_true", help="fixed zero point")
    parser.add_argument("--asym", dest="sym", action="store_false", help="zero point per group")
    parser.add_argument("--desc-act", action=argparse.BooleanOptionalAction, help="act-order (GPTQ)")
    parser.add_argument("--damp-percent", type=float, metavar="P", help="Hessian damping, a fraction (GPTQ)")
    parser.add_argument("--device", metavar="DEV")
    _threads.add_flag(parser)
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="start over instead of continuing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds another checkpoint")


def run(args: argparse.Namespace) -> None:
    """Quantize as asked; progress goes to stderr."""
    quiet_libraries()
    _threads.apply(args)
    from ..calibrate.driver import quantize
    from ..calibrate.method import Settings

    options = {name: value for name, value in vars(args).items() if name not in ("command", "src", "out", "threads")}
    if "damp_percent" in options:
        options["settings"] = Settings(damp_percent=options.pop("damp_percent"))
    summary = quantize(args.src, args.out, **options)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, int | float))
    note(f"wrote {args.out}: {shown}")
