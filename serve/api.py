"""The HTTP server's application: OpenAI's routes, token counting, health and metrics over an `AsyncEngine`.

Errors, our own and the framework's, all take OpenAI's shape. Bodies are read by serve/openai_types.py rather than by
pydantic models: the sampling parameters are declared once, in samplers/params.py, and a wrong field must come back as
a 400 that explains it.
"""

import contextlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..errors import UserError
from .chat import chat_prompt_ids
from .engine_async import AsyncEngine, EngineDeadError
from .metrics import CONTENT_TYPE, prometheus
from .openai_format import CHAT, COMPLETION, Choice, Json, Reply, Shape
from .openai_types import (
    Generation,
    RequestError,
    parse_body,
    parse_chat,
    parse_completion,
    refuse_rest,
    take,
    take_chat,
)
from .presets import Preset
from .streaming import EventStream, Job, run_jobs, until_disconnect
from .token_text import TokenBytes, token_bytes_of

# What nginx logs for a client that closed the connection; nobody is left to read it.
CLIENT_GONE = 499


class BearerAuth:
    """ASGI middleware: `Authorization: Bearer KEY` on every route but /health, the key compared in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.expected = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.expected):
                message = "missing or wrong API key: send the header `Authorization: Bearer KEY`"
                await error_response(message, 401, code="invalid_api_key")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def error_object(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(message: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    """OpenAI's error object as a response."""
    return JSONResponse(error_object(message, status, param, code), status_code=status)


@dataclass(frozen=True)
class Server:
    """What the routes work with: an engine, the name it is served under, how chats become prompts, and presets."""

    engine: AsyncEngine
    model: str
    chat_template: str | None
    token_bytes: TokenBytes
    preset: Preset

    def check_model(self, wanted: str | None) -> None:
        """RequestError (404) if a request names another model; one that names none means this one."""
        if wanted not in (None, self.model):
            message = f"the model {wanted!r} does not exist; this server has {self.model!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")

    def encode(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt that may already be token ids."""
        if isinstance(prompt, str):
            return list(self.engine.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
        return prompt

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return str(self.engine.tokenizer.decode(tokens, skip_special_tokens=False))

    def job(self, generation: Generation, prompt_ids: list[int], choice: int, prefix: str = "") -> Job:
        """One checked answer to generate."""
        params = generation.params(choice)
        self.engine.check_request(prompt_ids, params)
        return Job(prompt_ids, params, prefix)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        parsed = parse_completion(self.preset.apply(parse_body(await request.body())))
        self.check_model(parsed.generation.model)
        jobs = []
        for prompt in parsed.prompts:
            ids = self.encode(prompt, parsed.add_special_tokens)
            prefix = "" if not parsed.echo else prompt if isinstance(prompt, str) else self.decode(prompt)
            jobs += [self.job(parsed.generation, ids, i, prefix) for i in range(parsed.generation.n)]
        return await self._answer(request, COMPLETION, parsed.generation, jobs)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        generation, chat = parse_chat(self.preset.apply(parse_body(await request.body())))
        self.check_model(generation.model)
        ids = chat_prompt_ids(self.engine.tokenizer, chat, self.chat_template)
        jobs = [self.job(generation, ids, i) for i in range(generation.n)]
        return await self._answer(request, CHAT, generation, jobs)

    async def _answer(self, request: Request, shape: Shape, generation: Generation, jobs: list[Job]) -> Response:
        first = jobs[0].params
        reply = Reply.new(shape, self.model, self.token_bytes, first.logprobs is not None, first.sampler_trace)
        prompts = len(jobs) // generation.n
        if generation.stream:
            return EventStream(self._events(reply, jobs, prompts, generation.include_usage))
        choices = await until_disconnect(request.receive, self._collect(reply, jobs))
        if choices is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(reply.whole(choices, prompts))

    async def _collect(self, reply: Reply, jobs: list[Job]) -> list[Choice]:
        choices = [Choice(index, [job.prefix]) for index, job in enumerate(jobs)]
        async with contextlib.aclosing(run_jobs(self.engine, jobs, reply.id)) as chunks:
            async for index, chunk in chunks:
                choices[index].add(chunk)
        return choices

    async def _events(
        self, reply: Reply, jobs: list[Job], prompts: int, include_usage: bool
    ) -> AsyncGenerator[Json, None]:
        choices = [Choice(index, []) for index in range(len(jobs))]
        # OpenAI sends a null usage with every event before the one that has it.
        extra: Json = {"usage": None} if include_usage else {}
        for choice, job in zip(choices, jobs, strict=True):
            if opening := reply.opening(choice, job.prefix):
                yield opening | extra
        try:
            async with contextlib.aclosing(run_jobs(self.engine, jobs, reply.id)) as chunks:
                async for index, chunk in chunks:
                    choices[index].add(chunk)
                    if event := reply.part(choices[index], chunk):
                        yield event | extra
        except (UserError, EngineDeadError) as error:
            # The status went out as 200 long ago; OpenAI's clients look for an error object among the events.
            yield error_object(str(error), 400 if isinstance(error, UserError) else 500)
            return
        if include_usage:
            yield reply.usage(choices, prompts)

    async def tokenize(self, request: Request) -> Json:
        """POST /tokenize: ids of `prompt` (llama.cpp's `content` too), or of `messages` through the template."""
        body = parse_body(await request.body())
        self.check_model(take(body, "model", str, None))
        if "messages" in body:
            ids = chat_prompt_ids(self.engine.tokenizer, take_chat(body), self.chat_template)
        else:
            text = take(body, "content" if "content" in body else "prompt", str)
            ids = self.encode(text, take(body, "add_special_tokens", bool, True))
        refuse_rest(body)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.max_model_len}

    async def detokenize(self, request: Request) -> Json:
        """POST /detokenize: the text of `tokens`, under vLLM's name and llama.cpp's."""
        body = parse_body(await request.body())
        self.check_model(take(body, "model", str, None))
        tokens = take(body, "tokens", list)
        refuse_rest(body)
        size = len(self.engine.tokenizer)
        if bad := [token for token in tokens if type(token) is not int or not 0 <= token < size]:
            raise RequestError(f"`tokens` must be integers from 0 to {size - 1}, not {bad[0]!r}", "tokens")
        text = self.decode(tokens)
        return {"prompt": text, "content": text}


def create_app(
    engine: AsyncEngine,
    model: str,
    api_key: str | None = None,
    chat_template: str | None = None,
    preset: Preset | None = None,
) -> FastAPI:
    """The application serving `engine` as `model`.

    engine: starts with the application and is shut down with it, which ends the requests still running.
    api_key: what clients must send as a bearer token; None: no authentication.
    chat_template: Jinja source that replaces the tokenizer's own.
    preset: sampling parameters that requests get where they send none, or in any case.
    """
    server = Server(engine, model, chat_template, token_bytes_of(engine.tokenizer), preset or Preset())
    card = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "bitsmith",
        "max_model_len": engine.max_model_len,
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.shutdown()

    app = FastAPI(title="bitsmith", version=__version__, lifespan=lifespan)
    if api_key is not None:
        app.add_middleware(BearerAuth, key=api_key)
    for path, handler in (
        ("/v1/completions", server.completion),
        ("/v1/chat/completions", server.chat),
        ("/tokenize", server.tokenize),
        ("/detokenize", server.detokenize),
    ):
        app.post(path, response_model=None)(handler)

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model_card(name: str) -> Json:
        server.check_model(name)
        return card

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if engine.is_healthy():
            return JSONResponse({"status": "ok"})
        return error_response("the engine has died; its traceback is in the server's log", 500)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus(engine.stats(), model), media_type=CONTENT_TYPE)

    _shape_errors(app)
    return app


def _shape_errors(app: FastAPI) -> None:
    """Give every failure OpenAI's error object."""

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        if isinstance(error, RequestError):
            return error_response(str(error), error.status, error.param, error.code)
        return error_response(str(error), 400)

    @app.exception_handler(EngineDeadError)
    async def engine_dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(str(error), 500)

    @app.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}; the routes are listed at /docs"
        return error_response(detail, error.status_code)

    # Starlette logs the traceback and raises it again after this response is sent.
    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return error_response(f"internal error ({type(error).__name__}); its traceback is in the server's log", 500)
