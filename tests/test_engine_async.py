"""AsyncEngine: chunks reach their request, and whoever leaves, fails or shuts down leaves nothing running."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.engine_async import AsyncEngine, EngineDeadError
from bitsmith.serve.llm import LLM
from bitsmith.serve.outputs import StreamChunk
from bitsmith.serve.runner import Work

MakeLLM = Callable[..., LLM]


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **options})


# After the first chunk; the engine may or may not have begun its second step.
ABORTED = (["abort"], [None, "abort"])


async def collect(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams) -> list[StreamChunk]:
    return [chunk async for chunk in engine.generate(name, prompt, params)]


async def until(condition: Callable[[], object]) -> None:
    """Let the engine's thread run until `condition` holds; fails after ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def serving(llm: LLM) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(llm.engine)
    try:
        yield engine
    finally:
        engine.shutdown()


def test_concurrent_streams_equal_offline_generation(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompts = [[3 + n] * (n + 1) for n in range(6)]
    params = greedy(max_tokens=10, logprobs=1)
    want = llm.generate(prompts, params)

    async def go() -> None:
        async with serving(llm) as engine:
            streams = await asyncio.gather(*(collect(engine, f"r{i}", ids, params) for i, ids in enumerate(prompts)))
        for chunks, output in zip(streams, want, strict=True):
            assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
            assert "".join(chunk.text_delta for chunk in chunks) == output.text
            assert [entry for chunk in chunks for entry in chunk.logprobs] == output.logprobs
            assert [chunk.finish_reason for chunk in chunks][:-1] == [None] * (len(chunks) - 1)
            assert chunks[-1].finish_reason == output.finish_reason

    asyncio.run(go())


@pytest.mark.parametrize("how", ["close", "cancel", "drop"])
def test_leaving_a_stream_frees_its_blocks(how: str, make_llm: MakeLLM) -> None:
    permits = threading.Semaphore(1)

    async def go() -> None:
        async with serving(make_llm("x" * 50, permits)) as engine:
            stream = engine.generate("r", [1, 2], greedy())
            assert (await anext(stream)).text_delta == "x"
            # The engine cannot finish its second step yet.
            if how == "close":
                await stream.aclose()
            elif how == "cancel":
                task = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                task.cancel()
            del stream
            gc.collect()
            await until(lambda: engine._mailbox or engine.stats()["running"] == 0)
            permits.release(100)
            await until(lambda: engine.stats()["running"] == 0)
            assert engine.stats()["finished"] == {"stop": 0, "length": 0, "repetition": 0, "abort": 1}
            assert engine.stats()["blocks_free"] == 64

    asyncio.run(go())


def test_abort_from_outside_ends_the_stream(make_llm: MakeLLM) -> None:
    permits = threading.Semaphore(1)

    async def go() -> None:
        async with serving(make_llm("x" * 50, permits)) as engine:
            stream = engine.generate("r", [1], greedy())
            await anext(stream)
            engine.abort("r")
            engine.abort("unknown")
            permits.release(100)
            assert [chunk.finish_reason async for chunk in stream] in ABORTED

    asyncio.run(go())


def test_shutdown_ends_requests(make_llm: MakeLLM) -> None:
    permits = threading.Semaphore(1)

    async def go() -> None:
        engine = AsyncEngine(make_llm("x" * 50, permits).engine)
        stream = engine.generate("r", [1], greedy())
        await anext(stream)
        stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
        await until(lambda: engine._stopping)
        permits.release(100)
        assert [chunk.finish_reason async for chunk in stream] in ABORTED
        await stopping
        engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine, "s", [1], greedy())

    asyncio.run(go())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_reaches_every_request(make_llm: MakeLLM) -> None:
    llm = make_llm("x" * 50)

    def fail(work: Sequence[Work]) -> torch.Tensor:
        raise ZeroDivisionError("in the forward")

    async def go() -> None:
        async with serving(llm) as engine:
            streams = [engine.generate(name, [1], greedy()) for name in "ab"]
            for stream in streams:
                await anext(stream)
            llm.engine.runner.run = fail
            for stream in streams:
                with pytest.raises(EngineDeadError, match=r"ZeroDivisionError\('in the forward'\)") as caught:
                    async with asyncio.timeout(10):
                        [chunk async for chunk in stream]
                assert isinstance(caught.value.__cause__, ZeroDivisionError)
            assert not engine.is_healthy()
            with pytest.raises(EngineDeadError):
                await collect(engine, "later", [1], greedy())

    asyncio.run(go())


def test_bad_requests_reach_only_their_caller(make_llm: MakeLLM) -> None:
    permits = threading.Semaphore(1)

    async def go() -> None:
        async with serving(make_llm("abc", permits)) as engine:
            stream = engine.generate("r", [1], greedy())
            await anext(stream)
            with pytest.raises(UserError, match="the prompt has 70 tokens"):
                await collect(engine, "long", [1] * 70, greedy())
            with pytest.raises(UserError, match="request_id 'r' is already running"):
                await collect(engine, "r", [1], greedy())
            permits.release(100)
            assert [chunk.finish_reason async for chunk in stream] == [None, None, "stop"]
            assert engine.is_healthy() and engine.max_model_len == 64 and engine.eos_token_ids == {256}

    asyncio.run(go())


def test_a_closed_event_loop_aborts_its_requests(make_llm: MakeLLM) -> None:
    permits = threading.Semaphore(1)
    engine = AsyncEngine(make_llm("x" * 50, permits).engine)
    loop = asyncio.new_event_loop()
    stream = engine.generate("orphan", [1], greedy())
    loop.run_until_complete(anext(stream))
    loop.close()
    permits.release(100)

    async def go() -> None:
        await until(lambda: engine.stats()["running"] == 0)
        assert engine.stats()["finished"]["abort"] == 1
        assert (await collect(engine, "next", [1], greedy(max_tokens=2)))[-1].finish_reason == "length"

    asyncio.run(go())
    engine.shutdown()
