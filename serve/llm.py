"""Offline generation: a batch of prompts in, finished outputs out.

The same engine as the server's, stepped here until it is empty, so every prompt of the list shares forwards with the
others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.load import load_model, load_tokenizer, serving_dtype
from ..samplers.params import SamplingParams
from .engine import Engine, EngineConfig
from .outputs import Output, StreamChunk, TokenLogprob

Prompt = str | list[int]


class LLM:
    """A model ready to generate.

    `model` is a checkpoint directory (any format bitsmith loads) or a transformers model, which is taken over: give
    its tokenizer then. `device` None takes a GPU if there is one. `dtype` None takes bfloat16 for a quantized
    checkpoint on the CPU and what load_model takes otherwise. `int8_copy`: as load_model's. Further keywords are the
    fields of EngineConfig.
    UserError for an unknown keyword, an unusable checkpoint, or a model that cannot be served.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        int8_copy: bool = False,
        **options: Any,
    ) -> None:
        accepted = [each.name for each in fields(EngineConfig)]
        if unknown := sorted(set(options) - set(accepted)):
            raise UserError(
                f"LLM has no option {', '.join(unknown)}; it accepts device, dtype, int8_copy, {', '.join(accepted)}"
            )
        if isinstance(model, str | Path):
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            loaded = load_model(model, device, dtype or serving_dtype(model, device), int8_copy=int8_copy)
            tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        else:
            if device is not None or dtype is not None or int8_copy:
                raise UserError(
                    "device, dtype and int8_copy are for checkpoints; a built model keeps its own: call model.to(...), "
                    "or load_model(..., int8_copy=True)"
                )
            if tokenizer is None:
                raise UserError("a built model needs its tokenizer: LLM(model, tokenizer)")
            loaded = model
        self.engine = Engine(loaded, tokenizer, EngineConfig(**options))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Complete every prompt, text or token ids, in one batch -> outputs in the same order.

        `params` is one SamplingParams for all, or one per prompt. UserError, before anything runs, for a prompt
        longer than the context and other bad requests.
        """
        asked: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        each_params = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(asked)
        if len(each_params) != len(asked):
            raise UserError(
                f"{len(asked)} prompts and {len(each_params)} SamplingParams: give one for all, or one each"
            )
        requests = {}
        for number, (prompt, one) in enumerate(zip(asked, each_params, strict=True)):
            ids = self._encode(number, prompt)
            self.engine.check_request(ids, one)
            requests[f"llm-{next(self._ids)}"] = (ids, one)
        chunks: dict[str, list[StreamChunk]] = {request_id: [] for request_id in requests}
        try:
            for request_id, (ids, one) in requests.items():
                self.engine.add_request(request_id, ids, one)
            while self.engine.has_work():
                for request_id, chunk in self.engine.step():
                    chunks[request_id].append(chunk)
        finally:
            # After an interruption nothing may stay behind for the next call.
            for request_id in requests:
                self.engine.abort(request_id)
        return [_output(parts) for parts in chunks.values()]

    def _encode(self, number: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.engine.tokenizer.encode(prompt))
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt
        raise UserError(
            f"prompt {number} is {type(prompt).__name__} {str(prompt)[:60]!r}: give a string or a list of ints"
        )


def _output(chunks: list[StreamChunk]) -> Output:
    last = chunks[-1]
    assert last.finish_reason is not None, "the engine is empty and a request is not finished"
    logprobs: list[TokenLogprob] | None = None
    if last.logprobs is not None:
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    trace = None if last.trace is None else [steps for chunk in chunks for steps in chunk.trace or ()]
    return Output(
        text="".join(chunk.text_delta for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        stop_reason=last.stop_reason,
        trace=trace,
    )
