"""The engine for asyncio callers: one background thread steps it, coroutines receive their chunks through queues.

Only the thread touches the engine. Coroutines hand it requests and aborts through a mailbox and never wait for a
step; chunks travel back with `call_soon_threadsafe`. Closing or cancelling an iterator aborts its request. An
exception in the loop is a defect: it ends every request with EngineDeadError, is printed by the thread, and no later
request is accepted.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..samplers.params import SamplingParams
from .engine import Engine
from .outputs import StreamChunk


class EngineDeadError(RuntimeError):
    """The engine thread died of the exception in `__cause__`; every request gets this, and /health answers 500."""


@dataclass(frozen=True)
class _Stream:
    """Where the chunks of one request go."""

    loop: asyncio.AbstractEventLoop
    chunks: asyncio.Queue[StreamChunk | None] = field(default_factory=asyncio.Queue)  # None: the engine is dead


@dataclass(frozen=True)
class _Add:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float  # time.perf_counter()


class AsyncEngine:
    """Owns `engine` from the first request to `shutdown()`; nothing else may call the engine in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[str, _Stream] = {}
        self._mailbox: deque[_Add | str] = deque()  # a str is the id of a request to abort
        self._wake = threading.Condition()  # guards everything above and below
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._error: BaseException | None = None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._engine.max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion unless the request ignores them."""
        return self._engine.eos_token_ids

    def start(self) -> None:
        """Start the thread.

        The first `generate` does it too; idempotent. EngineDeadError after a failure or shutdown.
        """
        with self._wake:
            self._check_alive()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bitsmith-engine", daemon=True)
                self._thread.start()

    def shutdown(self) -> None:
        """End all requests with finish_reason "abort" and join the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def check_request(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """UserError if this request could never run (empty prompt, longer than the context, ...).

        Call before streaming starts.
        """
        self._engine.check_request(prompt_ids, params)

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[StreamChunk, None]:
        """Yield chunks until one has a finish_reason.

        Closing or cancelling this iterator aborts the request and frees its blocks.

        Raises, on the first step, UserError (bad request, or request_id already running), and EngineDeadError if the
        loop failed.
        """
        self.check_request(prompt_ids, params)
        self.start()
        stream = _Stream(asyncio.get_running_loop())
        with self._wake:
            self._check_alive()
            if request_id in self._streams:
                raise UserError(f"request_id {request_id!r} is already running; give every request an id of its own")
            self._streams[request_id] = stream
            self._mailbox.append(_Add(request_id, prompt_ids, params, time.perf_counter()))
            self._wake.notify()
        try:
            finished = False
            while not finished:
                chunk = await stream.chunks.get()
                if chunk is None:
                    raise EngineDeadError(f"the engine died: {self._error!r}") from self._error
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            with self._wake:
                if self._streams.get(request_id) is stream:
                    self._mailbox.append(request_id)
                    self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request from outside; its iterator yields a last chunk with finish_reason "abort".

        Unknown ids are ignored.
        """
        with self._wake:
            if request_id in self._streams:
                self._mailbox.append(request_id)
                self._wake.notify()

    def is_healthy(self) -> bool:
        """False once the loop has died."""
        return self._error is None

    def stats(self) -> dict[str, Any]:
        """Counters and gauges for /metrics; see serve.stats. Cheap, callable from any thread."""
        return self._engine.stats()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine died: {self._error!r}") from self._error
        if self._stopping:
            raise EngineDeadError("the engine was shut down")

    def _run(self) -> None:
        try:
            while self._take_mail():
                self._deliver(self._engine.step())
            self._deliver([(key, chunk) for key in list(self._streams) if (chunk := self._engine.abort(key))])
        except BaseException as error:
            with self._wake:
                self._error = error
                streams, self._streams = self._streams, {}
            for stream in streams.values():
                self._post([(stream, None)], stream.loop)
            raise

    def _take_mail(self) -> bool:
        """Wait until there is work and apply the mail. False when shutting down."""
        with self._wake:
            self._wake.wait_for(lambda: self._mailbox or self._stopping or self._engine.has_work())
            # Both at once: a request accepted before the stop is in this mail, and none is accepted after it.
            mail, self._mailbox, stopping = self._mailbox, deque(), self._stopping
        ended: list[tuple[str, StreamChunk]] = []
        for item in mail:
            if isinstance(item, _Add):
                self._engine.add_request(item.request_id, item.prompt_ids, item.params, item.arrival)
            elif chunk := self._engine.abort(item):
                ended.append((item, chunk))
        self._deliver(ended)
        return not stopping

    def _deliver(self, chunks: list[tuple[str, StreamChunk]]) -> None:
        """Hand the chunks over, one wake-up per event loop."""
        per_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, StreamChunk | None]]] = {}
        with self._wake:
            for request_id, chunk in chunks:
                stream = self._streams[request_id]
                if chunk.finish_reason is not None:
                    del self._streams[request_id]
                per_loop.setdefault(stream.loop, []).append((stream, chunk))
        for loop, items in per_loop.items():
            self._post(items, loop)

    def _post(self, items: list[tuple[_Stream, StreamChunk | None]], loop: asyncio.AbstractEventLoop) -> None:
        def put() -> None:
            for stream, chunk in items:
                stream.chunks.put_nowait(chunk)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:
            # The event loop was closed under its requests: nobody can read the chunks, so what still runs is aborted.
            with self._wake:
                gone = [key for key, stream in self._streams.items() if stream.loop is loop]
                self._mailbox.extend(gone)
