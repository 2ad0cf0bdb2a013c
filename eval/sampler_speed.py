"""Microseconds a row of each sampler, and of a chain of five with its draw, beside transformers' logits processors and
llama.cpp's samplers, on random logits.

One process, contenders interleaved, the median counts. Ours and transformers' take the whole batch at once on torch's
threads. llama.cpp takes one row at a time on one thread, as its server does; its array of candidates is filled outside
the clock. A contender that has no such sampler is absent.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..samplers.params import SamplingParams
from ..samplers.pipeline import Context, context_of, process, sample

OURS = "bitsmith"
CHAIN = "five and draw"
# The chain: one of each kind that clients send together.
_CHAIN = {"repetition_penalty": 1.1, "temperature": 0.8, "min_p": 0.02, "top_k": 100, "top_p": 0.95}
SAMPLERS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence_frequency_penalty": {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    "no_repeat_ngram": {"no_repeat_ngram_size": 3},
    "dry": {"dry_multiplier": 0.8},
    "temperature": {"temperature": 0.8},
    "dynamic temperature": {"dynatemp_min": 0.5, "dynatemp_max": 1.5},
    "smoothing": {"smoothing_factor": 0.2},
    "top_n_sigma": {"nsigma": 1.5},
    "top_k": {"top_k": 100},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.02},
    "top_a": {"top_a": 0.1},
    "tfs": {"tfs": 0.95},
    "typical_p": {"typical_p": 0.95},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-4},
    "eta_cutoff": {"eta_cutoff": 1e-4},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "skew": {"skew": 0.5},
    "mirostat 2": {"mirostat_mode": 2},
    "adaptive_p": {"adaptive_target": 0.4},
    CHAIN: _CHAIN,
}
Run = Callable[[], Any]
_HISTORY = 512


class Batch:
    """Random logits [rows, vocabulary] and a text for each row; logits as peaked as a model's."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.logits = torch.randn(rows, vocabulary) * 2.5
        self.texts = torch.randint(0, vocabulary, (rows, _HISTORY))
        # Some of it repeats, or DRY and the n-gram bans would find nothing.
        self.texts[:, -8:] = self.texts[:, 8:16]
        self.rows = rows


def contenders(name: str, batch: Batch, peers: Sequence[str]) -> dict[str, Run]:
    """What runs sampler `name` on the batch once, by contender."""
    found = {OURS: _ours(name, batch)}
    makers = {"transformers": _transformers, "llama.cpp": _llama_cpp}
    for peer in peers:
        if (run := makers[peer](name, batch)) is not None:
            found[peer] = run
    return found


def measure(runs: dict[str, Run], samples: int) -> dict[str, list[float]]:
    """Seconds of every call of every contender, one call each a round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(samples + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            took = run()
            took = took if isinstance(took, float) else time.perf_counter() - start
            if at:
                seconds[name].append(took)
    return seconds


def per_row(taken: Sequence[float], count: int) -> float:
    """Median microseconds a row of calls that take `count` rows."""
    return 1e6 * statistics.median(taken) / count


def rows(name: str, seconds: dict[str, list[float]], count: int) -> list[dict[str, Any]]:
    """Per peer: name, value (microseconds a row of ours), unit, ratio (theirs over ours), against, against_value."""
    each = {who: per_row(taken, count) for who, taken in seconds.items()}
    own = {"name": name, "value": each[OURS], "unit": "us a row"}
    others = [who for who in each if who != OURS]
    compared = [own | {"ratio": each[who] / each[OURS], "against": who, "against_value": each[who]} for who in others]
    return compared or [own | {"ratio": None, "against": None, "against_value": None}]


def _ours(name: str, batch: Batch) -> Run:
    params = [SamplingParams(**SAMPLERS[name])] * batch.rows
    texts = batch.texts.tolist()
    split = [text[: _HISTORY // 2] for text in texts], [text[_HISTORY // 2 :] for text in texts]
    seeds = list(range(batch.rows))
    context: Context = context_of(batch.logits, params, *split, seeds=seeds)
    if name == CHAIN:
        return lambda: sample(batch.logits, params, *split, seeds, histories=context.histories)
    return lambda: process(batch.logits, context)


def _transformers(name: str, batch: Batch) -> Run | None:
    from transformers.generation import logits_process as theirs

    made: dict[str, Callable[[], list[Any]]] = {
        "repetition_penalty": lambda: [theirs.RepetitionPenaltyLogitsProcessor(1.1)],
        "no_repeat_ngram": lambda: [theirs.NoRepeatNGramLogitsProcessor(3)],
        "temperature": lambda: [theirs.TemperatureLogitsWarper(0.8)],
        "top_k": lambda: [theirs.TopKLogitsWarper(100)],
        "top_p": lambda: [theirs.TopPLogitsWarper(0.95)],
        "min_p": lambda: [theirs.MinPLogitsWarper(0.02)],
        "typical_p": lambda: [theirs.TypicalLogitsWarper(0.95)],
        "epsilon_cutoff": lambda: [theirs.EpsilonLogitsWarper(1e-4)],
        "eta_cutoff": lambda: [theirs.EtaLogitsWarper(1e-4)],
        CHAIN: lambda: [
            theirs.RepetitionPenaltyLogitsProcessor(1.1),
            theirs.TemperatureLogitsWarper(0.8),
            theirs.MinPLogitsWarper(0.02),
            theirs.TopKLogitsWarper(100),
            theirs.TopPLogitsWarper(0.95),
        ],
    }
    if name not in made:
        return None
    processors: Any = theirs.LogitsProcessorList(made[name]())

    def run() -> Tensor:
        out = processors(batch.texts, batch.logits)
        return torch.multinomial(out.softmax(-1), 1) if name == CHAIN else out

    return run


def _llama_cpp(name: str, batch: Batch) -> Run | None:
    import llama_cpp as lib

    vocabulary = batch.logits.shape[-1]

    def chain() -> list[Any]:
        return [
            lib.llama_sampler_init_penalties(vocabulary, _HISTORY, 1.1, 0.0, 0.0),
            lib.llama_sampler_init_temp(0.8),
            lib.llama_sampler_init_min_p(0.02, 1),
            lib.llama_sampler_init_top_k(100),
            lib.llama_sampler_init_top_p(0.95, 1),
            lib.llama_sampler_init_dist(0),
        ]

    made: dict[str, Callable[[], list[Any]]] = {
        "repetition_penalty": lambda: [lib.llama_sampler_init_penalties(vocabulary, _HISTORY, 1.1, 0.0, 0.0)],
        "presence_frequency_penalty": lambda: [lib.llama_sampler_init_penalties(vocabulary, _HISTORY, 1.0, 0.2, 0.5)],
        "temperature": lambda: [lib.llama_sampler_init_temp(0.8)],
        "dynamic temperature": lambda: [lib.llama_sampler_init_temp_ext(1.0, 0.5, 1.0)],
        "top_n_sigma": lambda: [lib.llama_sampler_init_top_n_sigma(1.5)],
        "top_k": lambda: [lib.llama_sampler_init_top_k(100)],
        "top_p": lambda: [lib.llama_sampler_init_top_p(0.95, 1)],
        "min_p": lambda: [lib.llama_sampler_init_min_p(0.02, 1)],
        "typical_p": lambda: [lib.llama_sampler_init_typical(0.95, 1)],
        "xtc": lambda: [lib.llama_sampler_init_xtc(1.0, 0.05, 1, 0)],
        "mirostat 2": lambda: [lib.llama_sampler_init_mirostat_v2(0, 5.0, 0.1)],
        CHAIN: chain,
    }
    if name not in made:
        return None
    samplers = [_chain(lib, made[name](), text) for text in batch.texts.tolist()]
    fresh = torch.zeros(batch.rows, vocabulary, 3)
    fresh[..., 0] = torch.arange(vocabulary, dtype=torch.int32).view(torch.float32)
    fresh[..., 1] = batch.logits
    data = (lib.llama_token_data * vocabulary)()

    def run() -> float:
        took = 0.0
        for sampler, row in zip(samplers, fresh, strict=True):
            ctypes.memmove(data, row.data_ptr(), ctypes.sizeof(data))
            array = lib.llama_token_data_array(data, vocabulary, -1, False)
            start = time.perf_counter()
            lib.llama_sampler_apply(sampler, ctypes.byref(array))
            took += time.perf_counter() - start
        return took

    return run


def _chain(lib: Any, samplers: Sequence[Any], text: Sequence[int]) -> Any:
    """llama.cpp's chain of these samplers, told the text."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for each in samplers:
        lib.llama_sampler_chain_add(chain, each)
    for token in text:
        lib.llama_sampler_accept(chain, token)
    return chain
