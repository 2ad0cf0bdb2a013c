"""Every GGUF file type of one model, ours beside llama.cpp's own: the rows behind the README's table of GGUF files.

    bitsmith imatrix MODEL -o im.gguf --calib CALIB.txt
    python examples/gguf_quality.py MODEL --imatrix im.gguf --calib CALIB.txt --data HELDOUT.txt [--types q4_k_m ...]

Both quantize the same numbers with the same importance matrix on the same threads, llama.cpp (llama-cpp-python must be
installed) from an F16 file that is written first; both files are then read and measured by bitsmith, KLD from the
unquantized model at context 512. Rows, by method: `gguf` is ours by rounding, `gptq` ours by GPTQ, `size` ours of at
most the bytes of that file type with types chosen by measured loss, `llama-quantize` llama.cpp's. Forms whose rows are
already there are skipped. `--speed` times ours and llama.cpp's and evaluates nothing.
Then: bitsmith eval report --readme README.md
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsmith import quantize
from bitsmith.calibrate.gguf_goal import GGUFOptions
from bitsmith.calibrate.gguf_size import Target
from bitsmith.calibrate.imatrix import read as read_imatrix
from bitsmith.errors import UserError
from bitsmith.eval.results import FILE_NAME, append, default_dir
from bitsmith.eval.subject import Subject, subject
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_export import export, header
from bitsmith.models.gguf_file import read_gguf
from bitsmith.models.gguf_plan import plan
from bitsmith.models.load import load_tokenizer
from bitsmith.quant_formats.gguf_rules import MIXTURES
from quality_table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import llama_quantize

TYPES = [name for name, mix in MIXTURES.items() if mix.base not in ("F32", "F16", "BF16") and name != "mxfp4_moe"]
# File types that llama.cpp has only type by type: the blocks' ggml type; the rest is Q8_0 in ours too.
TYPE_BY_TYPE = {"mxfp4": 39, "nvfp4": 40}
GPTQ = ("q2_k", "q3_k_m", "q4_k_m")
SIZES = ("q2_k", "q3_k_m", "q4_k_m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--imatrix", help="without one, types that need it are left out")
    parser.add_argument("--calib", help="text for GPTQ; without it there is none")
    parser.add_argument("--data", help="text to measure on")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES, metavar="TYPE")
    parser.add_argument("--methods", nargs="+", default=["gguf", "llama-quantize", "gptq", "size"], metavar="METHOD")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--results", type=Path, default=default_dir())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        makers = Makers(args.model, args.imatrix, args.calib, Path(scratch))
        if args.speed:
            timed(makers, args.types, args.results / FILE_NAME)
        else:
            table = Table(args.model, args.data, args.max_tokens, args.results / FILE_NAME)
            for kind in args.types:
                compare(makers, kind, args.methods, table)


def compare(makers: "Makers", kind: str, methods: list[str], table: Table) -> None:
    for method in methods:
        if (method, f"gguf:{kind}") in table.done or (method in ("gptq", "size") and kind not in (*GPTQ, *SIZES)):
            continue
        try:
            out, took = makers.make(kind, method)
        except UserError as error:
            print(f"{method:14} gguf:{kind:19} {error}", flush=True)
            continue
        table.record(out, named(out, makers.model, kind, method), took)


def timed(makers: "Makers", kinds: list[str], file: Path) -> None:
    """Three runs of each in turn, the fastest counts."""
    for kind in kinds:
        runs = [(m, *makers.make(kind, m)) for _ in range(3) for m in ("gguf", "llama-quantize")]
        for method in ("gguf", "llama-quantize"):
            took = [seconds for name, _, seconds in runs if name == method]
            out = next(path for name, path, _ in runs if name == method)
            who = named(out, makers.model, kind, method)
            task = f"gguf-speed/{torch.get_num_threads()} threads"
            append(file, who.rows(task, {"seconds": min(took)}, {"seconds": None}, len(took), sum(took)))
            print(f"{method:14} gguf:{kind:19} {', '.join(f'{t:.2f}' for t in took)} s", flush=True)


def named(out: Path, model: str, kind: str, method: str) -> Subject:
    return replace(subject(str(out), model), spec=f"gguf:{kind}", method=method)


class Makers:
    """What writes the files of one model, by method."""

    def __init__(self, model: str, imatrix: str | None, calib: str | None, scratch: Path) -> None:
        self.model, self.imatrix, self.calib, self.scratch = model, imatrix, calib, scratch
        self.full, self.matrix = scratch / "f16.gguf", scratch / "imatrix.npz"
        ckpt = open_checkpoint(model)
        types = {each.name: "F16" if len(each.shape) > 1 else "F32" for each in plan(ckpt)[1]}
        export(header(ckpt, load_tokenizer(model), types, MIXTURES["f16"].ftype), ckpt, self.full, no_blocks)
        if imatrix:
            entries = read_imatrix(Path(imatrix)).entries
            means = {name: (e.sums / e.counts[:, None]).numpy() for name, e in entries.items()}
            np.savez(self.matrix, **means)

    def make(self, kind: str, method: str) -> tuple[Path, float]:
        """(file, seconds); UserError where nobody can make it."""
        if method == "llama-quantize":
            return self._theirs(kind)
        out, options = self.scratch / f"{method}-{kind}.gguf", GGUFOptions(self.imatrix)
        asked: dict[str, Any] = {"format": f"gguf:{kind}", "gguf": options}
        if method == "gptq":
            asked |= {"method": "gptq", "calib": self.calib}
        if method == "size":
            size = sum(info.nbytes for info in read_gguf(self.make(kind, "gguf")[0]).tensors.values())
            asked |= {"format": "gguf", "gguf": replace(options, target=Target(size=str(size))), "calib": self.calib}
        summary = quantize(self.model, out, **asked, overwrite=True, resume=False, progress=False)
        return out, summary["seconds"]

    def _theirs(self, kind: str) -> tuple[Path, float]:
        out, number = self.scratch / f"llama-quantize-{kind}.gguf", MIXTURES[kind].ftype
        job: dict[str, Any] = {"src": str(self.full), "dst": str(out), "threads": torch.get_num_threads()}
        if kind in TYPE_BY_TYPE:
            number, job["tensors"] = MIXTURES["q8_0"].ftype, [[r"^blk\.", TYPE_BY_TYPE[kind]]]
        if self.imatrix:
            job["imatrix"] = str(self.matrix)
        start = time.perf_counter()
        if llama_quantize.quantize({**job, "ftype": number}, LOG) is None:
            raise UserError(f"llama.cpp refuses {kind}: {''.join(LOG)[-300:]}")
        return out, time.perf_counter() - start


def no_blocks(*_: Any) -> Any:
    raise AssertionError("a file of F16 has no blocks")


LOG: list[str] = []

if __name__ == "__main__":
    heard = llama_quantize.L.llama_log_callback(lambda level, text, data: LOG.append(text.decode(errors="replace")))
    llama_quantize.L.llama_log_set(heard, None)
    main()
