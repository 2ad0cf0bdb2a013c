"""`bitsmith formats`: what each --format value accepts.

Nothing here is written by hand: every dialect is asked for a recipe with each option in turn, and what it refuses is
not listed.
"""

import argparse
from typing import Any

from ..errors import UserError
from ._output import print_json

WIDTHS = range(1, 17)


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("formats", help="the formats that can be read and written, and their options")
    parser.add_argument("--json", action="store_true")


def _accepts(module: Any, options: Any) -> bool:
    try:
        module.recipe(options)
    except UserError:
        return False
    return True


def support(name: str, module: Any) -> dict[str, Any]:
    """One row of the matrix: what the format accepts, and the spec it writes when asked for nothing more."""
    from ..quant_formats.base import Options

    bits = [width for width in WIDTHS if _accepts(module, Options(name, bits=width))]
    zeros = [word for word, sym in (("sym", True), ("asym", False)) if _accepts(module, Options(name, sym=sym))]
    return {
        "format": name,
        "bits": bits,
        "zero_points": zeros,
        "desc_act": _accepts(module, Options(name, desc_act=True)),
        "default": str(module.recipe(Options(name)).default),
        "about": (module.__doc__ or "").splitlines()[0],
    }


def run(args: argparse.Namespace) -> None:
    """Print the matrix, one row per --format value."""
    from ..quant_formats.base import formats

    rows = [support(name, module) for module in formats().values() for name in module.NAMES]
    if args.json:
        print_json({"formats": rows})
        return
    width = max(len(row["format"]) for row in rows)
    for row in rows:
        options = [
            f"bits {','.join(map(str, row['bits']))}",
            *row["zero_points"],
            *(["desc_act"] if row["desc_act"] else []),
        ]
        print(
            f"{row['format']:<{width}}  {row['about']}\n{'':<{width}}  {' | '.join(options)} | default {row['default']}"
        )
