"""`bitsmith bench attention`: paged attention of every KV codec, decode and one prompt, beside torch's on contiguous
keys and values."""

import argparse
import re
import time
from typing import Any

from ..errors import UserError
from . import _bench_kernels as kernels
from ._output import note, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bench attention (and --device)")
    group.add_argument("--heads", metavar="Q/KVxDIM", help="of queries / of keys x numbers of each (default: 32/8x128)")
    group.add_argument("--kv-cache-dtype", metavar="TYPE,...", help="auto, int8 (default: all there are)")
    group.add_argument("--sequences", metavar="N,...", help="in one decode step (default: 1,8,32)")
    group.add_argument("--contexts", metavar="N,...", help="tokens of each of them (default: 512,2048,8192)")


def run(args: argparse.Namespace) -> None:
    """Measure, print, record."""
    from ..eval import attention_speed as speed
    from ..eval.kernel_speed import Clock, ceiling, rows

    if args.path is not None:
        raise UserError(f"bench attention takes no {args.path!r}: heads go into --heads 32/8x128")
    heads, codecs = _heads(args.heads), _codecs(args.kv_cache_dtype)
    sequences = kernels.numbers("--sequences", args.sequences, speed.SEQUENCES)
    contexts = kernels.numbers("--contexts", args.contexts, speed.CONTEXTS)
    peers = kernels.peers_of(args.against, speed.PEERS)
    device, what = kernels.place(args.device)
    clock = Clock(device)
    most = ceiling(clock, 2048 if device.type == "cpu" else 8192)
    if not args.json:
        kernels.print_ceiling(what, most)
    found: list[dict[str, Any]] = []
    start = time.perf_counter()
    for kv in codecs:
        table = {}
        for case, timings in speed.measure(
            speed.cases(kv, heads, sequences, contexts), clock, peers, args.samples, note
        ):
            table[case] = timings
            lines = rows(case, timings, most)
            found += lines
            if not args.json:
                kernels.print_rows(lines)
        if not args.no_record:
            said = {"model": str(heads), "spec": "", "kv": kv, "task": f"attention/{what}"}
            kernels.record(args, table, most, f"{next(iter(table)).label} us", said, time.perf_counter() - start)
    if args.json:
        print_json(kernels.as_json(what, most, found))


def _heads(text: str | None) -> Any:
    from ..eval.attention_speed import HEADS, Heads

    if text is None:
        return HEADS
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    heads = Heads(*map(int, match.groups())) if match else None
    if heads is None or not min(heads) or heads.query % heads.kv:
        raise UserError(f"--heads {text!r}: accepted are QUERY/KVxDIM, query heads a multiple of KV heads: 32/8x128")
    return heads


def _codecs(text: str | None) -> list[str]:
    """Names of codecs, "auto" being none."""
    import torch

    from ..kv_quant.base import codec_names, load_codec

    if text is None:
        return codec_names()
    return list(dict.fromkeys(load_codec(name, torch.bfloat16).name for name in text.split(",")))
