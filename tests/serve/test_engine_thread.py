import asyncio
import threading

import pytest

from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.serve.engine_thread import EngineThread, Unavailable
from tests.support.fake_engine import FakeEngine

STOP = 9


def request(name: str, prompt=(1, 2), count: int = 50) -> Request:
    return Request(request_id=name, prompt_ids=prompt, max_new_tokens=count)


@pytest.fixture
def engine():
    return FakeEngine(lambda request: [*range(100, 108), STOP], [STOP])


@pytest.fixture
def worker(engine):
    worker = EngineThread(engine)
    worker.start()
    yield worker
    assert worker.stop(5.0)
    assert not any(thread.name == "engine" for thread in threading.enumerate())


async def tokens(stream) -> dict[str, list[int]]:
    found = {}
    async for update in stream.updates():
        found.setdefault(update.request_id, []).extend(update.token_ids)
    return found


def test_requests_submitted_together_come_back_in_one_stream(worker):
    async def main():
        return await tokens(await worker.submit([request("a"), request("b", count=4)]))

    assert asyncio.run(main()) == {"a": [*range(100, 108), STOP], "b": [100, 101, 102, 103]}


def test_one_refused_request_keeps_all_of_its_submission_out(worker, engine):
    async def main():
        with pytest.raises(PipelineError, match="does not fit"):
            await worker.submit([request("a"), request("b", count=1000)])
        return await tokens(await worker.submit([request("a")]))

    assert list(asyncio.run(main())) == ["a"]
    assert not engine.has_work


def test_a_cancelled_request_ends_in_the_engine_and_the_others_go_on(worker, engine):
    engine.step_seconds = 0.02

    async def main():
        stream = await worker.submit([request("a"), request("b")])
        found = {}
        async for update in stream.updates():
            found.setdefault(update.request_id, []).extend(update.token_ids)
            stream.cancel("a")
        return found

    found = asyncio.run(main())
    assert found["b"] == [*range(100, 108), STOP]
    assert len(found["a"]) < 9
    assert engine.cancelled == ["a"]


def test_a_failing_step_fails_open_and_later_requests_with_its_reason(worker, engine):
    async def main():
        engine.failure = RuntimeError("out of memory")
        stream = await worker.submit([request("a")])
        with pytest.raises(Unavailable, match=r"RuntimeError: out of memory.*restart"):
            await tokens(stream)
        with pytest.raises(Unavailable, match="out of memory"):
            await worker.submit([request("b")])

    asyncio.run(main())
    assert worker.failure == "RuntimeError: out of memory"


def test_a_failure_while_a_request_is_added_reaches_it(worker, engine, monkeypatch):
    def broken(_requests):
        raise RuntimeError("no device")

    monkeypatch.setattr(engine, "add_all", broken)

    async def main():
        with pytest.raises(Unavailable, match="no device"):
            await asyncio.wait_for(worker.submit([request("a")]), 5)

    asyncio.run(main())


def test_stopping_ends_open_requests(worker, engine):
    engine.step_seconds = 0.02

    async def main():
        stream = await worker.submit([request("a")])
        assert await asyncio.to_thread(worker.stop, 5.0)
        with pytest.raises(Unavailable, match="shutting down"):
            await tokens(stream)

    asyncio.run(main())


def test_a_listener_whose_loop_is_gone_does_not_stop_the_others(worker, engine):
    engine.step_seconds = 0.01

    async def leave():
        await worker.submit([request("a")])

    asyncio.run(leave())

    async def main():
        return await tokens(await worker.submit([request("b")]))

    assert asyncio.run(main()) == {"b": [*range(100, 108), STOP]}
