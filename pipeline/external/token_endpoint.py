"""A server that takes and gives tokens, timed as its client sees it; what its own metrics say of accepted drafts.

Servers of SGLang's kind are asked at POST /generate, others at POST /v1/completions with `return_token_ids`, which
vLLM and this pipeline's own server know.
"""

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from pipeline.errors import PipelineError
from pipeline.external import connections, sglang_api

READ_SECONDS = 600.0
COUNTS = "vllm:spec_decode_num"  # of the engine's drafts, in its metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedAnswer:
    """Holds an answer's tokens, why it ended ("stop" or "length"), and when tokens came, and how many together.

    Times of `arrivals` are seconds since the request was sent.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    arrivals: tuple[tuple[float, int], ...]

    @property
    def first_seconds(self) -> float:
        """The time to the first token."""
        return self.arrivals[0][0]

    @property
    def seconds(self) -> float:
        """The time to the last token."""
        return self.arrivals[-1][0]


@dataclasses.dataclass(frozen=True)
class DraftCounts:
    """Holds a server's counters since it was started: its rounds, and those that accepted at least 1, 2, .. tokens."""

    num_rounds: int
    num_accepted_at_k: tuple[int, ...]


class TokenEndpoint:
    """Asks the server at `url`, without `/v1`. Raises PipelineError when nothing answers there.

    `log` is the file that the log of an sglang-jax server goes to, which alone says what its rounds accepted.
    """

    def __init__(self, url: str, *, api_key: str | None = None, log: Path | None = None) -> None:
        self.url, self._log = url.rstrip("/"), log
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_SECONDS, connect=10.0),
            limits=connections.limits(),
            headers=headers,
            trust_env=False,
        )
        try:
            self._is_sglang = self._client.get(f"{self.url}/get_model_info").status_code == 200
            self._model = None if self._is_sglang else self._client.get(f"{self.url}/v1/models").json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            self._client.close()
            raise PipelineError(f"{url} is no server of this kind: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_token_ids: Sequence[int]) -> TimedAnswer:
        """Returns the greedy answer to a prompt; raises PipelineError when the server gives none."""
        if self._is_sglang:
            path = "/generate"
            body = sglang_api.generate_body(prompt_ids, max_new_tokens, stop_token_ids, {"temperature": 0.0})
        else:
            path = "/v1/completions"
            body = {"model": self._model, "prompt": list(prompt_ids), "max_tokens": max_new_tokens, "temperature": 0}
            body |= {"stream": True, "return_token_ids": True, "stop_token_ids": list(stop_token_ids)}
        try:
            return self._timed(path, body, max_new_tokens, stop_token_ids)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise PipelineError(f"{self.url} gives no answer: {type(error).__name__}: {error}") from error

    def counts(self) -> DraftCounts | None:
        """Returns what the server says of its drafts, by vLLM's names or in its log; None when it says nothing."""
        if self._log is not None:
            return counts_in_log(self._log.read_text(errors="replace"))
        reply = self._client.get(f"{self.url}/metrics")
        return counts_in_metrics(reply.text) if reply.status_code == 200 else None

    def _timed(self, path: str, body: dict[str, Any], most: int, stops: Sequence[int]) -> TimedAnswer:
        started = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        tokens: list[int] = []
        reason = None
        with self._client.stream("POST", self.url + path, json=body) as reply:
            if reply.status_code != 200:
                text = reply.read().decode(errors="replace")[:500]
                raise PipelineError(f"{self.url}{path} answers {reply.status_code}: {text}")
            for line in reply.iter_lines():
                found = self._read(line, tokens, most, stops)
                if found is None:
                    continue
                num_before, (tokens, reason) = len(tokens), found
                if len(tokens) > num_before:
                    arrivals.append((time.perf_counter() - started, len(tokens) - num_before))
                if reason is not None:
                    break
        if reason is None:
            raise PipelineError(f"the answer of {self.url} broke off after {len(tokens)} tokens")
        if not arrivals:
            arrivals.append((time.perf_counter() - started, 0))
        return TimedAnswer(token_ids=tuple(tokens), finish_reason=reason, arrivals=tuple(arrivals))

    def _read(
        self, line: str, tokens: list[int], most: int, stops: Sequence[int]
    ) -> tuple[list[int], str | None] | None:
        if self._is_sglang:
            return sglang_api.tokens_of(line, most, stops)
        if not line.startswith(sglang_api.EVENT + "{"):
            return None
        event = json.loads(line.removeprefix(sglang_api.EVENT))
        if "error" in event:
            raise PipelineError(f"{self.url}: {event['error']}")
        for choice in event["choices"]:
            return [*tokens, *(choice.get("token_ids") or [])], choice.get("finish_reason")
        return None


def counts_in_metrics(text: str) -> DraftCounts | None:
    """Returns the counters of speculative decoding in a Prometheus exposition, by vLLM's names; None without any."""
    rounds = re.search(rf"^{COUNTS}_drafts(?:_total)?\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    pattern = rf'^{COUNTS}_accepted_tokens_per_pos(?:_total)?\{{[^}}]*position="(\d+)"[^}}]*\}} (\S+)$'
    found = {int(position): int(float(value)) for position, value in re.findall(pattern, text, re.MULTILINE)}
    if rounds is None or not found:
        return None
    return DraftCounts(int(float(rounds[1])), tuple(found.get(index, 0) for index in range(max(found) + 1)))


def counts_in_log(text: str) -> DraftCounts | None:
    """Returns the rounds in the log of an sglang-jax server that logs every one (`--decode-log-interval 1`).

    A line is a round of every running request and has their mean, so that counts are those of one request at a time.
    """
    lengths = [round(float(value)) for value in re.findall(r"Decode batch.*?accept-len ([\d.]+)", text)]
    if not lengths:
        return None
    most = max(lengths) - 1
    at_k = tuple(sum(length > index for length in lengths) for index in range(1, most + 1))
    return DraftCounts(len(lengths), at_k)
