"""Our quantizers beside those of gptqmodel and hqq: same model, calibration tokens, bits, group and grid.

    BITSMITH_INTEROP_PYTHON=.venv-interop/bin/python python tests/interop/compare.py MODEL --calib TEXT --data TEXT
        [--max-tokens N] [--only WORD] [--results DIR]

Each pair is quantized by both, on as many threads, one after the other, then read by our loader (which decodes their
files exactly; tests/test_load.py) and measured by the same code: KLD against the unquantized model at context 512.
Seconds are wall time of a whole quantization, from files to files, imports not counted. Rows are appended to
results/peers.jsonl, the peer's under the method "LIBRARY VERSION, SETTINGS".
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bitsmith import load_model, load_tokenizer, quantize
from bitsmith.calibrate.data import read_text, token_blocks
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.results import append, default_dir
from bitsmith.eval.subject import subject
from bitsmith.eval.text import bos_of, load_text, tokenize
from safetensors.torch import save_file
from torch import Tensor

SAMPLES, SEQLEN, SEED, CONTEXT = 128, 512, 0, 512


@dataclass(frozen=True)
class Pair:
    # Arguments of our `quantize`.
    ours: dict[str, Any]
    # Library, and the arguments of its config.
    peer: str
    config: dict[str, Any]
    # What of `config` is no default of the library and no part of the grid.
    note: str = ""


def gptq(bits: int, note: str = "", *, ours: dict[str, Any] | None = None, **config: Any) -> Pair:
    config = {"bits": bits, "group_size": 128, "sym": True, **config}
    options = {"format": "gptq", "bits": bits, "group_size": 128, "sym": config["sym"], **(ours or {})}
    return Pair(options, "gptqmodel", config, note)


def hqq(bits: int, group: int) -> Pair:
    options = {"format": "hqq", "bits": bits, "group_size": group}
    return Pair(options, "hqq", {"nbits": bits, "group_size": group, "axis": 1})


# gptqmodel's default reorders columns within groups while solving (act_group_aware) and takes the extremes of a group.
ORDER = {"desc_act": True, "act_group_aware": False}
PAIRS = [
    *(
        pair
        for bits in (4, 3)
        for pair in (
            gptq(bits),
            gptq(bits, "mse 2.4", mse=2.4),
            gptq(bits, ours={"desc_act": True}, **ORDER),
            gptq(bits, sym=False),
        )
    ),
    Pair({"format": "awq", "group_size": 128}, "gptqmodel", {
        "bits": 4, "group_size": 128, "sym": False, "method": "awq", "format": "gemm"}),
    hqq(4, 64), hqq(3, 64), hqq(2, 16),
]  # fmt: skip


@dataclass(frozen=True)
class Session:
    """What every measurement of a run shares."""

    model: Path
    calib: Path
    scratch: Path
    # Rows go here, under this task.
    results: Path
    task: str
    limit: int | None
    # The unquantized model and the text it is compared on: int64 [T], and the id before each window.
    base: Any
    text: Tensor
    bos: int | None
    # File with the calibration blocks that our driver draws, for the peers.
    blocks: Path


@dataclass(frozen=True)
class Measured:
    method: str
    spec: str
    kld: float
    stderr: float
    seconds: float


def open_session(args: argparse.Namespace, scratch: Path) -> Session:
    tokenizer, blocks = load_tokenizer(args.model), scratch / "blocks"
    calib = str(args.calib.resolve())
    save_file({"ids": token_blocks(read_text(calib, tokenizer), tokenizer, SAMPLES, SEQLEN, SEED, calib)}, blocks)
    limit = f"/{args.max_tokens}tok" if args.max_tokens else ""
    return Session(
        model=args.model.resolve(),
        calib=args.calib.resolve(),
        scratch=scratch,
        results=args.results / "peers.jsonl",
        task=f"kld/{args.data.stem}/llamacpp/{CONTEXT}{limit}",
        limit=args.max_tokens,
        base=load_model(args.model, exact=True),
        text=tokenize(tokenizer, load_text(str(args.data))),
        bos=bos_of(tokenizer),
        blocks=blocks,
    )


def our_result(session: Session, pair: Pair) -> Measured:
    out = session.scratch / "ours"
    blocks = {"calib": str(session.calib), "calib_samples": SAMPLES, "calib_seqlen": SEQLEN, "seed": SEED}
    made = quantize(session.model, out, **pair.ours, **blocks, progress=False, overwrite=True)
    return measure(session, out, made["seconds"], "")


def peer_result(session: Session, pair: Pair) -> Measured:
    out, jobs = session.scratch / "theirs", session.scratch / "jobs.json"
    shutil.rmtree(out, ignore_errors=True)
    job = {"do": f"quantize_{pair.peer}", "path": str(session.model), "ids": str(session.blocks), "out": str(out)}
    jobs.write_text(json.dumps([{**job, "config": pair.config}]))
    command = [os.environ["BITSMITH_INTEROP_PYTHON"], str(Path(__file__).with_name("peers.py")), str(jobs)]
    # gptqmodel does not start on two cores without being told that two workers are enough.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=session.scratch, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    facts = json.loads(Path(f"{out}.json").read_text())
    if facts["threads"] != torch.get_num_threads():
        sys.exit(f"{pair.peer} ran on {facts['threads']} threads, we on {torch.get_num_threads()}: set OMP_NUM_THREADS")
    name = ", ".join(filter(None, [f"{pair.peer} {facts['versions'][pair.peer]}", pair.note]))
    return measure(session, out, facts["seconds"], name)


def measure(session: Session, path: Path, took: float, method: str) -> Measured:
    """KLD of the checkpoint at `path`; its rows are appended. An empty `method` is what the checkpoint says."""
    started, who = time.perf_counter(), subject(str(path), str(session.model))
    who = replace(who, method=method or who.method)
    model = load_model(path, exact=True)
    found = kl_divergence(
        model, session.base, session.text, CONTEXT, max_tokens=session.limit, batch=8, bos=session.bos
    )
    rows = who.kld_rows(session.task, found, time.perf_counter() - started)
    task = f"quantize/{torch.get_num_threads()}threads"
    append(session.results, [*rows, *who.rows(task, {"seconds": took}, {"seconds": None}, 1, took)])
    return Measured(who.method, who.spec, found["kld_mean"], found["kld_stderr"], took)


def compare(session: Session, pairs: Sequence[Pair]) -> None:
    print(
        "| grid | peer | KLD ours | KLD theirs | ratio | s ours | s theirs | ratio |\n|---|---|---|---|---|---|---|---|"
    )
    seen: dict[str, Measured] = {}
    for pair in pairs:
        key = str(pair.ours)
        if key not in seen:
            seen[key] = our_result(session, pair)
        a, b = seen[key], peer_result(session, pair)
        print(
            f"| {a.spec} | {b.method} | {a.kld:.5f} ± {a.stderr:.5f} | {b.kld:.5f} ± {b.stderr:.5f} | {a.kld / b.kld:.2f} "
            f"| {a.seconds:.0f} | {b.seconds:.0f} | {a.seconds / b.seconds:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--only", default="", help="compare only pairs whose description holds this word")
    parser.add_argument("--results", type=Path, default=default_dir())
    args = parser.parse_args()
    if "BITSMITH_INTEROP_PYTHON" not in os.environ:
        sys.exit("BITSMITH_INTEROP_PYTHON is not set: `make test-interop` builds that environment as .venv-interop")
    with tempfile.TemporaryDirectory() as scratch:
        compare(open_session(args, Path(scratch)), [pair for pair in PAIRS if args.only in str(pair)])


if __name__ == "__main__":
    main()
