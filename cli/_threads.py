"""`--threads`, for every command that runs a model."""

import argparse


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per physical core)")


def apply(args: argparse.Namespace) -> int:
    """Set torch's threads, which the native kernels follow, and return their number."""
    from ..kernels.threads import set_threads

    return set_threads(getattr(args, "threads", None))
