"""What the engine hands out: chunks while a request runs, one output when it is done.

`LLM.generate` returns `Output`s; the HTTP server streams `StreamChunk`s. Both count tokens the way OpenAI's `usage`
does: the prompt once, and every sampled token, the one that ended the request included.
"""

from dataclasses import dataclass
from typing import Literal

from ..samplers.trace import StepTrace

FinishReason = Literal["stop", "length", "repetition", "abort"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log) of one sampled token and of the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


TokenTrace = tuple[int, tuple[StepTrace, ...]]  # a sampled token and what each sampler did before it was drawn


@dataclass(frozen=True)
class StreamChunk:
    """What one engine step added to one request.

    `text_delta` may be empty while `token_ids` is not (half a UTF-8 character, or text that may still become a stop
    string), and the last chunk may bring text without a token. Tokens that may still become a banned string come once
    they cannot, several at a time. Concatenated, the deltas are exactly `Output.text`.
    """

    text_delta: str
    token_ids: tuple[int, ...]  # new ones, which nothing takes back
    logprobs: tuple[TokenLogprob, ...] | None  # one per token_ids entry; None unless the request asked for them
    finish_reason: FinishReason | None  # None until the last chunk, which is always sent
    prompt_tokens: int  # length of the prompt
    completion_tokens: int  # handed out so far, this chunk included
    # The stop string or stop token id that ended the request, or why it could not go on; None for eos and length
    stop_reason: int | str | None = None
    trace: tuple[tuple[StepTrace, ...], ...] | None = None  # one per token_ids entry; None unless asked for

    def traced(self) -> list[TokenTrace]:
        """The chunk's tokens with their traces; none unless asked for."""
        return list(zip(self.token_ids, self.trace, strict=True)) if self.trace else []


@dataclass(frozen=True)
class Output:
    """A finished request. `text` ends before the stop string that matched; `token_ids` holds every sampled token."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    stop_reason: int | str | None = None
    trace: list[tuple[StepTrace, ...]] | None = None  # what the samplers did, token by token; None unless asked for
