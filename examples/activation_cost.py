"""What int8 activations cost: KL divergence of a served bfloat16 model from its own exact path, with and without them.

    python examples/activation_cost.py MODEL TEXT

MODEL is rounded to 4 bits g128. Windows of 48 tokens keep products on the paths of few rows, where int8 activations
are used. Appends a row for each to results/activations.jsonl.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import bitsmith
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.results import Result, append, default_dir, here
from bitsmith.eval.text import load_text, tokenize

CTX, TOKENS = 48, 8192


def main() -> None:
    source, text = Path(sys.argv[1]), sys.argv[2]
    ids = tokenize(bitsmith.load_tokenizer(source), load_text(text))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        bitsmith.quantize(source, out, format="gptq", method="rtn", bits=4, group_size=128, progress=False)
        exact = bitsmith.load_model(out, exact=True)
        for act in ("int8", "bf16"):
            os.environ["BITSMITH_ACT"] = act
            started = time.monotonic()
            served = bitsmith.load_model(out, dtype="bfloat16")
            found = kl_divergence(served, exact, ids, ctx=CTX, max_tokens=TOKENS, protocol="windows")
            row = Result(
                **here(), model=source.name, spec="affine4.g128.sym", kv="none", metric="kld_mean", method="rtn",
                task=f"activations/{act}/{Path(text).stem}/windows/{CTX}", value=found["kld_mean"],
                stderr=found["kld_stderr"], n=int(found["tokens"]), seconds=time.monotonic() - started,
            )  # fmt: skip
            append(default_dir() / "activations.jsonl", [row])
            print(f"{act}: {row.value:.3e} +- {row.stderr:.1e}")


if __name__ == "__main__":
    main()
