"""Fetches answers from an OpenAI-compatible endpoint, several at once; saves every reply and reports every failure."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from pipeline.artifacts.hashing import fingerprint_of
from pipeline.engine.request import Completion
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from pipeline.teacher_cache.answer import AnsweredPrompt, FailedPrompt, finished
from pipeline.teacher_cache.answer_reader import AnswerReader, BadAnswer
from pipeline.teacher_cache.endpoint_replies import RequestTemplate, reply_fields, reply_tokens
from pipeline.teacher_cache.failures import are_too_many, failure_error, log_failures
from pipeline.teacher_cache.render import RenderedPrompt
from pipeline.teacher_cache.reply_log import ReplyLog

log = logging.getLogger("pipeline")

NO_CONNECTION = "no connection"
NO_KEY = "none"  # sent to endpoints that need no key
FIRST_FAILURES = 16  # after this many failures without one answer, none is expected
REASON_CHARACTERS = 300
RESUME_HINT = "the answers that came are kept: run the same command to go on"
STATUS_HINTS = {
    401: "set the environment variable named by teacher_cache.openai.api_key_env to a valid key",
    403: "use a key that may use this model",
    404: "check teacher_cache.openai.url (it ends in /v1 as a rule) and teacher_cache.openai.model",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Holds where and how requests are sent; `key` is None for an endpoint that needs no key."""

    url: str
    key: str | None = dataclasses.field(repr=False)
    concurrency: int
    timeout_seconds: float
    retries: int

    def client(self) -> openai.AsyncOpenAI:
        """Returns a client that tries again after 408, 409, 429, 5xx, timeouts and lost connections.

        It waits as long as a Retry-After header says, otherwise 0.5, 1, 2, 4 and then 8 seconds.
        """
        return openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key or NO_KEY, timeout=self.timeout_seconds, max_retries=self.retries
        )

    def redacted(self, text: str) -> str:
        """Returns a text without the key, shortened to REASON_CHARACTERS."""
        text = text.replace(self.key, "(key)") if self.key else text
        return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


class EndpointClient:
    """Gets answers to prompts from an endpoint; replies in the log at `path` are not requested again."""

    def __init__(self, endpoint: Endpoint, template: RequestTemplate, reader: AnswerReader, path: Path) -> None:
        self._endpoint, self._template, self._reader, self._path = endpoint, template, reader, path
        self._entries: dict[str, dict[str, Any]] = {}

    def fetch(self, rows: Sequence[RenderedPrompt]) -> None:
        """Fetches a reply, or the reason why there is none, for every row.

        Prompts that failed in an earlier run are asked again. Raises PipelineError when the endpoint refuses all
        requests, when it answers none, or when more than a tenth of them fail.
        """
        with ReplyLog(self._path) as reply_log:
            entries = [reply_log.entries.get(self._key(row)) for row in rows]
            missing = [row for row, entry in zip(rows, entries, strict=True) if entry is None or "failed" in entry]
            if len(missing) < len(rows):
                log.info("teacher_cache: going on; %d of %d answers are there", len(rows) - len(missing), len(rows))
            if missing:
                num_stored = sum(entry is not None and "kept" in entry for entry in entries)
                asyncio.run(_FetchRun(self, reply_log, missing, num_stored).run())
            self._entries = reply_log.entries
        self._log_problems(rows)

    def answer(
        self, rows: Sequence[RenderedPrompt], on_finished: Callable[[Completion], None]
    ) -> Sequence[AnsweredPrompt | FailedPrompt]:
        """Returns the answers to rows that were fetched, in their order."""
        return [self._answer(row, on_finished) for row in rows]

    async def ask(self, client: openai.AsyncOpenAI, row: RenderedPrompt) -> dict[str, Any]:
        """Returns the log's entry for a row; raises PipelineError when the endpoint will refuse every other row too."""
        entry = {"key": self._key(row), "prompt_id": row.prompt.prompt_id}
        api = self._template.api
        try:
            reply = await client.post(api.value, cast_to=object, body=self._template.body(row))
            fields = reply_fields(reply, api)
            reply_tokens(fields, self._reader)
            return entry | {"kept": fields}
        except openai.APIStatusError as error:
            message = error.message.removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")
            reason = self._endpoint.redacted(f"HTTP {error.status_code}: {message or error.response.text}")
            if error.status_code in STATUS_HINTS:
                hint = STATUS_HINTS[error.status_code]
                raise PipelineError(f"{self._template.origin.endpoint} answers {reason}; {hint}") from None
        except openai.APITimeoutError:
            reason = f"no answer within {self._endpoint.timeout_seconds:g} s (teacher_cache.openai.timeout_seconds)"
        except openai.APIConnectionError as error:
            reason = self._endpoint.redacted(f"{NO_CONNECTION}: {error.__cause__ or error}")
        except openai.APIError as error:
            reason = self._endpoint.redacted(str(error))
        except ValueError as error:  # no JSON, or no UTF-8
            reason = f"the reply is no JSON: {error}"
        except BadAnswer as error:
            reason = self._endpoint.redacted(str(error))
        return entry | {"failed": reason}

    @property
    def endpoint(self) -> Endpoint:
        """Returns where requests are sent."""
        return self._endpoint

    def failure_error(self, reasons: Sequence[str], num_asked: int) -> PipelineError:
        """Returns the error of a run in which too many prompts failed, with the most frequent reasons."""
        return failure_error(f"{self._template.origin.endpoint} failed", reasons, num_asked, RESUME_HINT)

    def _key(self, row: RenderedPrompt) -> str:
        return fingerprint_of([self._endpoint.url, self._template.api.value, self._template.body(row)])

    def _answer(self, row: RenderedPrompt, on_finished: Callable[[Completion], None]) -> AnsweredPrompt | FailedPrompt:
        entry = self._entries[self._key(row)]
        if "failed" in entry:
            return FailedPrompt(row.prompt, entry["failed"])
        try:
            return finished(row, reply_tokens(entry["kept"], self._reader), on_finished)
        except BadAnswer as error:  # from a log that an older version of this program wrote
            return FailedPrompt(row.prompt, str(error))

    def _log_problems(self, rows: Sequence[RenderedPrompt]) -> None:
        """Warns about failures, and about prompts that the endpoint tokenized differently."""
        entries = [(row, self._entries[self._key(row)]) for row in rows]
        log_failures(
            [FailedPrompt(row.prompt, entry["failed"]) for row, entry in entries if "failed" in entry], len(rows)
        )
        others = [row for row, entry in entries if "kept" in entry and not _is_same_prompt(row, entry["kept"])]
        if others:
            log.warning(
                "teacher_cache: %s read %d of %d prompts as other tokens than they have here, the first %s: its chat "
                "template or its date differ; teacher_cache.openai.api=completions sends tokens",
                self._template.origin.endpoint,
                len(others),
                len(rows),
                others[0].prompt.prompt_id[:12],
            )


def _is_same_prompt(row: RenderedPrompt, fields: dict[str, Any]) -> bool:
    if fields["prompt_token_ids"] is not None:
        return tuple(fields["prompt_token_ids"]) == row.token_ids
    return fields["num_prompt_tokens"] in (None, len(row.token_ids))


class _FetchRun:
    """Asks for the rows that have no reply, `concurrency` at a time."""

    def __init__(
        self, endpoint_client: EndpointClient, reply_log: ReplyLog, rows: Sequence[RenderedPrompt], num_stored: int
    ) -> None:
        self._endpoint_client, self._reply_log = endpoint_client, reply_log
        self._rows, self._num_stored = rows, num_stored
        self._reasons: list[str] = []
        self._num_answered = 0

    async def run(self) -> None:
        """Asks for all rows; the first error of a worker ends all workers."""
        endpoint = self._endpoint_client.endpoint
        waiting = iter(self._rows)
        total = self._num_stored + len(self._rows)
        with Progress("teacher_cache: answers", total, "prompts", done=self._num_stored) as progress:
            async with endpoint.client() as client:
                count = min(endpoint.concurrency, len(self._rows))
                workers = [asyncio.create_task(self._work(client, waiting, progress)) for _ in range(count)]
                _, others = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                for worker in others:
                    worker.cancel()
                for ended in await asyncio.gather(*workers, return_exceptions=True):
                    if isinstance(ended, Exception):  # a worker that was cancelled has a CancelledError
                        raise ended
        self._require_enough(is_over=True)

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[RenderedPrompt], progress: Progress) -> None:
        for row in waiting:
            entry = await self._endpoint_client.ask(client, row)
            self._reply_log.append(entry)
            if "failed" in entry:
                self._reasons.append(entry["failed"])
            else:
                self._num_answered += 1
            progress.advance(1, f"{len(self._reasons)} failed" if self._reasons else "")
            self._require_enough(is_over=False)

    def _require_enough(self, *, is_over: bool) -> None:
        """Raises PipelineError as soon as it is certain that too many prompts fail.

        When an earlier run stored answers, all that are left may fail again, but the endpoint must be reachable.
        """
        num_failed, limit = len(self._reasons), 1 if is_over else FIRST_FAILURES
        num_unreached = sum(reason.startswith(NO_CONNECTION) for reason in self._reasons)
        no_answer_comes = not self._num_answered and (
            num_unreached >= FIRST_FAILURES or (not self._num_stored and num_failed >= limit)
        )
        if no_answer_comes or are_too_many(num_failed, self._num_stored + len(self._rows)):
            raise self._endpoint_client.failure_error(self._reasons, self._num_answered + num_failed)
