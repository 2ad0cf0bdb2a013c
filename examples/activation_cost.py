"""What int8 activations cost, and an int8 copy of the weights: KL divergence of a served bfloat16 model from its own
exact path, with and without them.

    bitsmith imatrix MODEL -o im.gguf --calib CALIB.txt
    python examples/activation_cost.py MODEL TEXT [--formats gptq gguf:q4_k_m ...] [--acts int8 ...] [--imatrix im.gguf]
        [--tokens 8192]

Without --formats, MODEL is rounded to 4 bits g128 (`gptq`). `gguf:TYPE` is a file of that type by rounding, with the
importance matrix if there is one (IQ1 and IQ2 types need it). Windows of 48 tokens keep products on the paths of few
rows; only with AMX some of more than 23 rows (groups of 32: Q8_0, Q4_0) have a path without int8 activations. Scales of
two levels and grids (K-quants, IQ types) have no native product of bfloat16 activations: theirs are decoded at every
call, seconds for a thousand tokens. Appends a row for each to results/activations.jsonl.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsmith
from bitsmith.calibrate.gguf_goal import GGUFOptions, is_gguf
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.results import Result, append, default_dir, here
from bitsmith.eval.text import load_text, tokenize
from torch import Tensor

CTX, TOKENS = 48, 8192
# int8-copy: int8 activations that meet an int8 copy of the weights, which all products of more than 8 rows do
# (load_model's int8_copy).
ACTS = ("int8", "int8-copy", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="text to measure on")
    parser.add_argument("--formats", nargs="+", default=["gptq"], metavar="FORMAT")
    parser.add_argument("--acts", nargs="+", default=ACTS, choices=ACTS)
    parser.add_argument("--imatrix", help="importance matrix for GGUF types")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    ids = tokenize(bitsmith.load_tokenizer(args.model), load_text(str(args.text)))
    for wanted in args.formats:
        with tempfile.TemporaryDirectory() as scratch:
            out = made(args.model, wanted, args.imatrix, Path(scratch))
            for row in measured(out, ids, args.tokens, args.acts):
                spec = wanted if is_gguf(wanted) else "affine4.g128.sym"
                task = f"activations/{row.pop('act')}/{args.text.stem}/windows/{CTX}"
                found = Result(**here(), **row, model=args.model.name, spec=spec, kv="none", method="rtn", task=task)
                append(default_dir() / "activations.jsonl", [found])
                print(f"{spec} {task}: {found.value:.3e} +- {found.stderr:.1e}, {found.seconds:.0f} s", flush=True)


def made(model: Path, wanted: str, imatrix: str | None, scratch: Path) -> Path:
    how: dict[str, Any] = {"gguf": GGUFOptions(imatrix)} if is_gguf(wanted) else {"bits": 4, "group_size": 128}
    out = scratch / ("model.gguf" if is_gguf(wanted) else "model")
    bitsmith.quantize(model, out, format=wanted, method="rtn", progress=False, **how)
    return out


def measured(out: Path, ids: Tensor, tokens: int, acts: Sequence[str]) -> list[dict[str, Any]]:
    """What differs between the rows of `acts`."""
    exact, rows = bitsmith.load_model(out, exact=True), []
    for act in acts:
        os.environ["BITSMITH_ACT"] = act.removesuffix("-copy")
        started = time.monotonic()
        served = bitsmith.load_model(out, dtype="bfloat16", int8_copy=act == "int8-copy")
        found = kl_divergence(served, exact, ids, ctx=CTX, max_tokens=tokens, protocol="windows")
        figures = {"value": found["kld_mean"], "stderr": found["kld_stderr"], "n": int(found["tokens"])}
        rows.append({"act": act, "metric": "kld_mean", "seconds": time.monotonic() - started, **figures})
    return rows


if __name__ == "__main__":
    main()
