"""Quantize one model every usual way and record what each form costs: the rows behind the README's quality table.

    python examples/quality_table.py MODEL --calib CALIB.txt --data HELDOUT.txt [--max-tokens N] [--results DIR]

RTN, GPTQ, AWQ and HQQ at 8, 4, 3 and 2 bits in groups of 32, 64 and 128, each asymmetric so that only the method
differs; KLD, perplexity and top-1 agreement at context 512 by the exact path, and the seconds the quantization took.
Forms whose rows are already there are skipped, so a stopped run goes on. Groups must divide the model's widths.
Then: bitsmith eval report --readme README.md
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bitsmith import load_model, load_tokenizer, quantize
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.results import FILE_NAME, append, default_dir, read
from bitsmith.eval.subject import subject
from bitsmith.eval.text import bos_of, load_text, tokenize
from torch import Tensor

METHODS = {"rtn": "gptq", "gptq": "gptq", "awq": "gptq", "hqq": "hqq"}
BITS, GROUPS, CONTEXT = (8, 4, 3, 2), (32, 64, 128), 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--results", type=Path, default=default_dir())
    args = parser.parse_args()
    file = args.results / FILE_NAME
    tokenizer, base = load_tokenizer(args.model), Remembered(load_model(args.model, exact=True))
    ids, bos = tokenize(tokenizer, load_text(args.data)), bos_of(tokenizer)
    limit = f"/{args.max_tokens}tok" if args.max_tokens else ""
    task = f"kld/{Path(args.data).stem}/llamacpp/{CONTEXT}{limit}"
    done = {(r.method, r.spec) for r in read(file) if r.task == task} if file.exists() else set()
    with tempfile.TemporaryDirectory() as scratch:
        for method, bits, group in [(m, b, g) for m in METHODS for b in BITS for g in GROUPS]:
            if any(m == method and f"affine{bits}.g{group}." in f"{s}." for m, s in done):
                continue
            out = Path(scratch) / "form"
            options: dict[str, Any] = {"format": METHODS[method], "method": method, "bits": bits, "group_size": group}
            if options["format"] == "gptq":
                options |= {"sym": False, "calib": args.calib if method != "rtn" else None}
            summary = quantize(args.model, out, **options, overwrite=True, progress=False)
            record(file, out, args.model, task, base, ids, bos, args.max_tokens, summary["seconds"])
            shutil.rmtree(out)
        record(file, Path(args.model), args.model, task, base, ids, bos, args.max_tokens, None)


class Remembered:
    """The unquantized model, run once: every form is compared with the same logits of the same windows."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device, self.seen = model, model.config, model.device, {}

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.seen:
            self.seen[key] = self.model(input_ids, **kwargs)
        return self.seen[key]


def record(
    file: Path,
    path: Path,
    source: str,
    task: str,
    base: Any,
    ids: Tensor,
    bos: int | None,
    limit: int | None,
    took: float | None,
) -> None:
    """Measure the checkpoint at `path` against `base` and append its rows."""
    start, who = time.perf_counter(), subject(str(path), source)
    found = kl_divergence(load_model(path, exact=True), base, ids, CONTEXT, max_tokens=limit, batch=8, bos=bos)
    rows = who.kld_rows(task, found, time.perf_counter() - start)
    if took is not None:
        rows += who.rows("quantize", {"seconds": took}, {"seconds": None}, 1, took)
    append(file, rows)
    print(
        f"{who.method or '-':6} {who.spec:24} {who.bpw:6.3f} bits  KLD {found['kld_mean']:.5f}  PPL {found['ppl']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
