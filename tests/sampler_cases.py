"""Batches that use every sampler at once, and what comes out of ours and of the reference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from bitsmith.samplers import pipeline
from bitsmith.samplers.history import History, Words
from bitsmith.samplers.params import SamplingParams
from torch import Tensor

from . import sampler_reference

VOCAB = 37
EOS = (3,)
WORDS = Words(breakers=((4,), (5, 6)), bad_words=((7,), (8, 9), (2, 2, 1)), protected=(10,))
# Enough of everything that no sampler is left out, alone and with others.
MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "dry_multiplier": 1.0, "top_k": 2, "xtc_probability": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.4, "temperature_last": True, "min_p": 0.05, "top_p": 0.9},
    {"dynatemp_min": 0.4, "dynatemp_max": 1.9, "dynatemp_exponent": 1.3},
    {"dynatemp_min": 0.4, "dynatemp_max": 1.9, "temperature_last": True, "top_k": 7},
    {"smoothing_factor": 0.2},
    {"smoothing_factor": 0.1, "smoothing_curve": 1.7, "min_p": 0.02},
    {"nsigma": 1.1},
    {"nsigma": 0.7, "banned_tokens": (1, 30)},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.8},
    {"top_p": 1e-300},
    {"min_p": 0.1},
    {"top_a": 0.3},
    {"tfs": 0.9},
    {"eta_cutoff": 0.03},
    {"epsilon_cutoff": 0.02},
    {"typical_p": 0.6},
    {"xtc_probability": 1.0, "xtc_threshold": 0.06},
    {"xtc_probability": 1.0, "xtc_threshold": 0.01, "top_k": 9},
    {"skew": 0.5},
    {"skew": -0.8, "top_k": 12},
    {"mirostat_mode": 2, "mirostat_tau": 1.2},
    {"mirostat_mode": 1, "mirostat_tau": 1.5},
    {"mirostat_mode": 2, "mirostat_tau": 0.9, "temperature": 0.8, "repetition_penalty": 1.4, "top_k": 1},
    {"adaptive_target": 0.3},
    {"adaptive_target": 0.15, "min_p": 0.05, "temperature": 1.2},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.5, "repetition_penalty_range": 5, "repetition_decay": 4},
    {"repetition_penalty": 1.9, "repetition_penalty_range": 6, "repetition_slope": 0.4},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.9},
    {"presence_penalty": -0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty_range": 3, "repetition_decay": 3},
    {"no_repeat_ngram_size": 2},
    {"dry_multiplier": 0.9, "dry_allowed_length": 1},
    {"dry_multiplier": 0.5, "dry_base": 2.5, "dry_range": 6, "dry_allowed_length": 1, "typical_p": 0.9},
    {"logit_bias": {0: 4.0, 5: -100, 36: 1.25}},
    {"allowed_token_ids": (1, 2, 3, 20), "temperature": 1.5},
    {"ban_eos_token": True, "top_k": 20},
    {"bad_words": ("x",)},
    {"min_tokens": 9, "stop_token_ids": (7, 9)},
    {"min_tokens": 9, "stop_token_ids": (7,), "ignore_eos": True},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "logit_bias": {3: 2.0}},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.97, "top_a": 0.01, "tfs": 0.99, "typical_p": 0.97, "skew": 0.3},
    {"temperature": 1.2, "nsigma": 2, "eta_cutoff": 0.01, "epsilon_cutoff": 0.005, "xtc_probability": 1.0},
)


def words_of(params: SamplingParams, vocab: int) -> Words:
    protected = WORDS.protected if vocab > max(WORDS.protected) else ()
    return replace(WORDS, protected=protected, bad_words=WORDS.bad_words if params.bad_words else ())


@dataclass(frozen=True)
class Batch:
    """Rows with their texts."""

    logits: Tensor
    params: list[SamplingParams]
    prompts: list[list[int]]
    outputs: list[list[int]]
    eos: tuple[int, ...] = EOS

    def take(self, rows: Sequence[int]) -> "Batch":
        columns = ([column[row] for row in rows] for column in (self.params, self.prompts, self.outputs))
        return Batch(self.logits[list(rows)], *columns, self.eos)

    @property
    def seeds(self) -> list[int]:
        """Of a row: what its text is made of, so that it keeps its seed wherever it goes."""
        return [sum(prompt) * 1000 + sum(output) for prompt, output in zip(self.prompts, self.outputs, strict=True)]

    def histories(self) -> list[History]:
        rows = zip(self.params, self.prompts, strict=True)
        return [History(params, prompt, words_of(params, self.logits.shape[-1])) for params, prompt in rows]

    def distribution(self) -> Tensor:
        return pipeline.distribution(*self.columns(), self.eos, self.seeds, self.histories())

    def sample(self) -> list[pipeline.Sampled | None]:
        return pipeline.sample(*self.columns(), self.seeds, self.eos, self.histories())

    def columns(self) -> tuple[Tensor, list[SamplingParams], list[list[int]], list[list[int]]]:
        return self.logits, self.params, self.prompts, self.outputs

    def processed(self) -> Tensor:
        """Our logits [B, V] after every step."""
        context = pipeline.context_of(*self.columns(), self.eos, self.seeds, self.histories())
        after = torch.full_like(self.logits, -torch.inf)
        for piece in pipeline.process(self.logits, context):
            for place, row in enumerate(piece.rows):
                # Padding repeats token 0 at -inf.
                ids = slice(None) if piece.ids is None else piece.ids[place][piece.logits[place] > -torch.inf]
                kept = (
                    piece.logits[place] if piece.ids is None else piece.logits[place][piece.logits[place] > -torch.inf]
                )
                after[row, ids] = kept
        return after

    def row(self, row: int, **more: Any) -> sampler_reference.Row:
        """For the reference."""
        params = self.params[row]
        words = words_of(params, self.logits.shape[-1])
        text = [*self.prompts[row]], [*self.outputs[row]]
        logits = self.logits[row].double().numpy()
        made = sampler_reference.Row(logits, params, *text, self.eos, words.breakers, words.bad_words, words.protected)
        return replace(made, **more)


def mixed(seed: int = 0, vocab: int = VOCAB, cases: Sequence[dict[str, Any]] = MIXED) -> Batch:
    """One row for each case; the texts repeat tokens and phrases."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(scale=3, size=(len(cases), vocab))).float()
    logits[:, 11] = -torch.inf
    prompts = [[*rng.integers(0, 9, size=rng.integers(1, 12)).tolist(), 12 + row % 20] for row in range(len(cases))]
    outputs = [rng.integers(0, 9, size=rng.integers(0, 9)).tolist() for _ in cases]
    return Batch(logits, [SamplingParams(**case) for case in cases], prompts, outputs)
