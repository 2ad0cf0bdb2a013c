"""Small random models as GGUF files: the shapes of real architectures with two rows a weight, for what looks at names,
shapes and metadata alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Tensors of a layer: name -> (columns, experts); "d" and "f" stand for the width of the model and of its MLP.
_ATTENTION = {"attn_q": "d", "attn_k": "d", "attn_v": "d", "attn_output": "d"}
_MLP = {"ffn_gate": "d", "ffn_up": "d", "ffn_down": "f"}
_EXPERTS = {"ffn_gate_exps": "d", "ffn_up_exps": "d", "ffn_down_exps": "f", "ffn_gate_inp": "d"}
_SHARED = {"ffn_gate_shexp": "d", "ffn_up_shexp": "d", "ffn_down_shexp": "f", "ffn_gate_inp_shexp": "d"}
_FUSED = {"attn_qkv": "d", "attn_output": "d", "ffn_up": "d", "ffn_down": "f"}

# name -> architecture, layers, heads, key/value heads, experts, tied head, width, MLP width, weights of a layer.
CASES: dict[str, dict[str, Any]] = {
    "llama-gqa1": {"arch": "llama", "layers": 16, "kv": 8, "weights": _ATTENTION | _MLP},
    "llama-gqa4": {"arch": "llama", "layers": 11, "kv": 2, "weights": _ATTENTION | _MLP},
    "llama-70b": {"arch": "llama", "layers": 80, "kv": 1, "weights": _ATTENTION | _MLP},
    "llama-odd": {"arch": "llama", "layers": 9, "kv": 8, "d": 96, "f": 80, "weights": _ATTENTION | _MLP},
    "mixtral": {"arch": "llama", "layers": 16, "kv": 2, "experts": 8, "weights": _ATTENTION | _EXPERTS},
    "qwen2": {"arch": "qwen2", "layers": 24, "kv": 4, "f": 160, "weights": _ATTENTION | _MLP},
    "qwen2moe": {"arch": "qwen2moe", "layers": 10, "kv": 8, "experts": 4, "weights": _ATTENTION | _EXPERTS | _SHARED},
    "phi3": {"arch": "phi3", "layers": 17, "kv": 8, "weights": _FUSED},
    "gemma2": {"arch": "gemma2", "layers": 18, "kv": 4, "tied": True, "weights": _ATTENTION | _MLP},
    "falcon": {"arch": "falcon", "layers": 16, "kv": 1, "weights": _FUSED},
}  # fmt: skip
HEADS = 8


def tensors(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(gguf name, shape [out, in] or [experts, out, in]) of every tensor, norms included, in the order of real files."""
    case = CASES[name]
    columns = {"d": case.get("d", 256), "f": case.get("f", 512)}
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (4, columns["d"]))]
    for layer in range(case["layers"]):
        found.append((f"blk.{layer}.attn_norm.weight", (columns["d"],)))
        for weight, width in case["weights"].items():
            stack = (case["experts"],) if weight.endswith("_exps") else ()
            rows = 1 if weight == "ffn_gate_inp_shexp" else 2
            found.append((f"blk.{layer}.{weight}.weight", (*stack, rows, columns[width])))
    head = [] if case.get("tied") else [("output.weight", (4, columns["d"]))]
    return [*found, ("output_norm.weight", (columns["d"],)), *head]


def write(name: str, path: Path) -> None:
    """The model as an F32 file, with as much metadata as llama_model_quantize reads."""
    case = CASES[name]
    writer = gguf.GGUFWriter(path, case["arch"])
    writer.add_block_count(case["layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(case.get("d", 256))
    writer.add_feed_forward_length(case.get("f", 512))
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(case["kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(4)
    if "experts" in case:
        writer.add_expert_count(case["experts"])
        writer.add_expert_used_count(2)
    random = np.random.default_rng(0)
    for tensor, shape in tensors(name):
        writer.add_tensor(tensor, random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(name: str, path: Path) -> None:
    """Ones for every weight but the embeddings', as an .npz for llama_quantize.py."""
    weights = {n: s for n, s in tensors(name) if len(s) > 1 and n != "token_embd.weight"}
    np.savez(path, **{n: np.ones((*s[:-2], s[-1]), np.float32) for n, s in weights.items()})


def llama_quantize(jobs: list[dict[str, Any]]) -> list[dict[str, str] | None]:
    """What llama.cpp makes of the jobs, in a child process; tests/llama_quantize.py describes them."""
    script = str(Path(__file__).with_name("llama_quantize.py"))
    done = subprocess.run([sys.executable, script], input=json.dumps(jobs), capture_output=True, text=True, check=True)
    found: list[dict[str, str] | None] = json.loads(done.stdout.splitlines()[-1])
    return found
