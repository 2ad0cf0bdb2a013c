"""OpenAI responses: engine chunks to the JSON of completions and chat completions, whole or streamed.

A `Reply` collects what one request has said so far and turns each chunk into log-probability listings; the two
endpoints differ only in where text and log-probabilities sit in a choice, which is what the `Shape` functions hold.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..samplers.trace import Best
from .outputs import StreamChunk, TokenLogprob, TokenTrace
from .token_text import TokenBytes, shown

Json = dict[str, Any]

# JSON has no -inf; the value OpenAI and vLLM send for a token of probability zero.
LOWEST_LOGPROB = -9999.0


@dataclass
class Choice:
    """One answer as it grows, from the text it starts with (an echoed prompt, or nothing).

    `offset` is where the next token's text starts, in characters.
    """

    index: int
    texts: list[str]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    offset: int = 0

    def add(self, chunk: StreamChunk) -> None:
        """Account for one engine chunk."""
        self.texts.append(chunk.text_delta)
        self.logprobs.extend(chunk.logprobs or ())
        self.traces.extend(chunk.traced())
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason
        self.prompt_tokens = chunk.prompt_tokens
        self.completion_tokens = chunk.completion_tokens


def usage(choices: Sequence[Choice], prompts: int) -> Json:
    """OpenAI's token counts; a prompt answered `n` times counts once. Choices are ordered prompt by prompt."""
    each = len(choices) // prompts
    prompt_tokens = sum(choice.prompt_tokens for choice in choices[::each])
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def completion_logprobs(choice: Choice, entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> Json:
    """The parallel lists of /v1/completions. Advances `choice.offset` past these tokens."""
    tokens, offsets = [], []
    for entry in entries:
        text = shown(token_bytes(entry.token_id))
        tokens.append(text)
        offsets.append(choice.offset)
        choice.offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [{shown(token_bytes(i)): _finite(value) for i, value in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def chat_logprobs(choice: Choice, entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> Json:
    """The list of objects of /v1/chat/completions."""

    def item(token_id: int, logprob: float) -> Json:
        raw = token_bytes(token_id)
        return {"token": shown(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    listed = [
        item(entry.token_id, entry.logprob) | {"top_logprobs": [item(*top) for top in entry.top]} for entry in entries
    ]
    return {"content": listed}


def trace(entries: Sequence[TokenTrace], token_bytes: TokenBytes) -> list[Json]:
    """What the samplers did, token by token: each step that ran, what it removed, the best tokens before and after."""

    def best(tokens: Best) -> list[Json]:
        return [{"token": shown(token_bytes(i)), "token_id": i, "prob": prob} for i, prob in tokens]

    return [
        {
            "token": shown(token_bytes(token)),
            "token_id": token,
            "steps": [asdict(step) | {"before": best(step.before), "after": best(step.after)} for step in steps],
        }
        for token, steps in entries
    ]


@dataclass(frozen=True)
class Shape:
    """What tells one endpoint's JSON from the other's."""

    id_prefix: str
    whole: str  # `object` of a complete response
    part: str  # `object` of a streamed one
    whole_text: Callable[[str], Json]
    part_text: Callable[[str], Json]
    logprobs: Callable[[Choice, Sequence[TokenLogprob], TokenBytes], Json]


COMPLETION = Shape(
    id_prefix="cmpl-",
    whole="text_completion",
    part="text_completion",
    whole_text=lambda text: {"text": text},
    part_text=lambda text: {"text": text},
    logprobs=completion_logprobs,
)
CHAT = Shape(
    id_prefix="chatcmpl-",
    whole="chat.completion",
    part="chat.completion.chunk",
    whole_text=lambda text: {"message": {"role": "assistant", "content": text}},
    part_text=lambda text: {"delta": {"content": text} if text else {}},
    logprobs=chat_logprobs,
)


@dataclass(frozen=True)
class Reply:
    """The JSON of one request's answer."""

    shape: Shape
    model: str
    token_bytes: TokenBytes
    with_logprobs: bool
    with_trace: bool
    id: str
    created: int

    @classmethod
    def new(cls, shape: Shape, model: str, token_bytes: TokenBytes, with_logprobs: bool, with_trace: bool) -> "Reply":
        """A reply with a fresh id, created now."""
        fresh = shape.id_prefix + uuid.uuid4().hex
        return cls(shape, model, token_bytes, with_logprobs, with_trace, fresh, int(time.time()))

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(
        self,
        choice: Choice,
        said: Json,
        entries: Sequence[TokenLogprob],
        traces: Sequence[TokenTrace],
        finish_reason: str | None,
    ) -> Json:
        logprobs = self.shape.logprobs(choice, entries, self.token_bytes) if self.with_logprobs else None
        answer: Json = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.with_trace:
            answer["sampler_trace"] = trace(traces, self.token_bytes)
        return answer | ({"stop_reason": choice.stop_reason} if finish_reason else {})

    def whole(self, choices: Sequence[Choice], prompts: int) -> Json:
        """The response of a request that does not stream."""
        listed = []
        for choice in choices:
            said = self.shape.whole_text("".join(choice.texts))
            listed.append(self._choice(choice, said, choice.logprobs, choice.traces, choice.finish_reason))
        return self._envelope(self.shape.whole, listed) | {"usage": usage(choices, prompts)}

    def opening(self, choice: Choice, prefix: str) -> Json | None:
        """The event before a choice's first token: who speaks in a chat, the echoed prompt in a completion; or None."""
        if self.shape is CHAT:
            start: Json = {"delta": {"role": "assistant", "content": ""}}
        elif prefix:
            start = {"text": prefix}
        else:
            return None
        return self._envelope(self.shape.part, [self._choice(choice, start, (), (), None)])

    def part(self, choice: Choice, chunk: StreamChunk) -> Json | None:
        """The event for one engine chunk; None if there is nothing to tell yet."""
        per_token = self.with_logprobs or self.with_trace
        if not (chunk.text_delta or chunk.finish_reason or (per_token and chunk.token_ids)):
            return None
        said = self.shape.part_text(chunk.text_delta)
        answer = self._choice(choice, said, chunk.logprobs or (), chunk.traced(), chunk.finish_reason)
        return self._envelope(self.shape.part, [answer])

    def usage(self, choices: Sequence[Choice], prompts: int) -> Json:
        """The event that `stream_options.include_usage` asks for, after the last choice."""
        return self._envelope(self.shape.part, []) | {"usage": usage(choices, prompts)}
