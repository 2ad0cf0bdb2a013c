"""Our quantizers beside the libraries that invented them: the same model, calibration tokens and bits, one after the
other in one run.

    python tests/interop/compare.py MODEL CALIB.txt EVAL.txt --peer PEER_PYTHON [--results DIR]

Each form is made by both in turn (peers.py runs under the peer's python; process start and loading count for neither),
then the KL divergence of both from the unquantized model is taken on the same text. Appends a row a figure to
DIR/peers.jsonl: `seconds` and `kld_mean`, method "gptq" for ours and "gptq@gptqmodel" for theirs.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bitsmith.calibrate.data import read_text, token_blocks
from bitsmith.calibrate.driver import quantize
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.results import Result, append, default_dir, here
from bitsmith.eval.text import load_text, tokenize
from bitsmith.models.load import load_model, load_tokenizer
from safetensors.torch import save_file

SAMPLES, SEQLEN, SEED = 128, 512, 0
GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": True}
# name, spec, our arguments, the peer's job and configuration
FORMS: tuple[tuple[str, str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("gptq", "affine4.g128.sym", {"bits": 4, "group_size": 128}, "gptqmodel", {**GPTQ, "bits": 4, "group_size": 128}),
    ("gptq", "affine3.g128.sym", {"bits": 3, "group_size": 128}, "gptqmodel", {**GPTQ, "bits": 3, "group_size": 128}),
    (
        "awq", "affine4.g128.asym", {"bits": 4, "group_size": 128}, "gptqmodel",
        {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": 128, "sym": False},
    ),
    (
        "hqq", "affine4.g64.zf16", {"bits": 4, "group_size": 64}, "hqq",
        {"nbits": 4, "group_size": 64, "axis": 1},
    ),
    (
        "hqq", "affine2.g16.zf16", {"bits": 2, "group_size": 16}, "hqq",
        {"nbits": 2, "group_size": 16, "axis": 1},
    ),
)  # fmt: skip


def theirs(peer: str, job: dict[str, Any], folder: Path) -> float:
    """Seconds the peer's quantizer took, loading the model included, as ours does."""
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([job]))
    script = Path(__file__).resolve().with_name("peers.py")
    # gptqmodel leaves its logs where it is started.
    subprocess.run([peer, str(script), str(jobs)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    found: float = json.loads(Path(job["out"] + ".json").read_text())["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib")
    parser.add_argument("text")
    parser.add_argument("--peer", default=os.environ.get("BITSMITH_INTEROP_PYTHON"), required=False)
    parser.add_argument("--results", type=Path, default=default_dir())
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    text = read_text(args.calib, tokenizer)
    rows = token_blocks(text, tokenizer, SAMPLES, SEQLEN, SEED, args.calib)
    base = load_model(args.model)
    ids = tokenize(tokenizer, load_text(args.text))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file({"ids": rows.contiguous()}, folder / "ids.safetensors")
        for number, (name, spec, options, library, config) in enumerate(FORMS):
            ours_at, theirs_at = folder / f"ours{number}", folder / f"theirs{number}"
            started = time.monotonic()
            quantize(args.model, ours_at, format=name, method=name, calib=args.calib, calib_samples=SAMPLES,
                     calib_seqlen=SEQLEN, seed=SEED, progress=False, **options)  # fmt: skip
            seconds = {name: time.monotonic() - started}
            job = {
                "do": f"quantize_{library}",
                "path": str(args.model.resolve()),
                "out": str(theirs_at),
                "config": config,
            }
            seconds[f"{name}@{library}"] = theirs(args.peer, {**job, "ids": str(folder / "ids.safetensors")}, folder)
            for method, path in zip(seconds, (ours_at, theirs_at), strict=True):
                found = kl_divergence(load_model(path), base, ids, ctx=256, max_tokens=16384)
                common: dict[str, Any] = {
                    **here(), "model": args.model.name, "spec": spec, "kv": "none", "seconds": seconds[method], "method": method,
                }  # fmt: skip
                task = f"peers/{Path(args.text).stem}/{torch.get_num_threads()} threads"
                kld = Result(task=task, metric="kld_mean", value=found["kld_mean"], stderr=found["kld_stderr"],
                             n=int(found["tokens"]), **common)  # fmt: skip
                took = Result(task=task, metric="seconds", value=seconds[method], stderr=None, n=1, **common)
                append(args.results / "peers.jsonl", [kld, took])
                print(f"{method:16} {spec:18} {seconds[method]:7.1f} s   KLD {found['kld_mean']:.5f}", flush=True)


if __name__ == "__main__":
    main()
