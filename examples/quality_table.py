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
from bitsmith.eval.subject import Subject, subject
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
    table = Table(args.model, args.data, args.max_tokens, args.results / FILE_NAME)
    with tempfile.TemporaryDirectory() as scratch:
        for method, bits, group in [(m, b, g) for m in METHODS for b in BITS for g in GROUPS]:
            if any(m == method and f"affine{bits}.g{group}." in f"{s}." for m, s in table.done):
                continue
            out = Path(scratch) / "form"
            options: dict[str, Any] = {"format": METHODS[method], "method": method, "bits": bits, "group_size": group}
            if options["format"] == "gptq":
                options |= {"sym": False, "calib": args.calib if method != "rtn" else None}
            summary = quantize(args.model, out, **options, overwrite=True, progress=False)
            table.record(out, subject(str(out), args.model), summary["seconds"])
            shutil.rmtree(out)
        table.record(Path(args.model), subject(args.model), None)


class Remembered:
    """The unquantized model, run once: every form is compared with the same logits of the same windows."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device, self.seen = model, model.config, model.device, {}

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.seen:
            self.seen[key] = self.model(input_ids, **kwargs)
        return self.seen[key]


class Table:
    """One evaluation of forms of one model, and the file its rows go to."""

    def __init__(self, model: str, data: str, max_tokens: int | None, file: Path) -> None:
        tokenizer, self.base = load_tokenizer(model), Remembered(load_model(model, exact=True))
        self.ids, self.bos, self.max_tokens = tokenize(tokenizer, load_text(data)), bos_of(tokenizer), max_tokens
        self.task = f"kld/{Path(data).stem}/llamacpp/{CONTEXT}" + (f"/{max_tokens}tok" if max_tokens else "")
        self.file, name = file, Path(model).resolve().name
        rows = read(file) if file.exists() else []
        # (method, spec) of the model's forms that have rows.
        self.done = {(r.method, r.spec) for r in rows if (r.task, r.model) == (self.task, name)}

    def record(self, path: Path, who: Subject, took: float | None) -> None:
        """Measure the checkpoint at `path`, made in `took` seconds, and append its rows under the name `who`."""
        start, model = time.perf_counter(), load_model(path, exact=True)
        found = kl_divergence(model, self.base, self.ids, CONTEXT, max_tokens=self.max_tokens, batch=8, bos=self.bos)
        rows = who.kld_rows(self.task, found, time.perf_counter() - start)
        if took is not None:
            rows += who.rows("quantize", {"seconds": took}, {"seconds": None}, 1, took)
        append(self.file, rows)
        print(
            f"{who.method or '-':14} {who.spec:24} {who.bpw:6.3f} bits  KLD {found['kld_mean']:.5f} "
            f"± {found['kld_stderr']:.5f}  PPL {found['ppl']:.3f}  {took or 0:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
