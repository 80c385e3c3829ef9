"""Another program's engine behind this server: the gateway of `serve.gateway`.

Requests go out as tokens and come back as tokens (SGLang's and sglang-jax's POST /generate), so that everything that
this server does around an engine, from chat templates to tool calls and limits, is the same. The program's engine is
greedy with a draft: what asks for more goes to a plain arm, where there is one, or is refused by name.
"""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.block_choice import Estimate
from pipeline.engine.config import EngineConfig
from pipeline.engine.in_flight import EngineTimes
from pipeline.engine.request import Request, StepUpdate
from pipeline.engine.request_check import require_runnable
from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.external import connections, sglang_api

STEP_SECONDS = 0.05  # that a step waits for news; a new request or a cancellation waits as long
CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0


class RemoteEngine:
    """Runs requests on the engine at `url`, which drafts and is greedy; others on the one at `plain_url`, if any.

    It has the interface of `ServedEngine`. Tokens behind a request's length are cut, for a round of the other program
    may go past it, and the stop token that ended an answer, which it leaves out, is added.
    """

    def __init__(self, url: str, config: EngineConfig, vocab_size: int, *, plain_url: str | None = None) -> None:
        self.config, self.num_preempted = config, 0
        self.block_size: int | None = None
        self._url, self._plain_url, self._vocab_size = url, plain_url, vocab_size
        self._times = EngineTimes()
        self._open: dict[str, Request] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of the loop's own thread
        self._news: queue.SimpleQueue[StepUpdate] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=connections.limits(),
            trust_env=False,
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()

    @property
    def acceptance(self) -> Acceptance:
        """Nothing: the other program does not say what a request's rounds accepted."""
        return acceptance.empty(1)

    @property
    def smaller_blocks(self) -> Mapping[int, Acceptance]:
        """Nothing, as for `acceptance`."""
        return {}

    @property
    def times(self) -> EngineTimes:
        """The tokens that came back, and the seconds in which any request was open."""
        return self._times

    @property
    def block_estimates(self) -> Mapping[int, Estimate]:
        """Nothing: the other program chooses."""
        return {}

    @property
    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._open)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the target knows."""
        return self._vocab_size

    @property
    def num_running(self) -> int:
        """The number of open requests, up to the other program's number of slots."""
        return min(len(self._open), self.config.num_slots)

    @property
    def num_waiting(self) -> int:
        """The number of open requests above the other program's number of slots."""
        return len(self._open) - self.num_running

    @property
    def num_pages(self) -> int:
        """One: the other program's pages are its own."""
        return 1

    @property
    def num_free_pages(self) -> int:
        """One, as for `num_pages`."""
        return 1

    def add_all(self, requests: Sequence[Request]) -> None:
        """Sends requests, all or none; raises PipelineError when one cannot be run there."""
        bodies = [(request, *self._destination(request)) for request in requests]
        for request, url, body in bodies:
            self._open[request.request_id] = request
            self._loop.call_soon_threadsafe(self._start, request, url, body)

    def cancel(self, request_id: str) -> None:
        """Breaks a request off: its connection is closed, and the other program stops."""
        if self._open.pop(request_id, None) is not None:
            self._loop.call_soon_threadsafe(self._stop, request_id)

    def close(self) -> None:
        """Breaks off what is open and closes all connections."""
        self._open.clear()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def step(self) -> list[StepUpdate]:
        """Waits a little for news and returns all there are."""
        started, updates = time.monotonic(), []
        with contextlib.suppress(queue.Empty):
            updates.append(self._taken(self._news.get(timeout=STEP_SECONDS)))
            while True:
                updates.append(self._taken(self._news.get_nowait()))
        found = [one for one in updates if one is not None]
        self._times = dataclasses.replace(
            self._times,
            decode_tokens=self._times.decode_tokens + sum(len(one.token_ids) for one in found),
            decode_seconds=self._times.decode_seconds + time.monotonic() - started,
        )
        return found

    def _taken(self, item: StepUpdate) -> StepUpdate | None:
        if item.request_id not in self._open:
            return None  # broken off meanwhile
        if item.finish_reason is not None:
            del self._open[item.request_id]
        return item

    def _destination(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Returns where a request goes and what is sent; raises PipelineError when it cannot be run."""
        require_runnable(request, dataclasses.replace(self.config, samples=True), self._vocab_size)
        if request.request_id in self._open:
            raise PipelineError(f"request id {request.request_id!r} is already in use")
        sampling = request.sampling
        unknown = {
            "response_format and tools that must be called": request.grammar is not None,
            "logprobs": sampling.logprobs is not None,
            "prompt_logprobs": sampling.prompt_logprobs is not None,
        }
        refused = [name for name, is_asked in unknown.items() if is_asked]
        if refused:
            raise PipelineError(f"the engine behind this gateway cannot do {', '.join(refused)}; leave it out")
        if sampling.is_plainly_greedy:
            return self._url, self._body(request, {"temperature": 0.0})
        if self._plain_url is None:
            raise PipelineError(
                "the engine behind this gateway decodes greedily with its draft, and the request asks for "
                f"{', '.join(_not_greedy(sampling))}; send temperature 0 without them, or start the gateway with "
                "serve.plain_url, the address of an engine without a draft"
            )
        return self._plain_url, self._body(request, _sampling_of(sampling))

    def _body(self, request: Request, sampling: dict[str, Any]) -> dict[str, Any]:
        stops = self._stops_of(request)
        body = sglang_api.generate_body(request.prompt_ids, request.max_new_tokens, stops, sampling)
        return body | {"rid": request.request_id}

    def _stops_of(self, request: Request) -> tuple[int, ...]:
        wanted = request.sampling.stop_token_ids
        return self.config.stop_token_ids if wanted is None else wanted

    def _start(self, request: Request, url: str, body: dict[str, Any]) -> None:
        if request.request_id in self._open:
            self._tasks[request.request_id] = self._loop.create_task(self._run(request, url, body))

    def _stop(self, request_id: str) -> None:
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def _run(self, request: Request, url: str, body: dict[str, Any]) -> None:
        """Puts a request's updates among the news, or the error that ended it."""
        try:
            async with contextlib.aclosing(self._updates(request, url, body)) as updates:
                async for update in updates:
                    self._news.put(update)
        except (httpx.HTTPError, PipelineError, ValueError, KeyError) as error:
            failure = f"the engine behind this gateway, at {url}, has failed: {type(error).__name__}: {error}"
            self._news.put(
                StepUpdate(request_id=request.request_id, token_ids=(), finish_reason="error", failure=failure)
            )
        finally:
            self._tasks.pop(request.request_id, None)

    async def _updates(self, request: Request, url: str, body: dict[str, Any]) -> AsyncGenerator[StepUpdate, None]:
        num_known = 0
        async with self._client.stream("POST", f"{url}/generate", json=body) as reply:
            if reply.status_code != 200:
                text = (await reply.aread()).decode(errors="replace")[:500]
                raise PipelineError(f"HTTP {reply.status_code}: {text}")
            async for line in reply.aiter_lines():
                found = sglang_api.tokens_of(line, request.max_new_tokens, self._stops_of(request))
                if found is None:
                    continue
                known, reason = found
                new = tuple(known[num_known:])
                num_known = max(num_known, len(known))
                if new or reason is not None:
                    yield StepUpdate(request_id=request.request_id, token_ids=new, finish_reason=reason)
                if reason is not None:
                    return
        raise PipelineError("its answer broke off")


def _not_greedy(sampling: SamplingParams) -> list[str]:
    default = SamplingParams()
    names = [field.name for field in dataclasses.fields(sampling) if field.name not in ("stop_token_ids", "key")]
    return [name for name in names if getattr(sampling, name) != getattr(default, name)]


def _sampling_of(sampling: SamplingParams) -> dict[str, Any]:
    """Returns what the other program's plain arm gets; its names are SGLang's."""
    names = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    found: dict[str, Any] = {name: getattr(sampling, name) for name in names}
    found |= {"top_k": sampling.top_k or -1, "min_new_tokens": sampling.min_tokens}
    found["sampling_seed"] = sampling.key[0] & 0x7FFFFFFF
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return found
