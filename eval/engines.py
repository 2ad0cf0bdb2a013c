"""The engines that `bench decode` compares, behind the calls that its measurements are made of.

  bitsmith       our serving engine, one step per call: scheduler, paged forward, greedy sampling and detokenizing
                 included
  transformers   the same shape in bf16, as most people run a model on a CPU; forward only
  llama.cpp      the same shape as a GGUF file, through llama-cpp-python; forward only. Measured in two configurations,
                 because its default (repack weights at load) wins decode and `--no-repack` wins some prefills: a peer
                 that is configured badly flatters us

Prompts are random token ids, as in llama-bench. Each engine is meant to live in a process of its own (speed.Worker).
"""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..samplers.params import SamplingParams
from ..serve.llm import LLM
from .random_models import LLAMA_FIX, Shape

_BATCH = 512


class BitsmithEngine:
    """Our engine on a checkpoint, in bf16: room for `sequences` sequences of `context` tokens in all; int8_copy: as
    load_model's."""

    def __init__(self, path: Path, sequences: int, context: int, int8_copy: bool) -> None:
        block = 16
        blocks = context // block + 3 * sequences
        llm = LLM(
            path, dtype="bfloat16", max_num_seqs=sequences, num_blocks=blocks, block_size=block, int8_copy=int8_copy
        )
        self._engine = llm.engine
        self._count = itertools.count()
        self._live: list[str] = []

    def prefill(self, tokens: int) -> None:
        self.start(1, tokens)

    def start(self, sequences: int, prompt: int) -> None:
        for name in self._live:
            self._engine.abort(name)
        self._live = [f"bench-{next(self._count)}" for _ in range(sequences)]
        # Greedy, and nothing ends a sequence.
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
        for name in self._live:
            ids = torch.randint(self._engine.vocab_size, (prompt,)).tolist()
            self._engine.add_request(name, ids, params)
        begun: set[str] = set()
        while len(begun) < sequences:
            begun |= {name for name, _ in self._engine.step()}

    def step(self) -> None:
        advanced = self._engine.step()
        assert len(advanced) == len(self._live), "a sequence was preempted: the cache is too small for the case"


class TransformersEngine:
    """A bf16 model of transformers with its own cache."""

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


class LlamaCppEngine:
    """A GGUF file in llama.cpp, through the C API that llama-cpp-python exposes."""

    def __init__(self, path: Path, threads: int, sequences: int, context: int, repack: bool) -> None:
        self._llama = _llama_cpp()
        model_params = self._llama.llama_model_default_params()
        model_params.use_extra_bufts = repack
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise UserError(
                f"llama.cpp could not load {path}, which was just written: install another llama-cpp-python"
            )
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


def _llama_cpp() -> Any:
    """llama-cpp-python with its log silenced. UserError where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(f"llama.cpp is measured through llama-cpp-python, not installed: {LLAMA_FIX}") from None
    llama_cpp.llama_log_set(_SILENT.setdefault("log", llama_cpp.llama_log_callback(lambda *_: None)), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


# llama.cpp keeps the callback's address: it must live as long as the process.
_SILENT: dict[str, Any] = {}
