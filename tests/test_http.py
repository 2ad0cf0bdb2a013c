"""The HTTP layer over an engine that says scripted tokens:

framing, shapes, errors, and what happens when a client leaves.
"""

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.trace import StepTrace
from bitsmith.serve.api import create_app
from bitsmith.serve.engine_async import EngineDeadError
from bitsmith.serve.outputs import StreamChunk, TokenLogprob
from bitsmith.serve.presets import read_preset
from bitsmith.serve.token_text import token_bytes_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 64


class FakeEngine:
    """Answers every prompt with `reply`, one token a step, stopping at max_tokens;

    `hold` makes it stall after the first token.
    """

    base: PreTrainedTokenizerFast

    def __init__(self, reply: str = "hé!", template: str | None = TEMPLATE) -> None:
        self.tokenizer = copy.copy(self.base)
        self.tokenizer.chat_template = template
        self.max_model_len = CONTEXT
        self.reply = self.tokenizer.encode(reply)
        self.hold = False
        self.failure: Exception | None = None
        self.healthy = True
        self.trace: tuple[StepTrace, ...] = ()
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.running: set[str] = set()
        self.first_token = asyncio.Event()

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    def is_healthy(self) -> bool:
        return self.healthy

    def check_request(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if len(prompt_ids) >= self.max_model_len:
            raise UserError(f"the prompt has {len(prompt_ids)} tokens, the context {self.max_model_len}: shorten it")

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[StreamChunk]:
        self.seen.append((prompt_ids, params))
        self.running.add(request_id)
        try:
            if self.failure:
                raise self.failure
            ids = self.reply[: params.max_tokens]
            said = ""
            for i, token in enumerate(ids):
                text = self.tokenizer.decode(ids[: i + 1])
                # Half a character is withheld, as the engine does.
                delta = "" if text.endswith("\ufffd") else text[len(said) :]
                said += delta
                top = () if not params.logprobs else ((token, -0.5), (0, float("-inf")))
                logprobs = None if params.logprobs is None else (TokenLogprob(token, -0.5, top[: params.logprobs]),)
                last = "length" if len(ids) < len(self.reply) else "stop"
                finish = last if i + 1 == len(ids) else None
                trace = (self.trace,) if params.sampler_trace else None
                yield StreamChunk(delta, (token,), logprobs, finish, len(prompt_ids), i + 1, trace=trace)
                self.first_token.set()
                await (asyncio.Event().wait() if self.hold else asyncio.sleep(0))
        finally:
            self.running.discard(request_id)

    def stats(self) -> dict[str, Any]:
        histogram = {"buckets": [(0.1, 3), (1.0, 4)], "sum": 1.5, "count": 5}
        return {
            "running": 1,
            "waiting": 2,
            "blocks_total": 10,
            "blocks_free": 7,
            "kv_usage": 0.3,
            "prompt_tokens": 100,
            "generation_tokens": 50,
            "preemptions": 0,
            "finished": {"stop": 4, "length": 1},
            "time_to_first_token_seconds": histogram,
            "inter_token_seconds": histogram,
        }


@pytest.fixture(autouse=True)
def _tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    FakeEngine.base = byte_tokenizer


def call(
    engine: FakeEngine, method: str, path: str, body: Any = None, headers: Any = None, **options: Any
) -> httpx.Response:
    """One request to the application served under the name "tiny"."""

    async def go() -> httpx.Response:
        app = create_app(engine, "tiny", **options)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(go())


def post(path: str, body: Any, engine: FakeEngine | None = None) -> httpx.Response:
    return call(engine or FakeEngine(), "POST", path, body)


def refused(path: str, body: Any, status: int = 400, engine: FakeEngine | None = None) -> dict[str, Any]:
    """The error object of a request that must fail with `status`."""
    response = post(path, body, engine)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON objects of an event stream, whose framing is checked to the byte."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.content.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


USER = [{"role": "user", "content": "hi"}]


def test_completion() -> None:
    engine = FakeEngine()
    body = post("/v1/completions", {"model": "tiny", "prompt": "ab", "temperature": 0.5}, engine).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion" and body["model"] == "tiny"
    choice = {"index": 0, "text": "hé!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert body["choices"] == [choice]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    ids, params = engine.seen[0]
    assert ids == engine.tokenizer.encode("ab")
    assert params.temperature == 0.5
    # OpenAI's default for completions is 16 tokens.
    assert params.max_tokens == 16


def test_completion_prompt_forms() -> None:
    engine = FakeEngine()
    ids = engine.tokenizer.encode("ab")
    for prompt, count in (("ab", 1), (["ab", "ab"], 2), (ids, 1), ([ids, ids, ids], 3)):
        engine.seen.clear()
        body = post("/v1/completions", {"prompt": prompt, "max_tokens": 1}, engine).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(count))
        assert [prompt_ids for prompt_ids, _ in engine.seen] == [ids] * count
        assert body["usage"]["prompt_tokens"] == 2 * count
        assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [None, [], 5, ["a", 1], [[1], ["a"]], [True], {"a": 1}])
def test_completion_refuses_other_prompts(prompt: Any) -> None:
    error = refused("/v1/completions", {"prompt": prompt})
    assert error["param"] == "prompt"
    assert "a string, a list of strings, a list of token ids or a list of lists" in error["message"]


def test_n_answers_count_the_prompt_once_and_differ_in_seed() -> None:
    engine = FakeEngine()
    body = post("/v1/completions", {"prompt": ["ab", "c"], "n": 2, "seed": 7}, engine).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
    assert sorted(params.seed or 0 for _, params in engine.seen) == [7, 7, 8, 8]
    assert "between 1 and 128" in refused("/v1/completions", {"prompt": "a", "n": 0})["message"]


def test_completion_stream_withholds_half_characters_and_reports_usage() -> None:
    body = {"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    *parts, last = events(post("/v1/completions", body))
    assert [part["choices"][0]["text"] for part in parts] == ["h", "é", "!"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]
    assert len({part["id"] for part in [*parts, last]}) == 1
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert all(part["usage"] is None for part in parts)
    without = events(post("/v1/completions", {"prompt": "ab", "stream": True}))
    assert all("usage" not in part for part in without)


def test_stream_options_need_stream() -> None:
    error = refused("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}})
    assert error["param"] == "stream_options" and "`stream`: true" in error["message"]


def test_echo() -> None:
    assert post("/v1/completions", {"prompt": "ab", "echo": True}).json()["choices"][0]["text"] == "abhé!"
    streamed = events(post("/v1/completions", {"prompt": "ab", "echo": True, "stream": True}))
    assert "".join(part["choices"][0]["text"] for part in streamed) == "abhé!"
    assert "drop one" in refused("/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1})["message"]


def test_completion_logprobs() -> None:
    logprobs = post("/v1/completions", {"prompt": "ab", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    # JSON knows no -inf.
    assert logprobs["top_logprobs"][0] == {"h": -0.5, "!": -9999.0}
    assert logprobs["text_offset"][:2] == [0, 1]
    streamed = events(post("/v1/completions", {"prompt": "ab", "logprobs": 2, "stream": True}))
    assert [token for part in streamed for token in part["choices"][0]["logprobs"]["tokens"]] == logprobs["tokens"]


def test_chat() -> None:
    engine = FakeEngine()
    body = post("/v1/chat/completions", {"model": "tiny", "messages": USER}, engine).json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "hé!"}
    assert body["choices"][0]["message"] == message
    ids, params = engine.seen[0]
    assert engine.tokenizer.decode(ids) == "<|user|>hi\n<|assistant|>"
    # A chat may use all the context its prompt leaves.
    assert params.max_tokens is None
    post("/v1/chat/completions", {"messages": USER, "max_completion_tokens": 2}, engine)
    assert engine.seen[1][1].max_tokens == 2


def test_chat_flattens_text_parts_and_continues_a_message() -> None:
    engine = FakeEngine()
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}, engine)
    assert engine.tokenizer.decode(engine.seen[0][0]) == "<|user|>hi\n<|assistant|>"
    begun = [*USER, {"role": "assistant", "content": "Sure"}]
    post("/v1/chat/completions", {"messages": begun, "continue_final_message": True}, engine)
    assert engine.tokenizer.decode(engine.seen[1][0]) == "<|user|>hi\n<|assistant|>Sure"


def test_chat_stream() -> None:
    first, *parts = events(post("/v1/chat/completions", {"messages": USER, "stream": True}))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == "hé!"
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]


def test_chat_logprobs() -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 1}
    content = post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "h",
        "logprob": -0.5,
        "bytes": [104],
        "top_logprobs": [{"token": "h", "logprob": -0.5, "bytes": [104]}],
    }
    assert bytes(byte for item in content for byte in item["bytes"]).decode() == "hé!"
    plain = post("/v1/chat/completions", {"messages": USER, "logprobs": True}).json()["choices"][0]["logprobs"]
    assert plain["content"][0]["top_logprobs"] == []
    assert refused("/v1/chat/completions", {"messages": USER, "top_logprobs": 1})["param"] == "top_logprobs"
    too_many = refused("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 21})
    assert "at most 20 alternatives" in too_many["message"]


def test_no_chat_template_says_the_fix() -> None:
    error = refused("/v1/chat/completions", {"messages": USER}, engine=FakeEngine(template=None))
    assert "no chat template" in error["message"] and "--chat-template FILE" in error["message"]
    engine = FakeEngine(template=None)
    response = call(
        engine, "POST", "/v1/chat/completions", {"messages": USER}, chat_template="{{ messages[0].content }}"
    )
    assert response.status_code == 200
    assert engine.tokenizer.decode(engine.seen[0][0]) == "hi"


def test_template_that_refuses_the_messages() -> None:
    error = refused("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]})
    assert "no tools" in error["message"] and error["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("stream", "yes", '`stream` must be a boolean, not a string ("yes")'),
        ("n", True, "`n` must be an integer, not a boolean (true)"),
        ("model", 3, "`model` must be a string, not an integer (3)"),
        ("messages", "hi", '`messages` must be a list, not a string ("hi")'),
        ("messages", [], "`messages` is empty"),
        ("messages", [{"content": "hi"}], "`messages[0]` must be an object with a string `role`"),
        (
            "messages",
            [{"role": "user", "content": 5}],
            "`messages[0].content` must be a string or a list of text parts",
        ),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "text only"),
        ("tools", [{"type": "function"}], "does not call tools yet"),
        ("response_format", {"type": "json_object"}, "is not supported yet"),
        ("temperature", "hot", "temperature"),
        ("max_tokens", 1.5, "max_tokens"),
    ],
)
def test_wrong_fields_are_named(field: str, value: Any, says: str) -> None:
    assert says in refused("/v1/chat/completions", {"messages": USER, field: value})["message"]


def test_unknown_parameter_is_named_with_the_nearest_known_one() -> None:
    error = refused("/v1/completions", {"prompt": "a", "temprature": 0.1})
    assert "temprature" in error["message"] and "temperature" in error["message"]


def test_null_counts_as_absent_and_other_servers_no_ops_pass() -> None:
    body = {"prompt": "a", "stream": None, "temperature": None, "user": "me", "suffix": None, "best_of": 1}
    assert post("/v1/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "unpaired surrogate"),
    ],
)
def test_broken_bodies(raw: bytes, says: str) -> None:
    assert says in refused("/v1/completions", raw)["message"]


def test_prompt_longer_than_the_context() -> None:
    for stream in (False, True):
        error = refused("/v1/completions", {"prompt": "a" * 100, "stream": stream})
        assert "100 tokens" in error["message"] and str(CONTEXT) in error["message"]


def test_wrong_model_is_a_404() -> None:
    error = refused("/v1/completions", {"prompt": "a", "model": "gpt-5"}, status=404)
    assert error["code"] == "model_not_found" and "'tiny'" in error["message"]


def test_failures_of_the_engine() -> None:
    engine = FakeEngine()
    engine.failure = EngineDeadError("the engine died")
    assert refused("/v1/completions", {"prompt": "a"}, status=500, engine=engine)["type"] == "server_error"
    last = events(post("/v1/completions", {"prompt": "a", "stream": True}, engine))[-1]
    assert last["error"]["message"] == "the engine died"
    engine.failure = KeyError("a defect")
    error = refused("/v1/completions", {"prompt": "a"}, status=500, engine=engine)
    assert "internal error (KeyError)" in error["message"]


def test_unknown_route_and_method() -> None:
    assert "POST /v2/nothing: Not Found" in refused("/v2/nothing", {}, status=404)["message"]
    assert "POST /health: Method Not Allowed" in refused("/health", {}, status=405)["message"]


def test_models() -> None:
    engine = FakeEngine()
    listed = call(engine, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [(card["id"], card["max_model_len"]) for card in listed["data"]] == [("tiny", CONTEXT)]
    assert call(engine, "GET", "/v1/models/tiny").json() == listed["data"][0]
    assert call(engine, "GET", "/v1/models/other").status_code == 404


def test_tokenize_and_back() -> None:
    engine = FakeEngine()
    tokens = post("/tokenize", {"prompt": "hé"}).json()
    assert tokens == {"tokens": engine.tokenizer.encode("hé"), "count": 3, "max_model_len": CONTEXT}
    assert post("/tokenize", {"content": "hé"}).json() == tokens
    assert post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "hé", "content": "hé"}
    chat = post("/tokenize", {"messages": USER}).json()
    assert engine.tokenizer.decode(chat["tokens"]) == "<|user|>hi\n<|assistant|>"
    assert "from 0 to 256, not 257" in refused("/detokenize", {"tokens": [1, 257]})["message"]
    assert "`prompt` is missing" in refused("/tokenize", {})["message"]
    assert "unknown field 'add_special'" in refused("/tokenize", {"prompt": "a", "add_special": True})["message"]


def test_health() -> None:
    engine = FakeEngine()
    assert call(engine, "GET", "/health").status_code == 200
    engine.healthy = False
    assert call(engine, "GET", "/health").status_code == 500


def test_api_key() -> None:
    def status(path: str, header: str | None) -> int:
        headers = {} if header is None else {"Authorization": header}
        return call(FakeEngine(), "GET", path, headers=headers, api_key="sesame").status_code

    assert status("/health", None) == 200
    assert status("/v1/models", "Bearer sesame") == 200
    assert [status("/v1/models", header) for header in (None, "Bearer sesam", "Basic sesame", "sesame")] == [401] * 4
    denied = call(FakeEngine(), "GET", "/metrics", api_key="sesame").json()["error"]
    assert denied["code"] == "invalid_api_key" and "Authorization: Bearer" in denied["message"]


def test_metrics_are_prometheus_text() -> None:
    response = call(FakeEngine(), "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'bitsmith:num_requests_running{model_name="tiny"} 1',
        'bitsmith:kv_cache_free_blocks{model_name="tiny"} 7',
        'bitsmith:generation_tokens_total{model_name="tiny"} 50',
        'bitsmith:request_success_total{model_name="tiny",finished_reason="stop"} 4',
        'bitsmith:time_to_first_token_seconds_bucket{model_name="tiny",le="0.1"} 3',
        'bitsmith:time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"} 5',
        'bitsmith:time_to_first_token_seconds_count{model_name="tiny"} 5',
        "# TYPE bitsmith:time_to_first_token_seconds histogram",
    ):
        assert line in lines
    samples = [line for line in lines if not line.startswith("#")]
    declared = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(any(sample.startswith(name) for name in declared) for sample in samples)


def test_single_tokens_of_sentencepiece_keep_their_space(shared: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("models/stories260k"))
    token_bytes = token_bytes_of(tokenizer)
    # Decoding one by one would lose the space and the parts of the smiley, which is not in the vocabulary.
    ids = tokenizer.encode("Lily saw \N{GRINNING FACE}", add_special_tokens=False)
    assert b"".join(map(token_bytes, ids)) == " Lily saw \N{GRINNING FACE}".encode()
    assert token_bytes(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    assert token_bytes(len(tokenizer) + 5) == b""


def test_presets_reach_both_endpoints() -> None:
    text = "{temperature: 0.3, max_tokens: 2, top_k: {override: 7, force: true}}"
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
        engine = FakeEngine()
        body = {**prompt, "top_k": 1, "temperature": 0.9}
        call(engine, "POST", f"/v1/{path}", body, preset=read_preset(text, "file"))
        ((_, params),) = engine.seen
        assert (params.temperature, params.top_k, params.max_tokens) == (0.9, 7, 2)


def test_unknown_samplers_are_named_with_the_nearest() -> None:
    error = refused("/v1/completions", {"prompt": "a", "sampler_priority": ["temperature", "mn_p"]})
    assert error["message"] == "sampler_priority: unknown sampler 'mn_p': did you mean min_p?"


TRACE = (StepTrace("top_k", 2, 0.25, 1, before=((71, 0.75), (0, 0.2)), after=((71, 1.0),)),)
TRACED = {
    "step": "top_k",
    "removed": 2,
    "removed_mass": 0.25,
    "kept": 1,
    "before": [{"token": "h", "token_id": 71, "prob": 0.75}, {"token": "!", "token_id": 0, "prob": 0.2}],
    "after": [{"token": "h", "token_id": 71, "prob": 1.0}],
}


@pytest.mark.parametrize(
    ("path", "prompt"), [("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})]
)
def test_sampler_traces(path: str, prompt: dict[str, Any]) -> None:
    engine = FakeEngine()
    engine.trace = TRACE
    body = {**prompt, "sampler_trace": True}
    (choice,) = post(f"/v1/{path}", body, engine).json()["choices"]
    assert [token["token_id"] for token in choice["sampler_trace"]] == engine.reply
    assert choice["sampler_trace"][0] == {"token": "h", "token_id": 71, "steps": [TRACED]}
    parts = events(post(f"/v1/{path}", {**body, "stream": True}, engine))
    # Half a character has no text yet, and its trace all the same.
    assert [each for part in parts for each in part["choices"][0]["sampler_trace"]] == choice["sampler_trace"]
    (plain,) = post(f"/v1/{path}", prompt, engine).json()["choices"]
    assert "sampler_trace" not in plain


async def leave_after_first_token(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Drive the application as a server would for a client that leaves after the first token; return what was sent.

    Nothing may be left running: checked here, because the event loop ends what is left when it closes.
    """
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await engine.first_token.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app: Callable[..., Any] = create_app(engine, "tiny")
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": headers,
        "query_string": b"",
        "http_version": "1.1",
    }
    await asyncio.wait_for(app({**scope, "asgi": {"version": "3.0"}, "scheme": "http"}, receive, send), timeout=10)
    assert engine.running == set()
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"), [("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})]
)
def test_client_that_leaves_ends_its_requests(path: str, prompt: dict[str, Any], stream: bool) -> None:
    engine = FakeEngine()
    engine.hold = True
    sent = asyncio.run(leave_after_first_token(engine, f"/v1/{path}", {**prompt, "stream": stream, "n": 3}))
    assert len(engine.seen) == 3
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
