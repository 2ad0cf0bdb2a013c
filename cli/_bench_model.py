"""The model of `bench decode` and `bench load`: a path, or a shape that is written for the run."""

import argparse
from pathlib import Path


def model_of(args: argparse.Namespace, scratch: Path) -> Path:
    """Where the model lies: args.path, or in `scratch` a random one of that shape, as --gguf-type or --bits and its
    neighbours say. What exists is a path, whatever shape has its name."""
    from ..eval.random_models import SHAPES, write_checkpoint, write_gguf

    path = Path(args.path)
    if args.path not in SHAPES or path.exists():
        return path
    if args.gguf_type:
        path = scratch / f"{args.gguf_type}.gguf"
        write_gguf(SHAPES[args.path], path, args.gguf_type)
    else:
        path = scratch / "model"
        write_checkpoint(SHAPES[args.path], path, args.bits, args.group_size, args.head_bits)
    return path
