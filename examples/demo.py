"""`make demo`: a trained model quantized into several formats, what each cost, and a chat answered by one of them.

Runs on the model in examples/storyworld/model, needs no network, takes a minute or two on two cores.
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from bitsmith import load_model, load_tokenizer, quantize
from bitsmith.eval.kld import kl_divergence
from bitsmith.eval.storyworld import evaluate
from bitsmith.models.inspect import inspect_checkpoint

WORLD = Path(__file__).parent / "storyworld"
MODEL, CALIB, HELDOUT = WORLD / "model", WORLD / "calib.txt", WORLD / "heldout.txt"
OUT = Path("demo-out")
PLANS = [
    ("fp8-block", {"format": "fp8-block"}),
    ("nf4", {"format": "nf4"}),
    ("rtn-4bit", {"format": "rtn", "bits": 4}),
    ("gptq-4bit", {"format": "gptq", "bits": 4, "calib": str(CALIB)}),
    ("awq-4bit", {"format": "awq", "bits": 4, "calib": str(CALIB)}),
    ("hqq-4bit", {"format": "hqq", "bits": 4, "group_size": 64}),
    ("rtn-3bit", {"format": "rtn", "bits": 3}),
    ("gptq-3bit", {"format": "gptq", "bits": 3, "calib": str(CALIB)}),
]
# Enough for a table that shows the differences; `bitsmith eval` measures properly.
STORIES, TOKENS, CONTEXT = 60, 8192, 256


def main() -> None:
    tokenizer = load_tokenizer(MODEL)
    ids = torch.tensor(tokenizer(HELDOUT.read_text(), add_special_tokens=False)["input_ids"])
    base = load_model(MODEL)
    rows = [row("fp16", MODEL, base, base, tokenizer, ids, 0.0)]
    for name, options in PLANS:
        print(f"\n$ bitsmith quantize {MODEL} {OUT / name} " + flags(options), flush=True)
        summary = quantize(MODEL, OUT / name, calib_samples=48, calib_seqlen=256, overwrite=True, **options)
        quantized = load_model(OUT / name, exact=True)
        rows.append(row(name, OUT / name, quantized, base, tokenizer, ids, summary["seconds"]))
    print(
        f"\n{'':12}{'bits/weight':>12}{'MB':>8}{'KLD':>10}{'same top-1':>12}"
        f"{'questions':>11}{'gap, nats':>11}{'seconds':>9}"
    )
    print("\n".join(rows))
    print(
        "KLD: divergence from fp16 per token. questions: answered right. gap: loss above the world's true "
        "entropy, per token."
    )
    serve_and_chat(OUT / "gptq-4bit")


def flags(options: dict[str, object]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def row(
    name: str, path: Path, model: object, base: object, tokenizer: object, ids: torch.Tensor, seconds: float
) -> str:
    bits = inspect_checkpoint(path)
    told = evaluate(model, tokenizer, WORLD / "heldout.jsonl", limit=STORIES)
    far = kl_divergence(model, base, ids, CONTEXT, max_tokens=TOKENS)
    return (
        f"{name:12}{bits['bpw']:12.2f}{bits['file_bytes'] / 1e6:8.2f}"
        f"{far['kld_mean']:10.5f}{far['top1_agreement']:12.1%}"
        f"{told['accuracy']:11.1%}{told['gap_nats_per_token']:11.4f}{seconds:9.1f}"
    )


def serve_and_chat(path: Path) -> None:
    """Start the server, ask over HTTP, print the answer as it streams."""
    print(f"\n$ bitsmith serve {path}", flush=True)
    command = [sys.executable, "-m", "bitsmith", "serve", str(path), "--port", "8765"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("http://127.0.0.1:8765/health", server)
        story = json.loads((WORLD / "heldout.jsonl").read_text().splitlines()[0])
        question = story["text"][: story["questions"][0]["start"]].strip()
        print(f"\nuser: {question}\nassistant: ", end="", flush=True)
        for piece in stream("http://127.0.0.1:8765/v1/chat/completions", question):
            print(piece, end="", flush=True)
        print(f"\n(the answer the world gives: {story['questions'][0]['answer']})")
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode} before it was ready")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not become ready within two minutes")


def stream(url: str, question: str):
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 16,
        "stop": ["\n"],
        "stream": True,
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                yield delta.get("content") or ""


if __name__ == "__main__":
    main()
