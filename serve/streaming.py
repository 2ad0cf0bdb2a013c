"""Running requests for a client that may leave at any moment.

Every answer is one coroutine that runs beside a watch for the client's departure; whichever ends first cancels the
other. Cancelling closes the engine's iterators, and closing those aborts the requests and frees their blocks. Streams
and plain responses share it, so no path can leave a request running for a client that is gone. (Starlette's own
StreamingResponse leaves a generator unclosed when a send fails.)
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..samplers.params import SamplingParams
from .engine_async import AsyncEngine
from .outputs import StreamChunk

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One answer to generate: prompt, parameters, and the text it starts with (the prompt itself under `echo`)."""

    prompt_ids: list[int]
    params: SamplingParams
    prefix: str = ""


async def run_jobs(
    engine: AsyncEngine, jobs: list[Job], request_id: str
) -> AsyncGenerator[tuple[int, StreamChunk], None]:
    """(index of the job, chunk) as the engine produces them, all jobs at once. Closing this aborts what still runs.

    Raises what the engine's iterators raise: UserError, EngineDeadError.
    """
    queue: asyncio.Queue[tuple[int, StreamChunk] | BaseException] = asyncio.Queue()

    async def pump(index: int, job: Job) -> None:
        async for chunk in engine.generate(f"{request_id}-{index}", job.prompt_ids, job.params):
            queue.put_nowait((index, chunk))

    def report_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
    for task in tasks:
        task.add_done_callback(report_failure)
    try:
        running = len(jobs)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            running -= item[1].finish_reason is not None
            yield item
    finally:
        # A cancelled pump ends its engine iterator at the await it is in, which is what aborts the request.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client left first and `work` was cancelled.

    The request's body must have been read.
    """

    async def departure() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(departure())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: one `data:` line per JSON object, then `[DONE]`. Closes `events` when the client leaves."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        # X-Accel-Buffering: nginx would otherwise hold tokens back until its buffer is full.
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def data(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events):
            async for event in self.events:
                await data(json.dumps(event, ensure_ascii=True))
        await data("[DONE]")
        await send({"type": "http.response.body", "body": b""})
