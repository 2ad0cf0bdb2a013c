"""OpenAI requests: from a JSON object to checked dataclasses, or one error that names the field.

The fields of the protocol (prompt, messages, stream, n ...) are taken out here, each with its type checked; whatever
remains is a sampling parameter and goes to `SamplingParams.from_request`, which knows every name and its aliases and
refuses the rest. A `null` counts as absent, as OpenAI's clients send it.

Left out: tools and structured output (refused by name rather than ignored), images and audio (this server is text
only).
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from ..samplers.names import ALIASES
from ..samplers.params import SamplingParams

# OpenAI's own limit.
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_JSON_TYPES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_MISSING = object()


class RequestError(UserError):
    """A request that cannot be answered: the message, and what OpenAI's error object and the HTTP status say."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Generation:
    """What both endpoints share: how to answer, and how to sample."""

    model: str | None
    n: int
    stream: bool
    include_usage: bool
    sampling: dict[str, Any]  # what `SamplingParams.from_request` gets

    def params(self, choice: int) -> SamplingParams:
        """The sampling parameters of one choice. With a seed, choice i uses seed + i: n equal answers are of no use."""
        params = SamplingParams.from_request(self.sampling)
        if (params.logprobs or 0) > MAX_TOP_LOGPROBS:
            message = f"at most {MAX_TOP_LOGPROBS} alternatives per token can be reported, not {params.logprobs}"
            raise RequestError(message, "logprobs")
        return params if params.seed is None or choice == 0 else replace(params, seed=params.seed + choice)


@dataclass(frozen=True)
class CompletionRequest:
    """Body of POST /v1/completions."""

    generation: Generation
    prompts: list[str | list[int]]
    echo: bool
    add_special_tokens: bool


@dataclass(frozen=True)
class ChatRequest:
    """The messages of POST /v1/chat/completions (and of /tokenize), contents flattened to text."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def describe(value: Any) -> str:
    """`value` as an error message shows it: its JSON type, and the value if it is short."""
    for python_type, name in _JSON_TYPES.items():
        if type(value) is python_type:
            shown = json.dumps(value)
            return f"{name} ({shown if len(shown) <= 40 else shown[:40] + '...'})"
    return "null"


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body.

    RequestError for anything else, unpaired surrogates included (no tokenizer takes them).
    """
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "the body holds an unpaired surrogate (\\ud800-\\udfff): send the character as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {describe(body)}")
    return body


def take(body: dict[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    """Remove field `name` from `body` and return it.

    RequestError if it is not a `kind`, or missing without a default.
    """
    value = body.pop(name, None)
    if value is None:
        if default is _MISSING:
            raise RequestError(f"`{name}` is missing: it must be {_JSON_TYPES[kind]}", name)
        return default
    # bool is an int to Python; to a caller, `"n": true` is a mistake.
    if type(value) is not kind:
        raise RequestError(f"`{name}` must be {_JSON_TYPES[kind]}, not {describe(value)}", name)
    return value


def refuse_rest(body: dict[str, Any]) -> None:
    """RequestError if fields are left in `body` once all known ones were taken."""
    if left := [name for name, value in body.items() if value is not None]:
        raise RequestError(f"unknown field {left[0]!r}: remove it", left[0])


def _take_prompts(body: dict[str, Any]) -> list[str | list[int]]:
    """`prompt`: a string, a list of strings, a list of token ids, or a list of such lists."""
    accepted = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    prompt = body.pop("prompt", None)
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        found = "an empty list" if prompt == [] else describe(prompt)
        raise RequestError(f"`prompt` must be {accepted}, not {found}", "prompt")
    if all(type(item) is int for item in prompt):
        return [prompt]
    if all(isinstance(item, str) for item in prompt):
        return prompt
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompt):
        return prompt
    raise RequestError(
        f"`prompt` must be {accepted}; this list mixes or holds something else: {describe(prompt)}", "prompt"
    )


def _take_generation(body: dict[str, Any]) -> Generation:
    """The shared fields. Call last: what is left in `body` becomes the sampling parameters."""
    if body.pop("tools", None):
        raise RequestError("`tools`: this server does not call tools yet; remove `tools` and `tool_choice`", "tools")
    body.pop("tool_choice", None)
    answer_format = take(body, "response_format", dict, {"type": "text"})
    if answer_format.get("type") != "text":
        message = f'`response_format`: {describe(answer_format)} is not supported yet; only {{"type": "text"}} is'
        raise RequestError(message, "response_format")
    stream = take(body, "stream", bool, False)
    options = take(body, "stream_options", dict, {})
    if options and not stream:
        raise RequestError("`stream_options` is only allowed together with `stream`: true", "stream_options")
    n = take(body, "n", int, 1)
    if not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"`n` must be between 1 and {MAX_CHOICES}, not {n}", "n")
    return Generation(
        model=take(body, "model", str, None),
        n=n,
        stream=stream,
        include_usage=take(dict(options), "include_usage", bool, False),
        sampling={name: value for name, value in body.items() if value is not None},
    )


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """The body of POST /v1/completions, or RequestError."""
    body = dict(body)
    prompts = _take_prompts(body)
    echo = take(body, "echo", bool, False)
    if echo and body.get("logprobs") is not None:
        raise RequestError(
            "`echo` with `logprobs` needs prompt log-probabilities, which are not computed; drop one of them", "echo"
        )
    add_special_tokens = take(body, "add_special_tokens", bool, True)
    if body.pop("suffix", None):
        raise RequestError("`suffix` (text after the completion) is not supported; leave it out", "suffix")
    return CompletionRequest(_take_generation(body), prompts, echo, add_special_tokens)


def _flatten(content: Any, where: str) -> str:
    """A message's content as one string: it may be a string, null or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"`{where}.content` must be a string or a list of text parts, not {describe(content)}", where
        )
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            example = '{"type": "text", "text": "..."}'
            raise RequestError(
                f"`{where}.content[{i}]` must be {example} (this server is text only), not {describe(part)}", where
            )
        texts.append(part["text"])
    return "".join(texts)


def take_chat(body: dict[str, Any]) -> ChatRequest:
    """Remove the conversation's fields from `body` and return them checked, or RequestError."""
    messages = take(body, "messages", list)
    if not messages:
        raise RequestError("`messages` is empty: it must hold at least one message", "messages")
    checked = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"`{where}` must be an object with a string `role`, not {describe(message)}", where)
        checked.append({**message, "content": _flatten(message.get("content"), where)})
    continued = take(body, "continue_final_message", bool, False)
    prompted = take(body, "add_generation_prompt", bool, not continued)
    if continued and prompted:
        message = "`continue_final_message` and `add_generation_prompt` exclude each other: set one of them to false"
        raise RequestError(message, "continue_final_message")
    return ChatRequest(checked, prompted, continued, take(body, "chat_template_kwargs", dict, {}))


def parse_chat(body: dict[str, Any]) -> tuple[Generation, ChatRequest]:
    """The body of POST /v1/chat/completions, or RequestError."""
    body = dict(body)
    chat = take_chat(body)
    wanted = take(body, "logprobs", bool, False)
    top = take(body, "top_logprobs", int, None)
    if top is not None and not wanted:
        raise RequestError("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    if wanted:
        body["logprobs"] = top or 0
    # Unlike a completion's 16, a chat reply may by default use all the context that is left.
    if not any(ALIASES.get(name, name) == "max_tokens" and value is not None for name, value in body.items()):
        body["max_tokens"] = -1
    return _take_generation(body), chat
