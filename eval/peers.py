"""The engines that `bench decode` compares us with, behind the four calls that the measurements are made of.

  transformers   the same shape in bf16, as most people run a model on a CPU
  llama.cpp      the same shape as a Q4_0 file, through llama-cpp-python; run in two configurations, because its default (repack
                 weights at load) wins decode and `--no-repack` wins some prefills: a peer that is configured badly flatters us

Weights are random (see shapes.py). The llama.cpp file has the mixture that llama-quantize gives an unrepeated Llama: Q4_0
everywhere and Q6_K for the output head; its blocks are random codes under one fixed scale, so no quantizer is needed.
Tokens are random ids and nothing is sampled, as in llama-bench.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import UserError
from .shapes import Shape

_LLAMA_FIX = "install it with `pip install llama-cpp-python gguf`, or leave llama.cpp out of --against"
# (ggml type name, weights a block, bytes a block). Q4_0: f16 scale, 16 bytes of codes. Q6_K: 192 bytes of codes, 16 int8
# sub-scales, f16 scale.
_Q4_0, _Q6_K = ("Q4_0", 32, 18), ("Q6_K", 256, 210)
_BATCH = 512


class Engine(Protocol):
    """One model in one engine. Sequences share nothing; each call blocks until its logits are there."""

    name: str

    def prefill(self, tokens: int) -> None:
        """Read one prompt of `tokens` into an empty cache; only the last token's logits."""
        ...

    def start(self, sequences: int, prompt: int) -> None:
        """Empty the cache and read a prompt of `prompt` tokens into each of `sequences`."""
        ...

    def step(self) -> None:
        """One more token for every sequence, logits for each."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class TransformersEngine:
    """A bf16 model of transformers with its own cache."""

    name = "transformers"

    def __init__(self, shape: Shape) -> None:
        from transformers import AutoModelForCausalLM

        self._vocab = shape.vocab_size
        self._model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).eval()
        self._cache: Any = None
        self._sequences = 1

    def _forward(self, sequences: int, tokens: int) -> None:
        ids = torch.randint(self._vocab, (sequences, tokens))
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values

    def prefill(self, tokens: int) -> None:
        self.start(1, tokens)

    def start(self, sequences: int, prompt: int) -> None:
        self._cache, self._sequences = None, sequences
        self._forward(sequences, prompt)

    def step(self) -> None:
        self._forward(self._sequences, 1)

    def close(self) -> None:
        self._model = self._cache = None


class LlamaCppEngine:
    """A GGUF file in llama.cpp, through the C API that llama-cpp-python exposes."""

    def __init__(self, path: Path, threads: int, sequences: int, context: int, repack: bool) -> None:
        self._llama = _llama_cpp()
        self.name = "llama.cpp" if repack else "llama.cpp --no-repack"
        model_params = self._llama.llama_model_default_params()
        model_params.use_extra_bufts = repack
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise UserError(f"llama.cpp could not load {path}, which was just written: install another llama-cpp-python")
        params = self._llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = context, sequences, True
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = self._llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"llama.cpp could not make a context of {context} tokens: free some memory")
        self._vocab = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self._batch = self._llama.llama_batch_init(_BATCH, 0, 1)
        self._random = np.random.default_rng(0)
        self._position = self._sequences = 0

    def _decode(self, entries: list[tuple[int, int, bool]]) -> None:
        """entries: (position, sequence, wants logits), at most _BATCH of them."""
        batch = self._batch
        for index, (position, sequence, logits) in enumerate(entries):
            batch.token[index] = int(self._random.integers(self._vocab))
            batch.pos[index], batch.logits[index] = position, logits
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.n_tokens = len(entries)
        code = self._llama.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._llama.llama_synchronize(self._context)

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def prefill(self, tokens: int) -> None:
        self._clear()
        entries = [(position, 0, position == tokens - 1) for position in range(tokens)]
        for start in range(0, tokens, _BATCH):
            self._decode(entries[start : start + _BATCH])

    def start(self, sequences: int, prompt: int) -> None:
        self._clear()
        entries = [(position, sequence, False) for sequence in range(sequences) for position in range(prompt)]
        for start in range(0, len(entries), _BATCH):
            self._decode(entries[start : start + _BATCH])
        self._position, self._sequences = prompt, sequences

    def step(self) -> None:
        self._decode([(self._position, sequence, True) for sequence in range(self._sequences)])
        self._position += 1

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def _llama_cpp() -> Any:
    """llama-cpp-python with its log silenced. UserError where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(f"llama.cpp is measured through llama-cpp-python, not installed: {_LLAMA_FIX}") from None
    llama_cpp.llama_log_set(_SILENT.setdefault("log", llama_cpp.llama_log_callback(lambda *_: None)), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


# llama.cpp keeps the callback's address: it must live as long as the process.
_SILENT: dict[str, Any] = {}


def write_gguf(shape: Shape, path: Path) -> None:
    """Write a random Q4_0 Llama of `shape` that llama.cpp loads. UserError where gguf is not installed or a size has no blocks.

    One layer's blocks are drawn once and written for every layer.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"the file for llama.cpp is written with gguf, not installed: {_LLAMA_FIX}") from None
    if shape.hidden_size % _Q6_K[1] or shape.intermediate_size % _Q4_0[1]:
        raise UserError(
            f"llama.cpp's Q4_0 mixture needs hidden_size to divide by 256 and intermediate_size by 32, found "
            f"{shape.hidden_size} and {shape.intermediate_size}: leave llama.cpp out of --against, or take shape 1.1b"
        )
    head = shape.hidden_size // shape.num_attention_heads
    hidden, kv, ff = shape.hidden_size, shape.num_key_value_heads * head, shape.intermediate_size
    rng = np.random.default_rng(0)
    layer = {
        name: _blocks(rng, rows, columns, _Q4_0)
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", ff, hidden),
            ("ffn_up", ff, hidden),
            ("ffn_down", hidden, ff),
        )
    }
    types = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q6_K")}
    norm = np.ones(hidden, np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    _header(writer, shape)
    writer.add_tensor("token_embd.weight", _blocks(rng, shape.vocab_size, hidden, _Q4_0), raw_dtype=types["Q4_0"])
    for index in range(shape.num_hidden_layers):
        for name, blocks in layer.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", blocks, raw_dtype=types["Q4_0"])
        writer.add_tensor(f"blk.{index}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("output.weight", _blocks(rng, shape.vocab_size, hidden, _Q6_K), raw_dtype=types["Q6_K"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(rng: np.random.Generator, rows: int, columns: int, kind: tuple[str, int, int]) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes], whose weights have a standard deviation near 0.02."""
    name, weights, size = kind
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    # Uniform codes of b bits have a standard deviation of 2**b / sqrt(12).
    if name == "Q4_0":
        blocks[:, :2] = np.array([0.02 / 4.6], np.float16).view(np.uint8)
    else:
        blocks[:, 192:208] = 1
        blocks[:, 208:] = np.array([0.02 / 18.5], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _header(writer: Any, shape: Shape) -> None:
    """Hyperparameters and a dummy SentencePiece vocabulary: unk, bos, eos, the bytes, then words."""
    words = shape.vocab_size - 259
    writer.add_quantization_version(2)
    writer.add_file_type(2)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁w{i}" for i in range(words))])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(words)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
