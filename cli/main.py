"""The `bitsmith` command line.

One file in this folder is one subcommand: the file name is the command, `add_parser(subparsers)` declares its
arguments and `run(args) -> int | None` does the work. There is no registry to keep; names that start with an
underscore are helpers.

Exit codes: 0 done; 2 the input is at fault, said in one message on stderr (argparse's own complaints included); 1 a
defect of ours, with its traceback, or `inspect --validate` found something; 130 interrupted. Commands import torch and
the rest inside `run`, so `--help` answers at once.
"""

import argparse
import difflib
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..errors import UserError

INTERRUPTED = 130
# What a shell reports for a process that SIGPIPE ended: 128 + 13.
BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates, and reports a wrong command line as a UserError that names the nearest right
    one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse leftovers here, where the subcommand's own options are known and can be suggested."""
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            near = difflib.get_close_matches(left[0].split("=")[0], options, n=1)
            self.error(f"unknown argument {left[0]!r}" + (f": did you mean {near[0]}?" if near else ""))
        return parsed, left


def command_names() -> list[str]:
    """The subcommands: every module of this folder but this one and the helpers."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name != "main" and not name.startswith("_"))


def load_command(name: str) -> ModuleType:
    """The module of one subcommand, with its `add_parser` and `run`."""
    return import_module(f".{name}", __package__)


def build_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `bitsmith` with the subcommands in `names`."""
    description = "Quantize language models, measure what it cost, serve them."
    parser = Parser(prog="bitsmith", description=description)
    parser.add_argument("--version", action="version", version=f"bitsmith {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        load_command(name).add_parser(subparsers)
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    names = command_names()
    first = argv[0] if argv else None
    if first is not None and not first.startswith("-") and first not in names:
        near = difflib.get_close_matches(first, names, n=1)
        guess = f"did you mean `bitsmith {near[0]}`? " if near else ""
        raise UserError(f"unknown command {first!r}: {guess}The commands are {', '.join(names)}")
    args = build_parser([first] if first in names else names).parse_args(argv)
    return int(load_command(args.command).run(args) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code."""
    try:
        try:
            return _dispatch(sys.argv[1:] if argv is None else argv)
        finally:
            # Here and not at exit, so that a reader who left is noticed below (`--help` leaves by SystemExit).
            sys.stdout.flush()
    except UserError as error:
        print(f"bitsmith: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bitsmith: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout left (`| head`). Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
