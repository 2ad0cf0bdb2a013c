"""The step loop: schedule, run one forward, sample, turn tokens into text, stop what is done.

The engine is synchronous and single-threaded: `add_request`, `step` until nothing is left, `abort` in between.
`LLM.generate` drives it directly, `AsyncEngine` from a thread. Everything that decides what runs is in the scheduler,
everything that computes in the runner; here is what happens to a token once it is sampled.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..kv_quant.base import KVCache, bytes_per_block, load_codec
from ..models.attention import make_paged
from ..samplers.params import SamplingParams
from ..samplers.pipeline import Sampled, sample
from . import tail
from .blocks import BlockManager
from .detokenize import Detokenizer, StopMatcher
from .outputs import FinishReason, StreamChunk, TokenLogprob
from .pool import free_memory, pool_blocks
from .runner import Runner, order_work
from .scheduler import Scheduler, Seq
from .stats import Stats

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
class _Request:
    """What the engine remembers of a sequence besides the scheduler's Seq."""

    seq: Seq
    detokenizer: Detokenizer
    stop: StopMatcher
    last_event: float  # time of arrival, then of the latest token


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
        self._requests: dict[str, _Request] = {}

    def check_request(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """UserError if this request could never run. Touches no state, so any thread may call it."""
        self.scheduler.check(len(prompt_ids))
        params.check_vocab(self.vocab_size)
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
        seq = Seq(request_id, list(prompt_ids), params)
        self.scheduler.add(seq)
        self._requests[request_id] = _Request(
            seq,
            Detokenizer.after(self.tokenizer, prompt_ids, params.skip_special_tokens),
            StopMatcher(params.stop, params.include_stop_str_in_output),
            time.perf_counter() if arrival is None else arrival,
        )

    def has_work(self) -> bool:
        """Whether a request is running or waiting."""
        return self.scheduler.has_work

    def step(self) -> list[tuple[str, StreamChunk]]:
        """One forward -> (request_id, chunk) of every request that got a token. Empty while only prompts advance."""
        work = order_work(self.scheduler.schedule())
        if not work:
            return []
        logits = self.runner.run(work)
        usable = logits.amax(-1).isfinite().tolist()
        done = [row for row, (seq, count) in enumerate(work) if count == seq.remaining]
        dropped = [self._drop(work[row][0]) for row in done if not usable[row]]
        rows = [row for row in done if usable[row]]
        seqs = [work[row][0] for row in rows]
        sampled = tail.sample(logits if len(rows) == len(work) else logits[rows], seqs, self._sample)
        tokens: list[int | None] = [None] * len(work)
        for row, each in zip(rows, sampled, strict=True):
            tokens[row] = each.token_id
        self.scheduler.update(work, tokens)
        now = time.perf_counter()
        return dropped + [(s.request_id, self._advance(s, each, now)) for s, each in zip(seqs, sampled, strict=True)]

    def _drop(self, seq: Seq) -> tuple[str, StreamChunk]:
        """End a request whose logits hold NaN or no finite value (float16 overflow): the others must go on."""
        _LOG.error("request %s: the model gave no finite logits after %d tokens; aborted", seq.request_id, len(seq.ids))
        return seq.request_id, self._chunk(self._requests[seq.request_id], "", None, "abort")

    def abort(self, request_id: str) -> StreamChunk | None:
        """End a request and free its blocks at once -> its last chunk; None if it is not running."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._chunk(request, request.stop.finish(), None, "abort")

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

    def _sample(self, logits: Tensor, seqs: list[Seq]) -> list[Sampled]:
        """One token per sequence from logits `[len(seqs), V]`."""
        if not seqs:
            return []
        return sample(
            logits,
            [seq.params for seq in seqs],
            [seq.prompt for seq in seqs],
            [seq.output for seq in seqs],
            [seq.seed for seq in seqs],
            self.eos_token_ids,
        )

    def _advance(self, seq: Seq, sampled: Sampled, now: float) -> StreamChunk:
        """Turn the token just sampled for `seq` into text, and finish the request if it ended it."""
        request, token = self._requests[seq.request_id], sampled.token_id
        self._observe(request, now)
        if token in self.eos_token_ids and not seq.params.ignore_eos:
            return self._chunk(request, self._rest(request), sampled, "stop")
        if token in seq.params.stop_token_ids:
            return self._chunk(request, self._rest(request), sampled, "stop", token)
        text = request.stop.add(request.detokenizer.add(token))
        if request.stop.matched is None and seq.at_limit:
            text += self._rest(request)
            if request.stop.matched is None:
                return self._chunk(request, text, sampled, "length")
        if request.stop.matched is not None:
            return self._chunk(request, text, sampled, "stop", request.stop.matched)
        return self._chunk(request, text, sampled, None)

    def _rest(self, request: _Request) -> str:
        """The text still held back, now that no more can follow."""
        return request.stop.add(request.detokenizer.finish()) + request.stop.finish()

    def _observe(self, request: _Request, now: float) -> None:
        first = request.seq.num_output == 1
        histogram = self.counters.time_to_first_token if first else self.counters.inter_token
        histogram.observe(now - request.last_event)
        request.last_event = now
        self.counters.generation_tokens += 1
        if first:
            self.counters.prompt_tokens += request.seq.num_prompt

    def _chunk(
        self,
        request: _Request,
        text: str,
        sampled: Sampled | None,
        reason: FinishReason | None,
        stop_reason: int | str | None = None,
    ) -> StreamChunk:
        seq = request.seq
        if reason is not None:
            self.scheduler.finish(seq)
            del self._requests[seq.request_id]
            self.counters.finished[reason] += 1
        logprobs: tuple[TokenLogprob, ...] | None = None
        if seq.params.logprobs is not None:
            logprobs = ()
        if sampled is not None and sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob, sampled.top),)
        return StreamChunk(
            text_delta=text,
            token_ids=() if sampled is None else (sampled.token_id,),
            logprobs=logprobs,
            finish_reason=reason,
            prompt_tokens=seq.num_prompt,
            completion_tokens=seq.num_output,
            stop_reason=stop_reason,
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
