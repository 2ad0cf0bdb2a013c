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
    parser.add_argument("src", metavar="SRC", help="Hugging Face directory, .gguf file or hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write, or FILE.gguf")
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
    _add_gguf(parser)
    parser.add_argument("--device", metavar="DEV")
    _threads.add_flag(parser)
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="start over instead of continuing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds another checkpoint")


# Flags of --format gguf that say tensors' types, spelled as llama-quantize does.
_OVERRIDES = ("tensor_type", "pure", "output_tensor_type", "token_embedding_type")


def _add_gguf(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--format gguf:TYPE, or gguf with a target")
    group.add_argument("--imatrix", metavar="FILE", help="importance matrix, .gguf or .dat (default: of --calib)")
    group.add_argument("--tensor-type", action="append", metavar="REGEX=TYPE", help="may be repeated; first match wins")
    group.add_argument("--pure", action="store_true", help="no mixture: every tensor in the file's type")
    group.add_argument("--output-tensor-type", metavar="TYPE")
    group.add_argument("--token-embedding-type", metavar="TYPE")
    target = group.add_mutually_exclusive_group()
    target.add_argument("--target-bpw", metavar="B", help="bits per weight of the file: types by loss on --calib")
    target.add_argument("--target-size", metavar="SIZE", help="of the file, such as 5GiB: types by loss on --calib")


def _gguf_options(options: dict[str, Any]) -> Any:
    """Takes GGUF's own out of `options`: a GGUFOptions, None where none was given."""
    from ..calibrate.gguf_goal import GGUFOptions
    from ..calibrate.gguf_size import Target
    from ..quant_formats.gguf_mixture import parse_overrides

    overrides = {name: options.pop(name) for name in _OVERRIDES if name in options}
    sizes = {name: options.pop(f"target_{name}") for name in ("bpw", "size") if f"target_{name}" in options}
    imatrix = options.pop("imatrix", None)
    if not overrides and not sizes and imatrix is None:
        return None
    return GGUFOptions(imatrix, parse_overrides(**overrides), Target(**sizes) if sizes else None)


def run(args: argparse.Namespace) -> None:
    """Quantize as asked; progress goes to stderr."""
    quiet_libraries()
    _threads.apply(args)
    from ..calibrate.driver import quantize
    from ..calibrate.method import Settings

    options = {name: value for name, value in vars(args).items() if name not in ("command", "src", "out", "threads")}
    if "damp_percent" in options:
        options["settings"] = Settings(damp_percent=options.pop("damp_percent"))
    gguf = _gguf_options(options)
    if gguf is not None:
        options["gguf"] = gguf
    summary = quantize(args.src, args.out, **options)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, int | float))
    note(f"wrote {args.out}: {shown}")
