"""The step loop: schedule, run one forward, sample, turn tokens into text, stop what is done.

The engine is synchronous and single-threaded: `add_request`, `step` until nothing is left, `abort` in between.
`LLM.generate` drives it directly, `AsyncEngine` from a thread. Everything that decides what runs is in the scheduler,
everything that computes in the runner; here is what happens to a token once it is sampled.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..kv_quant.base import KVCache, bytes_per_block, load_codec
from ..models.attention import make_paged
from ..samplers.params import SamplingParams
from ..samplers.pipeline import Sampled, sample
from ..samplers.steps import guidance
from . import tail
from .blocks import BlockManager
from .outputs import FinishReason, StreamChunk, TokenLogprob
from .pool import free_memory, pool_blocks
from .request import MOST_REWINDS, Request, loops
from .runner import Runner, Work, order_work
from .scheduler import Scheduler, Seq
from .stats import Stats
from .words import Vocabulary

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How large the engine is. Defaults suit a small machine; every field is a keyword of `bitsmith.LLM`."""

    kv_cache_dtype: str = "auto"  # a codec of kv_quant/; "auto" stores K and V as the model computes them
    max_model_len: int = 4096  # most tokens of prompt and completion; lowered to what the model was built for
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 2048  # tokens in one step; longer prompts are prefilled in chunks
    block_size: int = 16  # tokens per KV block
    num_blocks: int | None = None  # KV blocks; None takes what max_num_seqs full sequences need, or what fits
    enforce_eager: bool = False  # never repeat a recorded decode step (serve/recorded.py)
    gpu_memory_utilization: float = 0.9  # share of the device's memory (CPU: of the memory available) to use


@dataclass
class Engine:
    """A paged model with its scheduler. The model is taken over: plain forwards no longer work on it.

    UserError for a model that cannot be served and for sizes that do not fit.
    """

    model: PreTrainedModel
    tokenizer: Any
    config: EngineConfig = EngineConfig()
    counters: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        config = self.config
        text_config = self.model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.max_model_len = context_length(config.max_model_len, getattr(text_config, "max_position_embeddings", None))
        self.eos_token_ids = eos_token_ids(self.model, self.tokenizer)
        # On a GPU the largest step runs once, so that the memory its activations take is no longer free.
        tokens = min(config.max_num_batched_tokens, self.max_model_len) if self.model.device.type == "cuda" else 2
        shapes = make_paged(self.model, self.max_model_len, tokens)
        codec = load_codec(config.kv_cache_dtype, self.model.dtype)
        num_blocks = config.num_blocks
        if num_blocks is None:
            num_blocks = pool_blocks(
                wanted=config.max_num_seqs * -(-self.max_model_len // config.block_size),
                block_bytes=bytes_per_block(codec, shapes, config.block_size),
                memory=free_memory(self.model.device, config.gpu_memory_utilization),
                block_size=config.block_size,
                max_model_len=self.max_model_len,
            )
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = Scheduler(config.max_num_seqs, config.max_num_batched_tokens, self.blocks, self.max_model_len)
        cache = KVCache(codec, shapes, num_blocks, config.block_size, self.model.device)
        self.runner = Runner(self.model, cache, self.max_model_len, config.enforce_eager)
        self.vocabulary = Vocabulary(self.tokenizer, self.vocab_size)
        self._requests: dict[str, Request] = {}

    def check_request(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """UserError if this request could never run. Touches no state, so any thread may call it."""
        self.scheduler.check(len(prompt_ids), len(self._negative(prompt_ids, params)))
        params.check_vocab(self.vocab_size)
        self.vocabulary.words(params)
        if params.token_healing and params.allowed_token_ids:
            raise UserError(
                "token_healing and allowed_token_ids both say which tokens may come first: send one of them"
            )
        for at, token in enumerate(prompt_ids):
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"prompt token {at} is {token}, outside the model's vocabulary of {self.vocab_size} (0 to "
                    f"{self.vocab_size - 1}); was the prompt tokenized with another model's tokenizer?"
                )

    def add_request(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, arrival: float | None = None
    ) -> None:
        """Queue a request; `arrival` (time.perf_counter(), default now) is where its time to first token begins.

        UserError as `check_request`, or for a request_id that is in use.
        """
        self.check_request(prompt_ids, params)
        ids, healed = list(prompt_ids), None
        if params.token_healing and self.vocabulary.can_heal(ids):
            healed = ids.pop()
        negative = self._negative(ids, params)
        guide = Seq(f"{request_id}/negative", negative, params) if negative else None
        seq = Seq(request_id, ids, params, guide=guide)
        self.scheduler.add(seq)
        arrival = time.perf_counter() if arrival is None else arrival
        self._requests[request_id] = Request(seq, self.tokenizer, self.vocabulary, healed, arrival)

    def _negative(self, prompt_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt of the sequence that guidance moves away from; empty without guidance.

        An empty negative prompt is the prompt's last token alone, as in transformers.
        """
        if params.guidance_scale == 1:
            return []
        asked = self.vocabulary.encode(params.negative_prompt) if params.negative_prompt else []
        return asked or prompt_ids[-1:]

    def has_work(self) -> bool:
        """Whether a request is running or waiting."""
        return self.scheduler.has_work

    def step(self) -> list[tuple[str, StreamChunk]]:
        """One forward -> (request_id, chunk) of every request that got a token. Empty while only prompts advance."""
        work = order_work(self.scheduler.schedule())
        if not work:
            return []
        seqs, logits = self._complete(work, self.runner.run(work))
        sampled = self._sample(logits, seqs)
        ended = [self._drop(seq) for seq in seqs if seq not in sampled]
        token = {seq: each.token_id for seq, each in sampled.items()}
        self.scheduler.update(work, [token.get(seq) for seq, _ in work])
        now = time.perf_counter()
        chunks = ((seq.request_id, self._advance(seq, each, now)) for seq, each in sampled.items())
        return ended + [(name, chunk) for name, chunk in chunks if chunk is not None]

    def _complete(self, work: list[Work], logits: Tensor) -> tuple[list[Seq], Tensor]:
        """The sequences of `work` that get a token, and the logits [B, V] to choose it from, guided where asked."""
        row = {seq: at for at, (seq, _) in enumerate(work)}
        seqs = [seq for seq, count in work if count == seq.remaining and not seq.is_guide]
        taken = logits if len(seqs) == len(work) else logits[[row[seq] for seq in seqs]]
        guided = [(at, row[seq.guide], seq.params.guidance_scale) for at, seq in enumerate(seqs) if seq.guide]
        if guided:
            places, negatives, scales = map(list, zip(*guided, strict=True))
            scale = torch.tensor(scales, device=logits.device)[:, None]
            taken[places] = guidance(taken[places], logits[negatives], scale)
        return seqs, taken

    def _sample(self, logits: Tensor, seqs: list[Seq]) -> dict[Seq, Sampled]:
        """One token per sequence from logits `[len(seqs), V]`; none for one that has none left to choose."""
        best = logits.amax(-1).tolist() if seqs else []
        rows = [row for row, most in enumerate(best) if math.isfinite(most)]
        if not rows:
            return {}
        seqs = [seqs[row] for row in rows]
        sampled = tail.sample(logits[rows] if len(rows) < len(logits) else logits, seqs, self._pipeline)
        return {seq: each for seq, each in zip(seqs, sampled, strict=True) if each is not None}

    def _pipeline(self, logits: Tensor, seqs: list[Seq]) -> list[Sampled | None]:
        """`samplers.pipeline.sample` for sequences whose rows have a finite maximum."""
        histories = [self._requests[seq.request_id].history for seq in seqs]
        return sample(
            logits,
            [seq.params for seq in seqs],
            [history.prompt for history in histories],
            [seq.output for seq in seqs],
            [seq.seed for seq in seqs],
            self.eos_token_ids,
            histories,
        )

    def _drop(self, seq: Seq) -> tuple[str, StreamChunk]:
        """End a request that has no token to go on with; the others must."""
        reason = "no token is left: the model gave no finite logits, or the request's parameters ban all tokens"
        _LOG.error("request %s: after %d tokens %s; aborted", seq.request_id, seq.num_output, reason)
        return seq.request_id, self._chunk(self._requests[seq.request_id], "abort", reason)

    def abort(self, request_id: str) -> StreamChunk | None:
        """End a request and free its blocks at once -> its last chunk; None if it is not running."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._chunk(request, "abort")

    def stats(self) -> dict[str, Any]:
        """serve.stats plus running, waiting, blocks_total, blocks_free, kv_usage (0 to 1) and preemptions."""
        total, free = self.blocks.num_blocks, self.blocks.num_free
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks_total": total,
            "blocks_free": free,
            "kv_usage": (total - free) / total,
            "preemptions": self.scheduler.preemptions,
            **self.counters.snapshot(),
        }

    def _advance(self, seq: Seq, sampled: Sampled, now: float) -> StreamChunk | None:
        """Take in the token just sampled for `seq`; finish the request if it ended it. None: nothing to tell yet."""
        request, token = self._requests[seq.request_id], sampled.token_id
        self._observe(request, now)
        if token in self.eos_token_ids and not seq.params.ignore_eos:
            request.end(sampled)
            return self._chunk(request, "stop")
        if token in seq.params.stop_token_ids:
            request.end(sampled)
            return self._chunk(request, "stop", token)
        back = request.add(sampled, more=not seq.at_limit)
        if back is not None:
            return self._rewind(request, back)
        if request.stop.matched is not None:
            return self._chunk(request, "stop", request.stop.matched)
        if seq.at_limit:
            return self._chunk(request, "length")
        if loops(seq.ids, seq.num_prompt, seq.params.repetition_detection):
            return self._chunk(request, "repetition", "repetition_detected")
        chunk = self._chunk(request, None)
        return chunk if chunk.token_ids else None

    def _rewind(self, request: Request, position: int) -> StreamChunk | None:
        """Go back to the token at `position` of the output, where a banned string begins, and choose another."""
        seq = request.seq
        request.rewind(position)
        self.scheduler.rewind(seq, position)
        if request.rewinds < MOST_REWINDS:
            return None
        reason = f"every continuation tried ends in banned_strings ({MOST_REWINDS} times)"
        _LOG.error("request %s: after %d tokens %s; aborted", seq.request_id, seq.num_output, reason)
        return self._chunk(request, "abort", reason)

    def _observe(self, request: Request, now: float) -> None:
        first = not request.started
        histogram = self.counters.time_to_first_token if first else self.counters.inter_token
        histogram.observe(now - request.last_event)
        request.started, request.last_event = True, now
        if first:
            self.counters.prompt_tokens += request.seq.num_prompt

    def _chunk(
        self, request: Request, reason: FinishReason | None, stop_reason: int | str | None = None
    ) -> StreamChunk:
        """What can be handed out now, perhaps nothing; all of it if `reason` ends the request."""
        seq = request.seq
        ready, text = request.release(everything=reason is not None)
        self.counters.generation_tokens += len(ready)
        if reason is not None:
            text += request.rest()
            self.scheduler.finish(seq)
            del self._requests[seq.request_id]
            self.counters.finished[reason] += 1
        reported = (TokenLogprob(each.token_id, each.logprob, each.top) for each in ready if each.logprob is not None)
        return StreamChunk(
            text_delta=text,
            token_ids=tuple(each.token_id for each in ready),
            logprobs=None if seq.params.logprobs is None else tuple(reported),
            finish_reason=reason,
            prompt_tokens=seq.num_prompt,
            completion_tokens=request.released,
            stop_reason=stop_reason,
            trace=tuple(each.trace for each in ready) if seq.params.sampler_trace else None,
        )


def context_length(asked: int, trained: int | None) -> int:
    """`asked` tokens, lowered (with a warning) to the `trained` context: beyond it a model writes garbage or fails."""
    if trained is None or asked <= trained:
        return asked
    _LOG.info("max_model_len %d lowered to %d, the context this model was built for", asked, trained)
    return trained


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a completion: of generation_config, else of the config, else of the tokenizer."""
    candidates = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    found: int | list[int] = next((ids for ids in candidates if ids is not None), [])
    return frozenset([found] if isinstance(found, int) else found)
