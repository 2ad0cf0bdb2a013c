"""The flags of every command that runs an engine.

What is not given is not passed on: the defaults live in `bitsmith.LLM`.
"""

import argparse
from typing import Any

FLAGS = (
    ("--device", str, "DEV", "cpu (the default), cuda, cuda:1"),
    ("--dtype", str, "TYPE", "of activations: float32, float16, bfloat16"),
    ("--max-model-len", int, "N", "most tokens of prompt and completion together"),
    ("--max-num-seqs", int, "N", "sequences in one batch"),
    ("--max-num-batched-tokens", int, "N", "tokens in one step; longer prompts are prefilled in chunks"),
    ("--block-size", int, "N", "tokens per KV block"),
    ("--kv-cache-dtype", str, "TYPE", "how the KV cache is stored: auto, int8"),
    ("--gpu-memory-utilization", float, "SHARE", "of the device's memory, for everything"),
)


SWITCHES = (
    ("--enforce-eager", "run every step through Python: no recorded decode steps"),
    ("--int8-copy", "CPU: keep an int8 copy of quantized weights for prefill and batches, a byte a weight more"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the engine's flags; `argparse.SUPPRESS` keeps those not given out of the namespace."""
    group = parser.add_argument_group("engine")
    for flag, kind, metavar, text in FLAGS:
        group.add_argument(flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)
    for flag, text in SWITCHES:
        group.add_argument(flag, action="store_true", help=text, default=argparse.SUPPRESS)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `bitsmith.LLM` among `args`."""
    names = {flag.lstrip("-").replace("-", "_") for flag, *_ in (*FLAGS, *SWITCHES)}
    return {name: value for name, value in vars(args).items() if name in names}
